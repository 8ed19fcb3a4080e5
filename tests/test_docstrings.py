"""Examples in docstrings run, and show what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

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
    modules = {module_of(path) for path in FILES}
    attacks = {"pgd", "apgd", "fab", "square", "spsa", "carlini_wagner", "autoattack"}
    public = {"agr", "losses", "threat", "models", "interop", "diagnostics"}
    expected = {f"agr_jax.{name}" for name in public} | {f"agr_jax.attacks.{n}" for n in attacks}
    assert expected <= modules
