"""The floors of the package: a file imports only from lower ones, and each third-party package has one home."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "stable_diffusion"

# From the ground up; what stands in one line knows nothing of each other.
_FLOORS = [
    "version blas config catalog curves samplers prompt wildcards tokenizer image edges lists plots fingerprints",
    "schedule parser values infotext inpaint lanes models.kernels models.token_merging",
    "records weights.layout weights.keys weights.original weights.shapes weights.quantize",
    "models.layers",
    "models.clip models.unet models.vae models.taesd models.bit weights.lora_keys weights.archive weights.torch_names",
    "models.controlnet models.dpt weights.single_file weights.hub weights.unpickle",
    "weights.pickles",
    "weights.files",
    "weights.load weights.embeddings weights.lora conditioning",
    "weights.adapters weights.save depth guidance tiling deep_cache flags",
    "control",
    "denoise",
    "plan",
    "start",
    "sampling networks memory",
    "model",
    "pipeline arguments progress",
    "batches jobs budget preview interrupts outputs",
    "runs metadata",
    "results",
    "__init__ cli convert inspect",
    "completion",
    "__main__",
]
FLOOR = {name: floor for floor, names in enumerate(_FLOORS) for name in names.split()}
HOMES = {
    "huggingface_hub": {"weights.hub"},
    "regex": {"tokenizer"},
    "numpy": {"image", "edges", "inpaint", "depth"},
    "PIL": {"image", "plots", "inpaint", "depth", "batches", "preview", "outputs", "results"},
    "tqdm": {"progress"},
}
# batches, preview, outputs and results name PIL's Image in their type hints. Of the ground floor only the samplers know
# arrays.
WITHOUT_MLX = {
    "version",
    "config",
    "catalog",
    "curves",
    "schedule",
    "prompt",
    "wildcards",
    "tokenizer",
    "image",
    "edges",
    "lists",
    "plots",
}

FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.parent == PACKAGE or p.name != "__init__.py"]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path: Path) -> tuple[set[str], set[str]]:
    """(modules of ours, top-level names of other packages) that a file imports, wherever in it."""
    ours, others = set(), set()
    package = name_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            module = [*base, *(node.module.split(".") if node.module else [])]
            names = [[*module, alias.name] for alias in node.names]
            ours |= {".".join(n if ".".join(n) in FLOOR else module) for n in names}
    return ours, others


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_only_from_lower_floors(path):
    name = name_of(path)
    assert name in FLOOR, f"{name} has no floor: give it one here and in the architecture"
    ours, others = imports(path)
    assert ours <= FLOOR.keys()
    for other in ours:
        assert FLOOR[other] < FLOOR[name], f"{name} imports {other}"
    for package, homes in HOMES.items():
        assert package not in others or name in homes, f"{package} is imported in {name}"
    assert "mlx" not in others or name not in WITHOUT_MLX


def test_the_check_sees_imports():
    ours, others = imports(PACKAGE / "pipeline.py")
    assert {"conditioning", "plan", "start", "sampling"} <= ours and "mlx" in others


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_outgrows_a_chapter(path):
    limit = 600 if path.name == "samplers.py" else 450  # eighteen algorithms, to be read side by side
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit
