"""The page of the server in a browser: what a person does with it."""

import base64
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from serving import Server
from stable_diffusion.images.files import read_text

PROMPT = "a red circle on a blue background"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PAGE = Path(__file__).parents[2] / "stable_diffusion" / "server" / "page.html"

pytestmark = pytest.mark.skipif(BROWSER is None and "CI" not in os.environ, reason="there is no Chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=["wide"])
def page(browser, server, request) -> Iterator[Page]:
    """The page, which reports no error of its script while it is used."""
    size = {"wide": (1200, 900), "phone": (360, 740)}[request.param]
    page = browser.new_page(viewport=dict(zip(("width", "height"), size, strict=True)))
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.url)
    expect(page.locator("#model-now")).to_have_text("tiny")
    yield page
    page.close()
    assert not errors


def draw(page: Page, **values: object) -> None:
    """Fill in the form and draw, to the end."""
    for name, value in ({"prompt": PROMPT, "steps": 4, "seed": 7} | values).items():
        page.locator(f"[name={name}]").fill(str(value))
    page.get_by_role("button", name="Draw", exact=True).click()
    finished(page)


def finished(page: Page) -> None:
    expect(page.locator("#said")).to_contain_text(" s", timeout=60_000)
    expect(page.locator("#go")).to_be_enabled(timeout=60_000)


def shown(page: Page, path: Path) -> Image.Image:
    """The picture on the page, also as a file."""
    source = page.locator("#shown").get_attribute("src")
    path.write_bytes(base64.b64decode(source.partition(",")[2]))
    with Image.open(path) as image:
        return image.convert("RGB")


@pytest.mark.parametrize("page", ["wide", "phone"], indirect=True)
def test_a_picture_is_the_scripts(page, run, tmp_path):
    draw(page, width=64, height=48)
    drawn = shown(page, tmp_path / "page.png")
    words = "--model tiny --steps 4 --seed 7 --n_images 1 --width 64 --height 48"
    run("txt2image", PROMPT, *words.split(), "--output", tmp_path / "script.png")
    with Image.open(tmp_path / "script.png") as script:
        assert drawn.tobytes() == script.tobytes()
        expect(page.locator("#text")).to_have_text(script.text["parameters"])
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing is cut off


def test_the_preview_sharpens_and_a_run_is_cancelled(page, server):
    page.locator("[name=prompt]").fill(PROMPT)
    page.locator("[name=steps]").fill("150")
    page.evaluate(
        "seen = new Set(); new MutationObserver(() => seen.add(shown.src)).observe(shown, {attributes: true})"
    )
    page.keyboard.press("Control+Enter")
    page.wait_for_function("seen.size > 3", timeout=60_000)
    page.keyboard.press("Escape")
    expect(page.locator("#said")).to_have_text("Cancelled")
    page.wait_for_function("async () => (await (await fetch('/v1/health')).json()).jobs === 0", timeout=30_000)
    expect(page.locator("#history li")).to_have_count(0)


def test_again_and_vary(page, tmp_path):
    draw(page)
    first = shown(page, tmp_path / "a.png")
    page.locator("[name=seed]").fill("8")
    page.get_by_role("button", name="draw this again").click()
    expect(page.locator("#history li")).to_have_count(2, timeout=60_000)
    finished(page)
    assert shown(page, tmp_path / "b.png").tobytes() == first.tobytes()
    assert page.locator("[name=seed]").input_value() == "7"
    page.get_by_role("button", name="draw a variation of this").first.click()
    expect(page.locator("#history li")).to_have_count(3, timeout=60_000)
    finished(page)
    assert shown(page, tmp_path / "c.png").tobytes() != first.tobytes()
    assert "Variation seed strength: 0.2" in read_text(tmp_path / "c.png")["parameters"]
    page.get_by_role("button", name=f"show: {PROMPT}").last.click()
    assert shown(page, tmp_path / "d.png").tobytes() == first.tobytes()


def drop(page: Page, path: Path) -> None:
    """Drop a file onto the page, as from the desktop."""
    data = base64.b64encode(path.read_bytes()).decode()
    page.evaluate(
        """async ([data, name]) => {
            const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)), dropped = new DataTransfer();
            dropped.items.add(new File([bytes], name, {type: "image/png"}));
            document.dispatchEvent(new DragEvent("drop", {dataTransfer: dropped, cancelable: true}));
        }""",
        [data, path.name],
    )


def test_a_dropped_picture_fills_the_form_and_is_where_a_run_starts(page, run, tmp_path):
    words = "--model tiny --steps 3 --seed 5 --n_images 1 --cfg 3 --negative_prompt green"
    run("txt2image", PROMPT, *words.split(), "--output", tmp_path / "a.png")
    drop(page, tmp_path / "a.png")
    expect(page.locator("#said")).to_contain_text("form now has the settings of this image")
    values = {name: page.locator(f"[name={name}]").input_value() for name in ("prompt", "steps", "seed", "cfg")}
    assert values == {"prompt": PROMPT, "steps": "3", "seed": "5", "cfg": "3"}
    draw(page, prompt="a green square", steps=4)
    drawn = shown(page, tmp_path / "page.png")
    words = "--model tiny --steps 4 --seed 7 --n_images 1 --cfg 3 --negative_prompt green --width 64 --height 64"
    words += f" --strength 0.75 --output {tmp_path / 'b.png'}"
    run("image2image", tmp_path / "a.png", "a green square", *words.split())
    with Image.open(tmp_path / "b.png") as script:
        assert drawn.tobytes() == script.tobytes()


def test_a_painted_mask_keeps_the_rest(page, tmp_path):
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "blue.png")
    drop(page, tmp_path / "blue.png")
    expect(page.locator("#said")).to_contain_text("has no recorded settings")
    page.locator("#mask").scroll_into_view_if_needed()
    box = page.locator("#mask").bounding_box()
    x, y, side = box["x"], box["y"], box["width"]
    page.mouse.move(x + side / 4, y + side / 4)
    page.mouse.down()
    page.mouse.move(x + side / 4, y + side * 3 / 4, steps=6)
    page.mouse.up()
    draw(page)
    drawn = shown(page, tmp_path / "drawn.png")
    right, left = (drawn.crop(part) for part in ((40, 0, 64, 64), (12, 20, 20, 44)))
    assert right.tobytes() == Image.new("RGB", right.size, "blue").tobytes()
    assert left.tobytes() != Image.new("RGB", left.size, "blue").tobytes()
    page.get_by_role("button", name="Remove image").click()
    expect(page.locator("#start")).to_be_hidden()


def test_mistakes_are_said(page, tmp_path):
    draw_button = page.get_by_role("button", name="Draw", exact=True)
    page.locator("[name=prompt]").fill("a <lora:nothing:1>")
    draw_button.click()
    expect(page.locator("#said.bad")).to_contain_text("the prompt names the LoRA nothing")
    (tmp_path / "text.png").write_text("no picture")
    drop(page, tmp_path / "text.png")
    expect(page.locator("#said.bad")).to_contain_text("cannot show text.png")


def test_the_page_is_one_file_without_others(server: Server):
    text = PAGE.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    assert "http" not in text and "import " not in text and "<script src" not in text
    assert server("/").body.decode() == text
