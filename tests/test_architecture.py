"""The map of the package: a module imports only from modules above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the bottom of the house to the top: each entry may import the ones before it, and itself.
ORDER = [
    "errors",
    "combination",
    "agr",
    "losses",
    "selection",
    "threat",
    "fields",
    "config",
    "own_code",
    "mesh",
    "metrics",
    "diagnostics",
    "checkpoints",
    "models",
    "torch_names",
    "weight_files",
    "interop",
    "attacks",
    "methods",
    "data",
    "optim",
    "run_folder",
    "image_masks",
    "network",
    "evaluation_records",
    "evaluate",
    "interruption",
    "train_step",
    "batch_picture",
    "run_log",
    "resume",
    "train",
    "measure",
    "sweep",
    "report",
    "jobs",
]


def imported_modules(path: Path) -> set[str]:
    """Names of the package's own modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("agr_jax"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("agr_jax.")
            }
    return found


def test_every_module_has_a_place():
    modules = {path.stem for path in (ROOT / "agr_jax").glob("*.py")} - {"__init__"}
    packages = {path.parent.name for path in (ROOT / "agr_jax").glob("*/__init__.py")}
    assert modules | packages == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_only_from_above(name):
    single = ROOT / "agr_jax" / f"{name}.py"
    files = [single] if single.exists() else sorted((ROOT / "agr_jax" / name).glob("*.py"))
    allowed = set(ORDER[: ORDER.index(name) + 1])
    for path in files:
        assert imported_modules(path) & set(ORDER) <= allowed, path


def test_attacks_know_nothing_of_flax():
    for path in sorted((ROOT / "agr_jax" / "attacks").glob("*.py")):
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
