"""Describe a LoRA in the header of its file, as other programs read it.

Keys that begin with "ss_" are those of kohya's scripts: AUTOMATIC1111's web UI finds the family of models, the name of
the LoRA and its tags there. "modelspec." is the model metadata specification 1.0.1 of Stability AI. There are no dates:
the same training writes the same file.
"""

import json
from collections import Counter
from collections.abc import Iterable

from .delta import rank_of
from .layers import AttachedLoRA

_FAMILIES = {  # width of the encoded prompt, predicts v: names in kohya's scripts and in the specification
    (768, False): ("sd_v1", "stable-diffusion-v1"),
    (768, True): ("sd_v1_v", "stable-diffusion-v1"),
    (1024, False): ("sd_v2", "stable-diffusion-v2-512"),
    (1024, True): ("sd_v2_v", "stable-diffusion-v2-768-v"),
    (2048, False): ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    (2048, True): ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}


def describe(
    lora: AttachedLoRA | None,
    context_width: int,
    prediction: str,
    *,
    resolution: int,
    title: str,
    trigger: str | None = None,
    captions: Iterable[tuple[str, str]] = (),
) -> dict[str, str]:
    """Return the texts in the header of a LoRA's file.

    Args:
        lora: two factors for each layer, as :func:`stable_diffusion.lora.create.new_lora` makes them; None for a
            textual inversion.
        context_width: of the encoded prompt, by which families of models differ.
        prediction: "epsilon" or "v_prediction", of the model.
        resolution: side in pixels of a square with the area of the pictures.
        title: a name for the LoRA.
        trigger: the word that a prompt needs.
        captions: (folder, caption) of each picture. Their parts between commas are counted as tags.
    """
    is_v = prediction == "v_prediction"
    version, architecture = _FAMILIES.get((context_width, is_v), ("unknown", "unknown"))
    texts = ({} if lora is None else _network_texts(lora)) | {
        "ss_output_name": title,
        "ss_base_model_version": version,
        "ss_v2": str(version.startswith("sd_v2")),
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_tag_frequency": json.dumps(_tag_counts(captions)),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/{'textual-inversion' if lora is None else 'lora'}",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": "v" if is_v else "epsilon",
    }
    return texts | ({"modelspec.trigger_phrase": trigger} if trigger else {})


def _network_texts(lora: AttachedLoRA) -> dict[str, str]:
    """Return what describes the factors: the UNet's ranks and alphas, and LyCORIS as the module of a DoRA."""
    deltas = [delta for delta in lora.deltas if delta.network == "unet"] or lora.deltas
    pairs = {}
    for kind, axes in (("network", 2), ("conv", 4)):
        found = next((delta for delta in deltas if delta["down"].ndim == axes), None)
        if found is not None:
            rank = rank_of(found)
            pairs |= {f"{kind}_dim": rank, f"{kind}_alpha": f"{found.multiplier * rank:g}"}
    is_dora = any("dora_scale" in delta for delta in deltas)
    arguments = {"algo": "lora", "dora_wd": "True"} if is_dora else {}
    arguments |= {name: str(pairs.pop(name)) for name in ("conv_dim", "conv_alpha") if name in pairs}
    texts = {"ss_network_module": "lycoris.kohya" if is_dora else "networks.lora"}
    texts |= {f"ss_{name}": str(value) for name, value in pairs.items()}
    return texts | ({"ss_network_args": json.dumps(arguments)} if arguments else {})


def _tag_counts(captions: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Return {folder: {tag: number of pictures with it}}, the most common first."""
    counts: dict[str, Counter[str]] = {}
    for folder, caption in captions:
        tags = [tag.strip().lower() for tag in caption.split(",")]
        counts.setdefault(folder, Counter()).update(filter(None, tags))
    return {folder: dict(tags.most_common()) for folder, tags in counts.items()}
