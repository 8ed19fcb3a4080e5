"""`docs/profiles.md` says what the configs do, field by field."""

import ast
import re
from pathlib import Path

import pytest

from agr_jax.config import differences, from_config_dict, to_dict
from configs import base

ROOT = Path(__file__).resolve().parents[1]
TITLES = {
    "at": "All methods",
    "trades": "TRADES",
    "mart": "MART",
    "awp": "AWP",
    "avmixup": "AVmixup",
    "standard": "Standard training",
}


def sections() -> dict[str, str]:
    parts = re.split(r"^## (.+)$", (ROOT / "docs" / "profiles.md").read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(section: str) -> dict[str, tuple]:
    """`{field: (paper, official, best)}` of a section's table."""
    found = re.findall(r"^\| `([\w.]+)` \| `(.+?)` \| `(.+?)` \| `(.+?)` \|", section, re.MULTILINE)
    return {field: tuple(ast.literal_eval(v) for v in values) for field, *values in found}


def value(config: dict, field: str):
    for part in field.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize("method", TITLES)
def test_tables_are_the_configs(method):
    profiles = [to_dict(from_config_dict(base.recipe("cifar10", method, p))) for p in base.PROFILES]
    text = sections()
    said = rows(text["All methods"]) | rows(text[TITLES[method]])
    assert said
    for field, values in said.items():
        assert values == tuple(value(profile, field) for profile in profiles), field
    differing = {
        name.removeprefix("config.")
        for other in profiles[1:]
        for name in differences(profiles[0], other)
    }
    assert differing - {"profile"} <= said.keys()


def test_every_unstated_value_is_listed():
    source = (ROOT / "configs" / "base.py").read_text()
    marked = re.findall(r'(?:"(\w+)":|config\.\w+\.(\w+) =).*# unstated in the paper', source)
    marked += re.findall(r'^ +# .*unstated in the paper.*\n +"(\w+)"()', source, re.MULTILINE)
    names = {name or other for name, other in marked}
    assert {"batch_size", "clip_norm", "mean", "image_size", "mart"} <= names
    page = sections()["What the paper leaves unstated"]
    assert not {name for name in names if not re.search(rf"`[\w.]*\b{name}\b", page)}
