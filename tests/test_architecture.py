"""The shape of the code: layers, fences, file length, packaging, and a map that knows every module."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest

from dnc_dist import rundir
from dnc_dist.config import load_config

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dnc_dist"
KERNELS = ROOT / "kernels" / "dnc_kernels"

# A module imports from lower layers and, inside a sub-package, from its siblings; entries of one layer do not import each other.
LAYERS = [
    {"base"},
    {"config"},
    {"keys"},
    {"processes"},
    {"rundir"},
    {"data", "model", "loss", "clustering", "retrieval"},
    {"engine", "divider"},
    {"embedder"},
    {"report", "inference"},
    {"trackers"},
    {"doctor"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
# Third-party module -> where it may be imported (a module or a whole sub-package).
FENCES = {
    "deepspeed": {"dnc_dist.engine.zero"},
    "wandb": {"dnc_dist.trackers.wandb"},
    "tensorboard": {"dnc_dist.trackers.tensorboard"},
    "webdataset": {"dnc_dist.data"},
    "requests": {"dnc_dist.data.remote"},
    "urllib3": {"dnc_dist.data.remote"},
    "click": {"dnc_dist.cli", "dnc_dist.commands"},
    "timm": {"dnc_dist.model.backbone"},
    "faiss": {"dnc_dist.clustering", "dnc_dist.retrieval", "dnc_dist.inference"},
    "pyarrow": {"dnc_dist.inference", "dnc_dist.data.pixels"},
    "simplejpeg": {"dnc_dist.data.images"},
    "onnxruntime": {"dnc_dist.inference"},
    "dnc_kernels": {"dnc_dist.loss", "dnc_dist.clustering", "dnc_dist.engine", "dnc_dist.divider", "dnc_dist.doctor", "dnc_kernels"},
    "triton": {"dnc_kernels"},
    "pydantic": {
        *(f"dnc_dist.base.{part}" for part in ("foreign", "matlab", "parts", "part_text", "choice")),
        *(f"dnc_dist.{part}" for part in ("config", "loss", "data", "model", "retrieval", "rundir")),
    },
    "pydantic_core": {"dnc_dist.base.choice"},
}
# Attributes of DeepSpeed's engine and optimizers that only the owner of its layouts may know.
ITS_OWN = {"zero_optimization_stage", "bit16_groups", "overflow", "checkpoint_engine", "save_checkpoint"}
# Values that the configuration owns are handed down; of the packages below the engine none reads the configuration.
CONFIG_READERS = {"processes", "rundir", "engine", "embedder", "report", "inference", "doctor", "commands", "cli", "keys"}
LONGEST = 300


def modules() -> dict[str, Path]:
    files = [*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")]
    bases = {PACKAGE: "dnc_dist", KERNELS: "dnc_kernels"}
    names = {}
    for file in files:
        base = PACKAGE if file.is_relative_to(PACKAGE) else KERNELS
        parts = [bases[base], *file.relative_to(base).with_suffix("").parts]
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return dict(sorted(names.items()))


MODULES = modules()


def imports(file: Path) -> set[str]:
    """Absolute names of all modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import; write the full name"
            assert node.module is not None
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in MODULES}
    return names


def inside(module: str, places: set[str]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def layer(part: str) -> int:
    numbers = [number for number, parts in enumerate(LAYERS) if part in parts]
    assert numbers, f"dnc_dist.{part} is in no layer; add it to LAYERS"
    return numbers[0]


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("dnc_dist.")])
def test_layers(module: str) -> None:
    part = module.split(".")[1]
    for imported in imports(MODULES[module]):
        if not imported.startswith("dnc_dist."):
            continue
        other = imported.split(".")[1]
        if other == "__version__" or other == part:
            continue
        assert layer(other) < layer(part), f"{module} must not import {imported}"
        assert other != "config" or part in CONFIG_READERS, f"{module} reads the configuration; it should be given plain values"


def test_no_circle() -> None:
    """No module imports itself by way of others."""
    left = {name: imports(file) & MODULES.keys() - {name, name.rpartition(".")[0], "dnc_dist"} for name, file in MODULES.items()}
    while free := {name for name, wanted in left.items() if not wanted & left.keys()}:
        left = {name: wanted for name, wanted in left.items() if name not in free}
    assert left == {}


@pytest.mark.parametrize("module", list(MODULES))
def test_fences(module: str) -> None:
    for imported in imports(MODULES[module]):
        places = FENCES.get(imported.split(".")[0])
        assert places is None or inside(module, places), f"{module} must not import {imported}; only {', '.join(sorted(places or []))} may"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("dnc_dist.") and not inside(name, FENCES["deepspeed"])])
def test_no_other_module_looks_into_deepspeed(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    assert {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & ITS_OWN == set()


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("dnc_kernels")])
def test_the_kernels_need_torch_only(module: str) -> None:
    allowed = {"torch", "triton", "dnc_kernels", *sys.stdlib_module_names}
    assert {imported.split(".")[0] for imported in imports(MODULES[module])} <= allowed


@pytest.mark.parametrize("module", list(MODULES))
def test_length_name_and_docstring(module: str) -> None:
    file = MODULES[module]
    text = file.read_text(encoding="utf-8")
    length = len(text.splitlines())
    assert length <= LONGEST, f"{module} has {length} lines; split it"
    assert module.split(".")[-1] != "utils", "name a module after what it is for"
    if text.strip():
        tree = ast.parse(text)
        assert ast.get_docstring(tree), f"{module} has no docstring"
        future = "from __future__ import annotations"
        assert future in text or file.name == "__init__.py", f"{module} lacks `{future}`"


def test_the_names_in_a_run_directory_stand_in_one_place() -> None:
    names = {name for key, name in vars(rundir).items() if key.isupper()}
    assert len(names) > 6
    for module, file in MODULES.items():
        if module != "dnc_dist.rundir" and not module.startswith("dnc_dist.data"):  # a prepared data set is another folder
            texts = {node.value for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Constant)}
            # torch's own cache has a folder of that name, too.
            left = (texts & names) - ({"checkpoints"} if module == "dnc_dist.model.pretrained" else set())
            assert not left, f"{module} writes {left}; take the name from dnc_dist.rundir"


def test_a_package_called_kernels_is_never_shadowed() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()
    ours = {name for name, owners in importlib.metadata.packages_distributions().items() if "dnc-dist" in owners}
    # An editable installation has a finder module of its own besides the two packages.
    assert {name for name in ours if not name.startswith("__editable__")} == {"dnc_dist", "dnc_kernels"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_loads(path: Path) -> None:
    load_config(path)


def test_the_map_of_the_code_knows_every_module() -> None:
    page = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
    names = [path.name for path in sorted(PACKAGE.glob("*.py")) if path.stem not in ("__init__", "__main__")]
    names += [f"{path.parent.name}/" for path in sorted(PACKAGE.glob("*/__init__.py"))]
    assert [name for name in names if name not in page] == []
