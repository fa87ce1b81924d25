"""Draw the picture of the server's page for the documentation: python -m tools.draw_page

It starts a server on the bundled model, draws three pictures in Chromium, and writes docs/pictures/server.png.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "server.png"
PROMPTS = ("a yellow star on a green background", "a blue square at the left", "a red circle on a blue background")


def main() -> None:
    """Write the picture."""
    words = [sys.executable, "-m", "stable_diffusion", "serve", "--model", "tiny", "--port", "0"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process, sync_playwright() as playwright:
        address = re.search(r"http://\S+", process.stderr.readline())[0]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 700})
        page.goto(address)
        for prompt in PROMPTS:
            page.locator("[name=prompt]").fill(prompt)
            page.locator("[name=seed]").fill("7")
            page.get_by_role("button", name="Draw", exact=True).click()
            page.get_by_role("button", name=f"show: {prompt}").wait_for(timeout=120_000)
            page.wait_for_function("!document.getElementById('go').disabled")
        page.screenshot(path=PICTURE, full_page=True)
        browser.close()
        process.terminate()


if __name__ == "__main__":
    main()
