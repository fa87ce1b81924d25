"""A LoRA that is written comes back the same, and diffusers with peft reads it."""

import mlx.core as mx
import numpy as np
import pytest

import loras
from loras import KINDS, few, make, write
from oracle import relative_error
from stable_diffusion.lora.files import read_lora
from stable_diffusion.lora.layers import attach
from stable_diffusion.lora.save import write_lora


def rewrite(model, source, target, **options):
    """Write a LoRA that was read."""
    attached = attach(model.networks, read_lora(source))
    write_lora(target, model.networks, attached, **options)
    attached.detach()
    assert [path.name for path in target.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("kind, dora", [*((kind, None) for kind in KINDS), ("lora", "rows")])
def test_kohya_names_there_and_back(model, kind, dora, tmp_path):
    """The names are those that kohya's own trainer writes for the family."""
    tensors, _ = make(model, "kohya-original" if model.family == "xl" else "kohya-sd1", kind, dora=dora)
    source = write(tmp_path, tensors)
    rewrite(model, source, tmp_path / "written.safetensors")
    again = mx.load(str(tmp_path / "written.safetensors"))
    assert again.keys() == {name for name in tensors if kind not in ("lokr", "diff") or not name.endswith("alpha")}
    for name, value in again.items():
        ours, theirs = np.array(value), tensors[name].numpy()
        assert ours.shape == theirs.shape and relative_error(ours, theirs) <= 1e-6, name


# diffusers leaves DoRA's lengths out of kohya's files, and transformers those of text encoders out of any.
@pytest.mark.parametrize("naming, dora", [("kohya", None), ("peft", None), ("peft", "rows")])
def test_diffusers_reads_what_is_written(model, naming, dora, tmp_path):
    tensors, _ = make(model, dora=dora, only=lambda n, path: few(n, path) and not (dora and n != "unet"))
    for name in [name for name in tensors if "proj_in.lora_" in name]:  # as a Linear here has them when it is trained
        tensors[name] = tensors[name].reshape(tensors[name].shape[:2])
    source = write(tmp_path, tensors)
    with loras.attached(model, source):
        wanted = model.ours()
    rewrite(model, source, tmp_path / "written.safetensors", naming=naming)
    theirs = loras.through_diffusers(model, tmp_path / "written.safetensors")
    for name, value in wanted.items():
        assert relative_error(theirs[name], value) <= 1e-4, name


def test_what_is_written_beside_the_factors(model, tmp_path):
    texts = {"ss_network_module": "networks.lora", "modelspec.title": "Red things"}
    target = tmp_path / "written.safetensors"
    rewrite(model, write(tmp_path, make(model, "peft")[0]), target, dtype=mx.float16, metadata=texts)
    assert read_lora(target).metadata == {"format": "pt", **texts}
    assert {value.dtype for value in mx.load(str(target)).values()} == {mx.float16}


def test_peft_has_no_names_for_other_kinds(model, tmp_path):
    target = tmp_path / "written.safetensors"
    for kind, dora, what in (("loha", None, "hada_w1_a"), ("lora", "columns", "column norms")):
        tensors, _ = make(model, kind=kind, dora=dora)
        attached = attach(model.networks, read_lora(write(tmp_path, tensors)))
        with pytest.raises(ValueError, match=f"peft has no name for .*{what}.*choose the kohya naming") as error:
            write_lora(target, model.networks, attached, naming="peft")
        attached.detach()
        assert "\n" not in str(error.value) and not target.exists()


def test_only_the_lora_that_is_named_is_written(model, tmp_path):
    files = [
        write(tmp_path, make(model, "kohya-sd1", kind, seed=seed)[0], f"{kind}.safetensors")
        for seed, kind in enumerate(("lora", "loha"))
    ]
    attached = [attach(model.networks, read_lora(file)) for file in files]
    for lora, source in zip(attached, files, strict=True):
        write_lora(tmp_path / "written.safetensors", model.networks, lora)
        ours, theirs = (read_lora(path).deltas for path in (tmp_path / "written.safetensors", source))
        assert len(ours) == len(theirs) and {frozenset(d) for d in ours} == {frozenset(d) for d in theirs}
    for lora in attached:
        lora.detach()
