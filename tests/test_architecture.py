"""The map of the package: a module imports only from modules above it."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from agr_jax.config import settings
from agr_jax.data.sources import TITLES
from agr_jax.methods import METHODS
from agr_jax.threat import NORMS

ROOT = Path(__file__).resolve().parents[1]

# From the bottom of the house to the top: each entry may import the ones before it, and itself.
ORDER = [
    "errors",
    "distributed",
    "ranges",
    "order_statistics",
    "losses",
    "threat",
    "agr",
    "config",
    "sharding",
    "files",
    "progress",
    "journal",
    "diagnostics",
    "models",
    "interop",
    "attacks",
    "methods",
    "data",
    "runs",
    "evaluation",
    "training",
    "measure",
    "report",
    "jobs",
]
PACKAGE = ROOT / "agr_jax"
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports_of(module: str) -> set[str]:
    """Modules of the package that a module imports, wherever in the file, for types too."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "agr_jax":
            assert node.level == 0, f"{module}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in FILES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("agr_jax")}
    return found


IMPORTS = {module: imports_of(module) for module in FILES}


def entry_of(module: str) -> str:
    """The entry of `ORDER` that a module belongs to; empty for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def test_every_module_has_a_place():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert modules | packages == set(ORDER)
    assert len(modules) <= 10


@pytest.mark.parametrize("name", ORDER)
def test_imports_only_from_above(name):
    allowed = {"", *ORDER[: ORDER.index(name) + 1]}
    for module in FILES:
        if entry_of(module) == name:
            assert {entry_of(imported) for imported in IMPORTS[module]} <= allowed, module


def test_there_is_no_circle():
    """Between modules, within packages too: a package's face counts as what it imports."""
    left = {module: set(imported) for module, imported in IMPORTS.items()}
    # The package's own face has what is below everything: it is imported for its version alone.
    for imported in left.values():
        imported.discard("agr_jax")
    while free := [module for module, imported in left.items() if not imported & left.keys()]:
        for module in free:
            del left[module]
    assert not left


def test_no_public_name_hides_a_module():
    """`import agr_jax.attacks.x as m` gives the module x, or there is none."""
    for module, path in FILES.items():
        if path.name != "__init__.py":
            continue
        names = vars(importlib.import_module(module))
        for inner in (m for m in FILES if m.rpartition(".")[0] == module):
            found = names.get(inner.rpartition(".")[2])
            assert found is None or found is importlib.import_module(inner), inner


def test_names_in_configs_are_those_of_what_is_there():
    assert set(settings.METHODS) == set(METHODS)
    assert set(settings.DATA_SETS) == set(TITLES)
    assert set(NORMS) == set(settings.NORMS)


def test_attacks_know_nothing_of_flax():
    for path in sorted((PACKAGE / "attacks").rglob("*.py")):
        assert "flax" not in path.read_text()


def test_transform_and_attacks_need_only_jax_and_optax():
    blocked = ["flax", "orbax", "ml_collections", "PIL", "sklearn", "tqdm", "chex"]
    program = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None
from agr_jax import agr_transform
from agr_jax.attacks import pgd
from agr_jax.threat import Linf
import agr_jax.losses
agr_transform(), pgd(Linf(8 / 255))
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, cwd=ROOT)


def test_no_room_without_a_subject():
    names = {path.stem for path in (ROOT / "agr_jax").rglob("*.py")}
    assert not names & {"utils", "helpers", "common", "misc", "manager"}


def test_launch_is_short():
    assert len((ROOT / "launch.py").read_text().splitlines()) < 80
