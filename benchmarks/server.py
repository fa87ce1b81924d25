"""What the server adds to a picture, and how soon it answers while it draws, on the bundled model.

    python -m benchmarks.server

The first figure is the time of a request over HTTP less the time that the same request takes in the engine alone: both
encode the prompt, make the steps and decode. The second is the time in which ``/sdapi/v1/progress``, with a preview,
answers while a large picture is drawn.
"""

import argparse
import json
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

from stable_diffusion.app.engine import Engine, Resources, open_model
from stable_diffusion.app.request import Request, expand
from stable_diffusion.models import cpu

PROMPT = "a red circle on a blue background"


def timed(compute: Callable[[], Any], repeats: int) -> list[float]:
    """Return the milliseconds of each of some calls, after two that are not counted."""
    seconds = []
    for _ in range(repeats + 2):
        began = perf_counter()
        compute()
        seconds.append(1000 * (perf_counter() - began))
    return seconds[2:]


def post(url: str, body: dict[str, Any]) -> bytes:
    """Return the answer to a request with a body in JSON."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return answer.read()


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    cpu.tune()  # as the server does
    request = Request(model="tiny", prompt=PROMPT, resolved_prompt=PROMPT, steps=args.steps, n_images=1, seed=1)
    model, resources = open_model(request), Resources()
    model.pinned[parser] = set(model.sources)  # networks stay in memory, as in the server
    alone = timed(lambda: list(Engine(model, expand([(request, {})]), resources).run()), args.repeats)
    words = [sys.executable, "-m", "stable_diffusion", "serve", "--model", "tiny", "--port", "0"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        url = re.search(r"http://\S+", process.stderr.readline())[0] + "/sdapi/v1"
        body = {"prompt": PROMPT, "steps": args.steps, "seed": 1}
        served = timed(lambda: post(f"{url}/txt2img", body), args.repeats)
        large = {"prompt": PROMPT, "steps": 100, "width": 512, "height": 512, "seed": 1}
        drawing = threading.Thread(target=post, args=(f"{url}/txt2img", large))
        drawing.start()
        while not (state := _progress(url))["current_image"]:
            pass
        answers = timed(lambda: _progress(url), args.repeats)
        step = state["eta_relative"] / (state["state"]["sampling_steps"] - state["state"]["sampling_step"])
        post(f"{url}/interrupt", {})
        drawing.join()
        process.terminate()
    print(f"engine alone   {median(alone):7.1f} ms for {args.steps} steps, {min(alone):.1f} ... {max(alone):.1f}")
    print(f"over HTTP      {median(served):7.1f} ms, {min(served):.1f} ... {max(served):.1f}")
    print(f"the server adds{median(served) - median(alone):7.1f} ms")
    spread = f"{min(answers):.1f} ... {max(answers):.1f}"
    print(f"progress       {median(answers):7.1f} ms, {spread}, beside steps of {step:.2f} s")


def _progress(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/progress", timeout=60) as answer:
        return json.load(answer)


if __name__ == "__main__":
    main()
