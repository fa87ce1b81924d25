"""Products of one input as one, as on a GPU, computed on the CPU: against torch and against products one by one."""

import gc

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten, tree_unflatten

from loras import few, write
from loras import load as load_model
from loras import make as make_lora
from models import test_controlnet as controlnet
from models import test_unet as unet
from models import test_vae as vae
from oracle import last, normal, relative_error
from stable_diffusion import StableDiffusion
from stable_diffusion.lora.delta import LoRADelta
from stable_diffusion.lora.layers import LoRALayer
from stable_diffusion.models import gpu as on_gpu
from stable_diffusion.models.layers import Attention, Context
from stable_diffusion.weights.quantize import quantize
from stable_diffusion.weights.save import stored_tensors

NARROW = (4, 8, 16, 32, 64)  # widths of heads: as if the small networks here had those of a fused kernel
DIM, HEADS = 64, 4


@pytest.fixture(params=[on_gpu.FUSED, NARROW], ids=["widened", "views"])
def widths(request, monkeypatch) -> tuple[int, ...]:
    monkeypatch.setattr(on_gpu, "FUSED", request.param)
    return request.param


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the weights of all products so far."""
    shapes = []
    for kind in (nn.Linear, nn.QuantizedLinear):

        def spied(self, x, call=kind.__call__):
            shapes.append(self.weight.shape)
            return call(self, x)

        monkeypatch.setattr(kind, "__call__", spied)
    return shapes


def attention(kind: str = "plain", context: int | None = None, dim: int = DIM) -> Attention:
    layer = Attention(dim, HEADS, context, bias=kind == "bias").eval()
    layer.update({"to_out": [{"bias": mx.array(normal(dim, seed=8))}]})
    return quantize(layer, 8, 32) if kind == "quantized" else layer


def joined(layer: nn.Module) -> nn.Module:
    on_gpu.join(layer)
    return layer


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "bias", "quantized"])
@pytest.mark.parametrize("context", [None, 32])
def test_attention(gpu, widths, products, kind, context):
    layer, x = attention(kind, context), mx.array(normal(2 * 9, DIM))
    perturbed = mx.array([0.0, 1.0]) if context is None else None
    told = [Context(mx.array(normal(2, 7, 32, seed=1))) if context else None for _ in range(2)]
    want, count = layer(x, 2, told[0], perturbed), len(products)
    before = dict(tree_flatten(layer.parameters()))
    ours = joined(layer)(x, 2, told[1], perturbed)
    assert ours.dtype == want.dtype and relative_error(ours, want) <= 1e-5
    assert [count, len(products) - count] == [4, 2 if context is None else 3]
    after = dict(tree_flatten(layer.parameters()))
    assert before.keys() == after.keys() and all(np.array_equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("dtype, bound", [(mx.float32, 1e-5), (mx.bfloat16, 2e-2)])
def test_gradients_of_the_input_equal_torch(gpu, widths, dtype, bound):
    """Of heads of 40, as those of SD 1.5, which are widened to 64."""
    layer = attention(dim=160)
    layer._upcast = True
    x, change = normal(9, 160, scale=2.0), normal(9, 160, seed=3)
    layer.set_dtype(dtype)
    exact = torch.tensor(mx.array(x).astype(dtype).tolist(), dtype=torch.float64, requires_grad=True)
    weights = {
        key: torch.tensor(value.tolist(), dtype=torch.float64) for key, value in tree_flatten(layer.parameters())
    }
    q, k, v = ((exact @ weights[f"to_{n}.weight"].T).reshape(9, HEADS, 40).swapaxes(0, 1) for n in "qkv")
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v).swapaxes(0, 1).reshape(9, 160)
    out = out @ weights["to_out.0.weight"].T + weights["to_out.0.bias"]
    (out * torch.tensor(change, dtype=torch.float64)).sum().backward()
    joined(layer)
    (ours,), (gradient,) = mx.vjp(lambda y: layer(y, 1), [mx.array(x).astype(dtype)], [mx.array(change).astype(dtype)])
    assert relative_error(ours.astype(mx.float32), out.detach().numpy()) <= bound
    assert relative_error(gradient.astype(mx.float32), exact.grad.numpy()) <= bound


def test_views_take_no_memory_and_old_parameters_are_dropped(gpu, monkeypatch, products):
    monkeypatch.setattr(on_gpu, "FUSED", NARROW)
    layer, x = attention(dim=256), mx.zeros((4, 256))
    mx.eval(layer.parameters())
    before = mx.get_active_memory()
    mx.eval(joined(layer).parameters(), layer(x, 1))
    gc.collect()
    assert len(products) == 2 and mx.get_active_memory() <= before + 2**14
    layer.set_dtype(mx.float16)
    mx.eval(layer.parameters())
    mx.eval(layer(x.astype(mx.float16), 1))
    gc.collect()
    assert len(products) == 2 + 4 and mx.get_active_memory() < before - 4 * 256 * 256


@pytest.mark.parametrize("name", ["to_q", "to_k", "to_v", "to_out"])
def test_a_layer_that_is_wrapped_or_changed_counts(gpu, widths, name):
    """Also beside keys that were kept before it was wrapped."""
    x, encoded, path = (
        mx.array(normal(9, DIM)),
        mx.array(normal(1, 7, 32, seed=1)),
        {"to_out": "to_out.0"}.get(name, name),
    )
    ours, theirs = attention(context=32), attention(context=32)
    theirs.update(ours.parameters())
    kept = Context(encoded)

    def same(context: Context | None = None) -> np.ndarray:
        want = theirs(x, 1, Context(encoded))
        assert relative_error(ours(x, 1, context or Context(encoded)), want) <= 1e-5
        return np.array(want)

    joined(ours)
    plain = same(kept)
    bare = [dict(layer.named_modules())[path] for layer in (ours, theirs)]
    factors = {"down": mx.array(normal(2, bare[0].weight.shape[1], seed=4)), "up": mx.array(normal(DIM, 2, seed=5))}
    for layer, base in zip((ours, theirs), bare, strict=True):
        wrapper = LoRALayer(base)
        wrapper.loras = [LoRADelta("unet", name, factors, 1.0, type("Lora", (), {"scale": 1.0}))]
        layer.update_modules(tree_unflatten([(path, wrapper)]))
    assert relative_error(same(), plain) > 1e-3
    if name in ("to_q", "to_out"):
        same(kept)
    for layer, base in zip((ours, theirs), bare, strict=True):
        layer.update_modules(tree_unflatten([(path, base)]))
    assert relative_error(same(), plain) <= 1e-6
    for base in bare:
        base.weight = 2 * base.weight
    assert relative_error(same(), plain) > 1e-3


# --- networks --------------------------------------------------------------------------------------------------------


def test_networks_equal_diffusers(gpu, widths, monkeypatch, products):
    for module, name in ((unet, "unets"), (controlnet, "controlnets"), (vae, "vaes")):
        make = getattr(module, name)

        def pair(config, make=make):
            ours, oracle = make(config)
            return joined(ours), oracle

        monkeypatch.setattr(module, name, pair)
    if widths == NARROW:
        unet.test_equals_diffusers("xl")
        assert any(rows == 3 * columns for rows, columns in products)
        unet.test_gradients_of_all_parameters_equal_torch("xl")
        vae.test_equals_diffusers(vae.SD)
    else:
        unet.test_equals_diffusers("sd1")
        controlnet.test_equals_diffusers("sd1")


RUN = {"num_steps": 2, "latent_size": (6, 8), "seed": 3, "cfg_weight": 4.0, "negative_text": "blue"}


def drawn(sd: StableDiffusion) -> np.ndarray:
    return last(sd.generate_latents("a cat", **RUN))


@pytest.fixture(scope="module")
def lora(sd1_folder, tmp_path_factory):
    model = load_model(sd1_folder, "sd1")
    return write(tmp_path_factory.mktemp("lora"), make_lora(model, only=lambda n, p: few(n, p) and "attn" in p)[0])


@pytest.mark.parametrize(
    "widths, options",
    [(on_gpu.FUSED, {"low_memory": True}), (NARROW, {"unet_bits": 8}), (NARROW, {"low_memory": True, "fused": 0.7})],
    ids=["widened", "quantized views", "views with a LoRA in them"],
)
def test_a_model(sd1_folder, lora, widths, options, monkeypatch, caplog, products):
    """Its pictures, with and without a LoRA beside its weights; what is saved of it; that it is freed in low memory."""
    monkeypatch.setattr(on_gpu, "FUSED", widths)
    options = {"loras": [(lora, options["fused"])], "low_memory": True} if "fused" in options else options
    pictures, saved, counts = [], [], []
    monkeypatch.setattr(on_gpu, "is_default", lambda: True)
    for join in (lambda network: None, on_gpu.join):
        monkeypatch.setattr(on_gpu, "join", join)
        sd = StableDiffusion(sd1_folder, **options)
        found = [drawn(sd)]
        found.append(np.array(sd.decode(mx.array(found[0]))))
        saved.append(stored_tensors(sd.unet))
        handle = sd.load_lora(lora, 0.5)
        found.append(drawn(sd))
        handle.scale = 0.0
        assert np.array_equal(drawn(sd), found[0])
        handle.detach()
        found.append(drawn(sd))
        pictures.append(found)
        counts.append(len(products))
        assert not any(source.is_edited(getattr(sd, name)) for name, source in sd.sources.items())
    assert "by hand" not in caplog.text and counts[1] < 2 * counts[0]
    for theirs, ours in zip(*pictures, strict=True):
        assert relative_error(ours, theirs) <= 1e-4
    assert relative_error(pictures[0][0], pictures[0][2]) > 1e-3
    assert saved[0].keys() == saved[1].keys()
    assert all(np.array_equal(saved[0][key], saved[1][key]) for key in saved[0])
