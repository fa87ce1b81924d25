"""The benchmarks run, with the bundled model's shapes: of the comparison every part, and one beside diffusers."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from multiprocessing import dummy
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import approximations, fleet, gpu_work, growth, memory
from benchmarks.compare import process, workers
from benchmarks.compare.__main__ import _WEIGHTS, FULL, QUICK, main
from benchmarks.compare.cases import GUIDANCE, PARTS, Case, cases
from benchmarks.compare.gpu_graph import as_on_a_gpu, trace, trace_step
from benchmarks.compare.gpu_kernels import CHIPS, Kernel, kernels
from benchmarks.shapes import SHAPES, UNETS

ROOT = Path(__file__).parents[1]
TINY = ("--shape", "tiny", "--size", "64", "--repeats", "2")

WORK = {"kernels": 12, "moved": 34e9, "flops": 5.6e12, "model": {"M1": 0.75}, "operations": 5e6}
HALF = {"kernels": 6, "moved": 17e9, "flops": 2.8e12, "model": {"M1": 0.25}}


class Thread(dummy.Process):
    """Stands in for a worker's process: the networks are small, and to start one takes longer than to measure them."""

    def kill(self) -> None:
        assert not self.is_alive()


@pytest.fixture
def compare(monkeypatch, tmp_path, capsys) -> Callable[..., tuple[list[dict], str]]:
    """Compare in this process; gives the results in the JSON file, and the table."""
    monkeypatch.setattr(workers, "_SPAWN", SimpleNamespace(Process=Thread, Pipe=dummy.Pipe))
    # A count takes a process of its own, see below; here the second column has half of the work.
    monkeypatch.setattr(workers, "count", lambda column, *_: WORK if column == "this library" else HALF)
    monkeypatch.setattr(process, "PRODUCT", 128)

    def call(*arguments: str) -> tuple[list[dict], str]:
        file = tmp_path / "figures.json"
        assert main([*TINY, "--json", str(file), *arguments]) == 0
        read = json.loads(file.read_text())
        assert read["machine"]["cores"] >= 1 and read["machine"]["mlx"]
        return read["results"], capsys.readouterr().out

    return call


def test_every_part(compare):
    results, table = compare("--only", ",".join(PARTS), "--columns", "this library")
    assert [case["part"] for case in results] == list(PARTS)
    for case in results:
        figures = case["columns"]["this library"]
        assert 0 < figures["min"] <= figures["median"] <= figures["max"] == max(figures["seconds"])
        assert len(figures["seconds"]) == len(figures["processor"]) == 2 and figures["first"] > 0
        # All of the weights are in memory, and something is computed from them; files are in half precision.
        assert figures["peak"] > figures["weights"] > 0
        assert re.search(rf"this library .* {figures['median']:.3f} s .* 12 kernels, 34.00 GB, 5.600 TFLOP", table)
        assert "this library by a model: M1 0.75 s" in table
    files = {case["part"]: case["columns"]["this library"]["weights"] for case in results}
    vae = files["vae-encode"] + files["vae-decode"]
    assert files["load"] == files["image"] == pytest.approx((files["unet"] + files["text"] + vae) / 2, rel=0.02)


def test_beside_diffusers_which_has_nothing_quantized(compare):
    options = ("--only", "unet", "--weights", "plain", "quantized", "--columns", "this library", "diffusers")
    results, table = compare(*options)
    plain, quantized = (case["columns"] for case in results)
    ours, theirs = plain["this library"], plain["diffusers"]
    assert ours["weights"] == theirs["weights"] > quantized["this library"]["weights"]
    assert f"this library / diffusers: time {ours['median'] / theirs['median']:.2f}" in table
    assert "kernels 2.00, bytes 2.00, FLOP 2.00" in table
    assert "diffusers" not in quantized
    rate = max(ours["rate"], theirs["rate"])
    for column in (ours, theirs):
        assert column["share"] * column["median"] * rate == pytest.approx(WORK["operations"])
    assert f"{ours['share']:.0%}   12 kernels" in table and f"float32 products at {rate / 1e9:.0f} GFLOP/s" in table


class Listener:
    """In place of stable-diffusion.cpp's model, which the tests do not have: it only tells its progress."""

    made: ClassVar[list["Listener"]] = []

    def __init__(self, **options):
        self.options, self.asked = options, []
        self.made.append(self)
        told = "ggml_extend.hpp:2580 - {} params backend buffer size =  {} MB(RAM) (9 tensors)\n"
        for name, size in (("unet", "2.00"), ("vae", " 1.50")):
            self.log(0, told.format(name, size).encode(), None)

    def generate_image(self, progress_callback, **options):
        self.asked.append(options)
        progress_callback(0, 1, 0.0)
        time.sleep(0.02)
        progress_callback(1, 1, 0.02)
        self.log(1, b"stable-diffusion.cpp:3192 - decoding 1 latents\n", None)
        time.sleep(0.04)
        self.log(1, b"stable-diffusion.cpp:3212 - decode_first_stage completed, taking 0.04s\n", None)


def test_stable_diffusion_cpp_is_timed_by_its_messages(compare, monkeypatch):
    def listen(log, _):
        Listener.log = staticmethod(log)

    package = ModuleType("stable_diffusion_cpp")
    package.__spec__ = ModuleSpec(package.__name__, None)
    package.StableDiffusion, package.sd_log_callback, package.sd_set_log_callback = Listener, lambda log: log, listen
    monkeypatch.setitem(sys.modules, package.__name__, package)
    results, table = compare("--only", ",".join(PARTS), "--weights", *_WEIGHTS, "--columns", "sd.cpp")
    assert [case["part"] for case in results if case["columns"]] == ["unet", "vae-decode"]
    step, decoding = (case["columns"]["sd.cpp"] for case in results if case["columns"])
    assert step["min"] >= 0.02 and decoding["min"] >= 0.04 and len(re.findall(r"^  sd.cpp +[0-9]", table, re.M)) == 2
    assert (step["weights"], decoding["weights"]) == (2 * 2**20, 1.5 * 2**20) and step["peak"] >= step["weights"]
    unet, vae = Listener.made
    assert [call["cfg_scale"] for call in unet.asked] == [GUIDANCE] * 3 and vae.asked[0]["cfg_scale"] == 1
    assert unet.options["taesd_path"] and not vae.options["taesd_path"] and vae.options["wtype"] == "f32"


def test_in_processes_where_a_column_that_fails_is_a_result():
    command = [sys.executable, "-m", "benchmarks.compare", *TINY, "--only", "vae-encode", "--columns", "this library"]
    done = subprocess.run(
        [*command, "--size", "64", "-8"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"64 x 64\n.*\n +this library( +\d+\.\d+ s){3}", done.stdout)
    assert re.search(r"-8 x -8\n.*\n +this library +\w+Error: ", done.stdout)


def test_the_matrix():
    assert cases(["unet"], QUICK) == [Case("unet", "sd21", 512)]
    # The published autoencoders are one; whole models are read in the two types that the scripts know.
    count = {part: len(cases([part], FULL)) for part in PARTS}
    assert count == {"unet": 108, "text": 18, "vae-encode": 3, "vae-decode": 3, "load": 12, "image": 36}
    assert [case.shape for case in cases(["vae-decode"], QUICK | {"shape": ("tiny", "sd15", "sdxl")})] == [
        "tiny",
        "sd15",
    ]
    assert {case.dtype for case in cases(["image"], FULL)} == {"float32", "float16"}
    titles = [case.title() for case in cases(list(PARTS), FULL)]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--only", "unets"), "'unets' is none of unet, text"),
        (("--columns", "mlx-examples"), "give --mlx-examples DIR"),
        (("--columns", "sd.cpp"), "pip install stable-diffusion-cpp-python"),
        (("--mlx-examples", "/nowhere"), "in /nowhere: give a copy of mlx-examples"),
        (("--repeats", 1), "--repeats 1 is less than 2"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, words, capsys):
    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    assert leaving.value.code == 2 and words in capsys.readouterr().err


def test_approximations_beside_the_exact_pictures(monkeypatch, capsys):
    settings = {"exact": {}, "twice": {"deep_cache": 2}, "fewer": {"num_steps": 1}}
    monkeypatch.setattr(approximations, "SETTINGS", {name: {"num_steps": 3} | told for name, told in settings.items()})
    approximations.quality(4)
    lines = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["4 captions", *settings]
    exact, cached, fewer = (float(line[2]) for line in lines[1:])
    assert exact == 0 < cached < fewer
    assert all(len(line) == len(lines[0]) == 8 for line in lines)


@pytest.mark.parametrize(
    "module, options, lines",
    [(approximations, "--steps-of tiny --latents 16", 7), (growth, "--shape tiny --sizes 64 128", 7)],
)
def test_steps_of_a_shape(module, options, lines, monkeypatch, capsys):
    monkeypatch.setitem(UNETS, "tiny", SHAPES["tiny"]["unet"])
    monkeypatch.setattr(sys, "argv", ["benchmark", *options.split()])
    module.main()
    shares = [float(share) for share in re.findall(r"(\d\.\d+)$", capsys.readouterr().out, re.MULTILINE)]
    assert len(shares) == lines and shares[0] == 1 and all(s > 0 for s in shares)


def test_what_fits_which_mac_is_in_the_documents(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--macs"])
    memory.main()
    table = capsys.readouterr().out.splitlines()
    figures, summary = (
        (ROOT / "docs" / name).read_text("utf-8") for name in ("figures/memory.md", "memory-and-speed.md")
    )
    assert len(table) == 29
    assert "\n".join(line for line in table if "SDXL" not in line) in figures
    assert "\n".join([*table[:2], *(line for line in table if "SDXL" in line)]) in summary
    cells = {line: line.split(" | ")[3:] for line in table[2:]}
    assert [len(row) for row in cells.values()] == [4] * 27
    assert all("no" not in cell for line, row in cells.items() for cell in row if "-q" in line or "SDXL" not in line)


def test_a_fleet_is_as_fast_as_its_pictures_divide(capsys):
    job = fleet.Job(pictures=64, seconds=20, size=1024, start=15)
    assert [job.even(macs) for macs in (1, 2, 48, 64, 100)] == [15 + 64 * 20, 15 + 32 * 20, 55, 35, 35]
    assert job.gathering(1, fleet.LINKS["wifi"]) == 0
    two = job.gathering(2, fleet.LINKS["ethernet"])
    assert two == pytest.approx(32 * 3 * 1024**2 / 112e6, rel=0.1)  # each sends its own pictures
    assert two < job.gathering(8, fleet.LINKS["ethernet"]) < job.gathering(8, fleet.LINKS["wifi"])
    assert job.even(1) / 2 < job.guidance(fleet.LINKS["ethernet"]) < 0.6 * job.even(1)
    assert fleet.pays_up_to(job, fleet.LINKS["ethernet"]) == 64
    assert fleet.pays_up_to(fleet.Job(pictures=64, seconds=0.1), fleet.LINKS["wifi"]) == 1
    fleet.main(["--macs", "1", "2", "--pictures", "3", "--seconds", "10"])
    lines = capsys.readouterr().out.splitlines()
    assert "computed, not measured" in lines[0]
    assert lines[2].split()[:4] == ["1", "45", "s", "1.00"] and lines[3].split()[:4] == ["2", "35", "s", "1.29"]


# --- the work of a GPU -----------------------------------------------------------------------------------------------


def attend(q: mx.array, k: mx.array) -> mx.array:
    """Attention of maps [B, N, heads, D], whose result is read as [B, N, C]."""
    q, k = (x.swapaxes(1, 2) for x in (q, k))
    out = mx.fast.scaled_dot_product_attention(q, k, k, scale=1.0)
    return out.swapaxes(1, 2).flatten(2)


def norm(x: mx.array) -> mx.array:
    return mx.fast.layer_norm(x, None, None, 1e-5)


def fused(x: mx.array) -> mx.array:
    return mx.compile(lambda x: mx.exp(x) * 2 + 1)(x)


def fused_twice(x: mx.array) -> mx.array:
    return mx.compile(lambda x: fused(x) + x)(x)


def not_fused(x: mx.array) -> mx.array:
    return mx.compile(lambda x: x.sum() * 2)(x)


# Function, shapes of its inputs in float16, and (name, bytes, FLOPs) of the kernels.
RULES = {
    "views": (lambda x: x.T[1:, ::2][None].squeeze(0), [(4, 6)], []),
    "the reshape of a view that needs no copy": (lambda x: x[1:3].reshape(3, 4), [(4, 6)], []),
    "of one that does": (lambda x: x.T.reshape(3, 8), [(4, 6)], [("copy", 96, 0)]),
    "what is broadcast is read once": (lambda x, y: x + y, [(4, 6), (6,)], [("Add", 48 + 12 + 48, 0)]),
    "parts are read in place": (lambda x: x[:, ::2] * x[:, 1::2], [(4, 6)], [("Multiply", 3 * 24, 0)]),
    "the order of axes is kept": (
        lambda x: mx.exp(x.T * 2).T.reshape(24),
        [(4, 6)],
        [("Multiply", 98, 0), ("Exp", 96, 0)],
    ),
    "unless there are gaps": (lambda x: mx.exp(x[:, 1:]).reshape(20), [(4, 6)], [("Exp", 80, 0)]),
    "a type": (lambda x: x.astype(mx.float32), [(4, 6)], [("AsType", 48 + 96, 0)]),
    "a sum": (lambda x: x.sum(axis=1), [(4, 6)], [("Reduce", 48 + 8, 0)]),
    "a long sum": (lambda x: x.sum(axis=1), [(2, 512)], [("Reduce", 2048 + 4, 0), ("Reduce", 0, 0)]),
    "a product": (lambda x, y: x @ y.T, [(4, 6), (5, 6)], [("Matmul", 2 * (24 + 30 + 20), 2 * 4 * 6 * 5)]),
    "of parts": (lambda x, y: x[:, ::2] @ y, [(4, 6), (3, 5)], [("copy", 48, 0), ("Matmul", 94, 2 * 4 * 3 * 5)]),
    "with a bias": (lambda x, y, z: mx.addmm(z, x, y), [(4, 6), (6, 5), (5,)], [("AddMM", 48 + 60 + 10 + 40, 240)]),
    "a convolution": (
        lambda x, w: mx.conv2d(x, w, padding=1),
        [(1, 5, 4, 6), (7, 3, 3, 6)],
        [("Convolution", 2 * (120 + 378 + 140), 2 * 140 * 54)],
    ),
    "of a part": (
        lambda x, w: mx.conv2d(x[..., 1:], w),
        [(1, 5, 4, 7), (7, 1, 1, 6)],
        [("copy", 480, 0), ("Convolution", 2 * (120 + 42 + 140), 2 * 140 * 6)],
    ),
    "padding": (lambda x: mx.pad(x, 1), [(4, 6)], [("Pad", 96, 0), ("copy", 96, 0)]),
    "joining": (lambda x: mx.concatenate([x, x[:2]]), [(4, 6)], [("Concatenate", 96, 0), ("Concatenate", 48, 0)]),
    "rows of a table": (lambda x: x[mx.array([1, 2])], [(400, 6)], [("Gather", 24 + 8 + 24, 0)]),
    "attention, which writes positions": (
        attend,
        [(1, 8, 2, 64), (1, 4, 2, 64)],
        [("attention", 2 * (1024 + 2 * 512 + 1024), 4 * 1024 * 4)],
    ),
    "a norm": (norm, [(4, 6)], [("layer_norm", 96, 0)]),
    "of a view": (lambda x: norm(x.T), [(4, 6)], [("copy", 96, 0), ("layer_norm", 96, 0)]),
    "compiled": (fused, [(4, 6)], [("<lambda>", 96, 0)]),
    "compiled in what is compiled": (fused_twice, [(4, 6)], [("<lambda>", 96, 0)]),
    "what is not one kernel": (not_fused, [(4, 6)], [("Reduce", 50, 0), ("Multiply", 6, 0)]),
    "with a gradient": (lambda x: mx.custom_function(mx.exp)(x), [(4, 6)], [("Exp", 96, 0)]),
    "what nothing needs": (lambda x: (x[:1], mx.exp(x))[0], [(4, 6)], []),
}


@pytest.mark.parametrize("name", RULES)
def test_kernels_of_a_gpu(name):
    function, shapes, expected = RULES[name]
    with as_on_a_gpu():
        graph = trace(function, *(mx.zeros(shape, mx.float16) for shape in shapes))
    assert [(kernel.name, kernel.bytes, kernel.flops) for kernel in kernels(graph)] == expected


def test_attention_without_a_kernel_has_its_scores_in_memory():
    with as_on_a_gpu():
        found = kernels(trace(attend, mx.zeros((1, 8, 2, 40)), mx.zeros((1, 4, 2, 40))))
    products = [kernel for kernel in found if kernel.name == "Matmul"]
    assert [kernel.name for kernel in found if kernel.name != "copy"] == ["Multiply", "Matmul", "Softmax", "Matmul"]
    assert [kernel.flops for kernel in products] == [2 * 8 * 40 * 4 * 2] * 2


@pytest.mark.parametrize(
    "change", [{}, {"side": 62}, {"channels": 64}, {"channels": 144}, {"kernel": 1}, {"stride": 2}]
)
def test_convolutions_by_winograd(change):
    """Of maps of 4096 positions, 256 channels in and out, 3 x 3 and stride 1; the work has 121 tiles for 64 x 64."""
    case = {"side": 64, "channels": 128, "kernel": 3, "stride": 1} | change
    x, w = mx.zeros((1, case["side"], case["side"], 128)), mx.zeros((case["channels"], *[case["kernel"]] * 2, 128))
    graph = trace(lambda x, w: mx.conv2d(x, w, stride=case["stride"], padding=1), x, w)
    direct, found = kernels(graph), kernels(graph, winograd=True)
    assert len(direct) == 1
    if change:
        assert found == direct
    else:
        assert [sum(kernel.flops for kernel in k) for k in (direct, found)] == [
            2 * 4096 * 128**2 * 9,
            128 * 121 * 128**2,
        ]
        values = 64 * 128 * (128 + 2 * 121) * 2 + 128 * (9 * 128 + 68 * 68 * 2 + 64 * 64 * 3)
        assert len(found) == 6 and sum(kernel.bytes for kernel in found) == 4 * values


def test_what_a_step_keeps_for_the_next_is_not_counted():
    layer, kept = nn.Linear(6, 5), []

    def step(i: int) -> mx.array:
        kept.append(kept[0] if kept else mx.exp(layer.weight))  # as a prompt's keys
        return (mx.full((4, 6), i + 1.0) @ kept[-1].T) * layer.bias + mx.exp(mx.array(2.0))  # made anew

    found = trace_step([layer], step)
    names = sorted(node.name for node in found.nodes if node.name not in ("Transpose", "Broadcast"))
    assert names == ["Add", "Exp", "Full", "Matmul", "Multiply"]
    assert [shape for _, shape, _ in found.parameters] == [(5,)]


def test_the_model_of_the_time():
    chip = CHIPS["M5"]
    assert Kernel("copy", 153_000).seconds(chip) == pytest.approx(1e-6 + 2e-6)
    assert Kernel("Matmul", 0, int(0.7 * chip.products), is_product=True).seconds(chip) == pytest.approx(1 + 2e-6)
    assert Kernel("Convolution", 0, int(0.7 * chip.flops)).seconds(chip) == pytest.approx(1 + 2e-6)
    # Apple's figures for whole chips: 2.6 TFLOP/s, and 13.6 of the M2 Max.
    assert [round(CHIPS[name].flops / 1e12, 1) for name in ("M1", "M2 Max")] == [2.6, 13.6]


@pytest.mark.parametrize("shape", ["sd15", "sd21"])
def test_the_work_of_a_network_beside_torch(shape):
    """As published, its operations are those of diffusers but for the keys and values of the prompt, which are kept."""
    case = Case("unet", shape, 256, "float16")
    found = workers.count("this library", case, Path(), None)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(case.config["unet"]))
        inputs = torch.zeros(2, 4, 32, 32), 1, torch.zeros(2, 77, unet.config.cross_attention_dim)
        with FlopCounterMode(display=False) as counter:
            unet(*inputs)
    parameters = sum(p.numel() for p in unet.parameters())
    kept = sum(p.numel() for name, p in unet.named_parameters() if re.search(r"attn2\.to_[kv]", name))
    assert found["operations"] == pytest.approx(counter.get_total_flops() - 2 * 2 * 77 * kept, rel=1e-3)
    assert 0.85 < found["flops"] / found["operations"] < 1.02
    assert 0.85 < found["parameters"] / (2 * parameters) <= 1 < found["moved"] / (2 * parameters)
    assert found["kernels"] == sum(number for number, _ in found["kinds"].values()) > 500


def test_what_is_more_than_a_graph_is_not_counted():
    assert workers.count("this library", Case("load", "sd21", 256), Path(), None) == {}


def test_tables_of_the_work(monkeypatch, capsys):
    names = {"this library": WORK, "mlx-examples": HALF}
    lines = gpu_work.table({("a step", column): found for column, found in names.items()}).splitlines()
    assert "| a step | this library | 12 (2.00) | 34.00 GB (2.00) | 5.600 T (2.00) |" in lines
    assert "| a step | mlx-examples | 6 | 17.00 GB | 2.800 T |" in lines
    assert "| a step | this library | 0.75 s (3.00) |" in lines
