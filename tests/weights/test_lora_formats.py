"""Every way in which trainers name and factor their changes gives the outputs of diffusers with peft, or of LyCORIS."""

import pytest

import loras
from loras import KINDS, make, write
from oracle import relative_error
from stable_diffusion.weights.adapters import attach, fuse
from stable_diffusion.weights.lora import read_lora

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def sd1(sd1_folder):
    return loras.load(sd1_folder, "sd1")


@pytest.fixture(scope="module")
def xl(xl_folder):
    return loras.load(xl_folder, "xl")


@pytest.fixture(params=["sd1", "xl"])
def model(request):
    return request.getfixturevalue(request.param)


def check(model, path, wanted, scale=1.0):
    """Both ways of applying the file give ``wanted``, and the model is then as it was."""
    before, lora = model.ours(), read_lora(path)
    for way in ("attach", "fuse"):
        networks = model.networks
        undo = attach(networks, lora, scale).detach if way == "attach" else fuse(networks, [(lora, scale)]).unfuse
        for name, value in model.ours().items():
            assert relative_error(value, wanted[name]) <= TOLERANCE, name
        undo()
    after = model.ours()
    for name, value in before.items():
        assert (value == after[name]).all()
        assert relative_error(value, wanted[name]) > 100 * TOLERANCE, f"{name} hardly changes: nothing is tested"


def through_diffusers(model, path, scale=1.0):
    model.pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="it")
    model.pipe.set_adapters("it", scale)
    try:
        return model.theirs()
    finally:
        model.pipe.unload_lora_weights()


# What its converters get wrong is left to test_kinds; and where names are plain, a part of the layers says enough.
_FEW = ("attentions.1", "text_model.encoder.layers.1", "resnets.1.conv")
READ_BY_DIFFUSERS = dict.fromkeys(loras.NAMES, lambda network, path: any(part in path for part in _FEW))
READ_BY_DIFFUSERS["kohya-original"] = lambda network, path: not path.startswith("add_embedding")


@pytest.mark.parametrize("names", ["kohya", "kohya-sd1", "kohya-original", "peft", "processor", "linear-layer"])
def test_names(model, names, tmp_path):
    if names == "kohya-original" and model.family != "xl":
        names = "kohya-sd1"
    alpha = None if names in ("processor", "linear-layer", "peft") else loras.ALPHA
    tensors, _ = make(model, names, alpha=alpha, only=READ_BY_DIFFUSERS[names])
    path = write(tmp_path, tensors)
    check(model, path, through_diffusers(model, path, 0.7), 0.7)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(model, kind, tmp_path):
    tensors, deltas = make(model, "kohya", kind)
    with loras.changed(model, lambda network, path, _: -0.6 * deltas[network, path]):
        wanted = model.theirs()
    check(model, write(tmp_path, tensors), wanted, -0.6)
