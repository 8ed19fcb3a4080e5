"""Examples in docstrings run, and show what they say."""

import dataclasses
import doctest
import importlib
from pathlib import Path

import pytest

from agr_jax import attacks as attacks_face

PACKAGE = Path(__file__).resolve().parents[1] / "agr_jax"
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text()]


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@pytest.mark.parametrize("name", [module_of(path) for path in FILES])
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted >= 1
    assert result.failed == 0


def test_what_users_import_has_an_example():
    """A class or a module that README names shows how it is used."""
    modules = {module_of(path) for path in FILES}
    attacks = {type_.__module__ for type_ in vars(attacks_face).values() if is_an_attack(type_)}
    public = {
        "agr._transform",
        "losses",
        "threat",
        "models",
        "interop.torch_weights",
        "diagnostics",
    }
    expected = {f"agr_jax.{name}" for name in public} | attacks
    assert expected <= modules


def is_an_attack(value):
    return isinstance(value, type) and dataclasses.is_dataclass(value) and "threat" in fields(value)


def fields(value):
    return {field.name for field in dataclasses.fields(value)}
