"""The diffusers layout of a checkpoint: which components a pipeline has, and which files hold them.

    model_index.json
    scheduler/scheduler_config.json
    unet/, vae/, text_encoder/, text_encoder_2/    config.json and weights: safetensors or pickles, perhaps of two
                                                   precisions, or in shards
    tokenizer/, tokenizer_2/                       vocab.json and merges.txt, or tokenizer.json; special tokens

`model_index.json` decides. Files are named relative to the checkpoint, as on the Hub: "unet/config.json". A part that
is published alone has its files in the root of its repository, or in a folder of its own as here.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
SUFFIXES = (".safetensors", *PICKLES)  # of files of weights

# Pipelines with just the networks below. ControlNet and others have more, upscalers and SD 3 have different ones.
_PIPELINES = {
    *(
        f"{family}{mode}Pipeline"
        for family in ("StableDiffusion", "StableDiffusionXL")
        for mode in ("", "Img2Img", "Inpaint", "InstructPix2Pix")
    ),
    "StableDiffusionInpaintPipelineLegacy",
    "StableDiffusionDepth2ImgPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
}
_CLIP = ("CLIPTextModel", "CLIPTextModelWithProjection")
_NETWORKS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": _CLIP,
    "text_encoder_2": _CLIP,
}
_TOKENIZER_OF = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
_FROM_TRANSFORMERS = (*_TOKENIZER_OF, "depth_estimator")  # that library has its own names for weight files
_TOKENIZER_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
_VOCABULARY = ("vocab.json", "merges.txt")
_SPECIAL_TOKENS = ("special_tokens_map.json", "tokenizer_config.json")  # not in every repository


def parts(index: dict, where: str, without: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """The networks and the tokenizers that a model_index.json names; all else in it (a safety checker...) is not used.

    Args:
        index: the contents of model_index.json; an entry is [library, class], or [null, null] for a part left out.
        where: the checkpoint's name, for messages.
        without: networks that come from elsewhere: they may be missing or of any class, and are not among the result.

    Raises:
        ValueError: the pipeline or the class of a part is not one that this library runs, or a part is missing.
    """
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in _PIPELINES:
        raise ValueError(
            f"{where} is a {pipeline}, which is not supported: "
            "this library runs Stable Diffusion 1, 2 and XL pipelines and latent consistency models"
        )
    tokenizers = dict.fromkeys(_TOKENIZER_OF.values(), _TOKENIZER_CLASSES)
    found = []
    for part, classes in {**_NETWORKS, **tokenizers, "scheduler": ()}.items():
        entry = index.get(part)
        if part in without or not isinstance(entry, list) or not entry or entry[-1] is None:
            continue
        if classes and entry[-1] not in classes:
            raise ValueError(f"{where} has a {part} of class {entry[-1]}; supported is {' or '.join(classes)}")
        found.append(part)
    read_by_encoders = [t for encoder, t in _TOKENIZER_OF.items() if encoder in found or encoder in without]
    for part in ["unet", "vae", "scheduler", *(read_by_encoders or ["text_encoder"])]:
        if part not in found and part not in without:
            raise ValueError(f"{where} is not complete: its {INDEX} names no {part}")
    return [part for part in found if part in _NETWORKS], read_by_encoders


def weight_choices(network: str, float16: bool, place: str | None = None) -> Iterator[str]:
    """The files that may hold a network's weights, or the index of its shards, the best choice first.

    Safetensors of either precision come before pickles. ``place`` is "unet/" for a UNet, or "" for a root.
    """
    place = f"{network}/" if place is None else place
    ours, others = ("model", "diffusion_pytorch_model")[:: 1 if network in _FROM_TRANSFORMERS else -1]
    for suffix in (".safetensors", ".bin"):
        for half in (".fp16", "") if float16 else ("", ".fp16"):
            for stem in (ours, others):
                stem = "pytorch_model" if (stem, suffix) == ("model", ".bin") else stem
                yield f"{place}{stem}{half}{suffix}"
                yield f"{place}{stem}{suffix}.index{half}.json"


def weight_files(
    folder: Path, network: str, names: set[str], float16: bool, where: str, place: str | None = None
) -> list[str]:
    """The files to read for a network, out of the `names` of all files of its checkpoint.

    Raises:
        ValueError: there are none, or the index of its shards (which must be in `folder`) is damaged.
    """
    chosen = _weights_or_index(network, names, float16, where, place)
    if not chosen.endswith(".json"):
        return [chosen]
    suffix = ".bin" if ".bin." in chosen else ".safetensors"
    shards = read_json(folder / chosen).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise damaged(folder / chosen, "it has no weight_map")
    for shard in shards.values():
        # The index comes from outside: it may name files beside itself and nothing else.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(suffix):
            raise ValueError(f"{folder / chosen} names {shard!r}, which is not a {suffix[1:]} file beside it")
    return [f"{chosen.rpartition('/')[0]}/{shard}".removeprefix("/") for shard in sorted(set(shards.values()))]


def _weights_or_index(network: str, names: set[str], float16: bool, where: str, place: str | None = None) -> str:
    for choice in weight_choices(network, float16, place):
        if choice in names:
            return choice
    raise ValueError(f"{where} is not complete: {next(weight_choices(network, False, place))} is missing")


def lacking(folder: Path, names: set[str], float16: bool, where: str, without: Collection[str] = ()) -> list[str]:
    """The files that `folder` lacks of those this library needs: the small ones, or if these are there, the weights.

    Args:
        folder: a checkpoint, or the part of it that is on this machine; its model_index.json must be there.
        names: all files of the whole checkpoint.
        without: networks that come from elsewhere.

    Raises:
        ValueError: the checkpoint is not supported, or has no weights to choose from.
    """
    networks, tokenizers = parts(read_json(folder / INDEX), where, without)
    small = [INDEX, SCHEDULER, *(f"{network}/config.json" for network in networks)]
    for tokenizer in tokenizers:
        # transformers 5 writes the vocabulary as tokenizer.json alone.
        single = f"{tokenizer}/{_VOCABULARY[0]}" not in names and f"{tokenizer}/tokenizer.json" in names
        small += [f"{tokenizer}/{file}" for file in (("tokenizer.json",) if single else _VOCABULARY)]
        small += [f"{tokenizer}/{file}" for file in _SPECIAL_TOKENS if f"{tokenizer}/{file}" in names]
    chosen = [_weights_or_index(network, names, float16, where) for network in networks]
    small += [file for file in chosen if file.endswith(".json")]
    if missing := [file for file in small if not (folder / file).is_file()]:
        return missing
    weights = (file for network in networks for file in weight_files(folder, network, names, float16, where))
    return [file for file in weights if not (folder / file).is_file()]


def place_of(kind: str, names: Collection[str]) -> str | None:
    """Where a repository with these files has a part: "unet/" or "" for its root; None when it has none."""
    return next((place for place in (f"{kind}/", "") if f"{place}config.json" in names), None)


def lacking_of_part(folder: Path, names: set[str], kind: str, float16: bool, where: str) -> list[str]:
    """The same as `lacking` for one part, which is all that is wanted of a repository. `place_of` must know it."""
    place = place_of(kind, names)
    chosen = _weights_or_index(kind, names, float16, where, place)
    small = [f"{place}config.json", *([chosen] if chosen.endswith(".json") else [])]
    if missing := [file for file in small if not (folder / file).is_file()]:
        return missing
    files = weight_files(folder, kind, names, float16, where, place)
    return [file for file in files if not (folder / file).is_file()]


def assumed_names(float16: bool) -> set[str]:
    """The files that a repository at best has: where these are at hand, no listing could offer better ones."""
    weights = {next(weight_choices(network, float16)) for network in _NETWORKS}
    return weights | {f"{tokenizer}/{file}" for tokenizer in _TOKENIZER_OF.values() for file in _SPECIAL_TOKENS}


def files_in(folder: Path) -> set[str]:
    """The names of a checkpoint folder's files; a link to nothing is not one."""
    return {path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("*/*")) if path.is_file()}


def read_json(path: Path) -> dict:
    """A JSON file whose value is an object. Raises ValueError when it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise damaged(path, "not a JSON object")
    return value


def damaged(path: Path, reason: str) -> ValueError:
    """The one-line error for a file that cannot be read. In the Hub's cache it is a link: say what to delete."""
    return ValueError(f"{path} is damaged ({reason}): delete {path.resolve()} and get it again")
