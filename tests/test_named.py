"""Attacks by name."""

import dataclasses
import json
import re

import pytest

from agr_jax import losses, methods
from agr_jax.attacks import APGD, FAB, FGSM, PGD, SPSA, AutoAttack, cw_l2, mim, named
from agr_jax.config import from_config_dict
from agr_jax.errors import ConfigError
from agr_jax.threat import L1, L2, Linf
from configs import digits_at

RADII = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}


def make(name, norm="linf"):
    return named.make(name, norm=norm, radii=RADII, step_size=2 / 255, batch_size=100)


def test_every_documented_name():
    assert make("clean") is None
    assert make("fgsm") == FGSM(Linf(8 / 255))
    assert make("ifgsm10").step_size == pytest.approx(8 / 2550)
    assert make("pgd20") == PGD(Linf(8 / 255), steps=20, step_size=2 / 255)
    assert make("pgd20x5") == PGD(Linf(8 / 255), steps=20, step_size=2 / 255, restarts=5)
    assert make("cw20") == PGD(Linf(8 / 255), steps=20, step_size=2 / 255, loss=losses.margin)
    assert make("pgd20@l2") == PGD(L2(0.5), steps=20)
    assert make("pgd20@l2", "l2") == PGD(L2(0.5), steps=20, step_size=2 / 255)
    assert make("pgd20@l1") == make("slide20@l1") == PGD(L1(12.0), steps=20)
    assert make("pgd20-dense@l1") == PGD(L1(12.0, sparsity=None), steps=20)
    assert make("pgd20x5-dense", "l1").threat.sparsity is None
    assert make("cw20-dense@l1=3") == PGD(L1(3.0, sparsity=None), steps=20, loss=losses.margin)
    assert make("pgd20@linf=16/255") == PGD(Linf(16 / 255), steps=20)
    assert make("pgd20@linf=8/255") == make("pgd20")
    assert make("autoattack@l2=0.25") == AutoAttack(L2(0.25), batch_size=100)
    assert make("fgsm@l1=1e1") == FGSM(L1(10.0))
    assert make("slide20@l1") == PGD(L1(12.0, sparsity=0.99), steps=20)
    assert make("mim10") == mim(Linf(8 / 255), steps=10)
    assert make("cw-l2@l2") == make("cw-l2", "l2") == cw_l2(L2(0.5))
    assert make("spsa") == SPSA(Linf(8 / 255))
    assert make("spsa10").steps == 10
    assert make("autoattack@l1") == AutoAttack(L1(12.0), batch_size=100)
    assert make("autoattack-plus").version == "plus"
    assert make("fast").version == "fast"
    assert make("fab-t").attacks == ("fab-t",)
    documented = set(re.findall(r"`([a-z0-9@<>-]+)`", named.__doc__))
    for name in documented - {"linf", "@linf", "@l2", "@l1", "table1", "table2"}:
        plain = name.replace("<n>", "20").replace("<r>", "5")
        only = "@l1" if plain.startswith("slide") or plain.endswith("-dense") else ""
        make(plain + ("@l2" if plain == "cw-l2" else only))
    assert len(documented) > 15


@pytest.mark.parametrize(
    "name",
    [
        "pgd",
        "pgd0",
        "pgd20x0",
        "pgd20@l3",
        "PGD20",
        "aa",
        "autoattack-rand",
        "",
        "slide20",
        "pgd20-dense",
        "slide20-dense@l1",
        "mim20-dense@l1",
        "fgsm-dense@l1",
        "ifgsm10x5",
        "mim10x5",
        "cw-l2",
        "cw-l2@l1",
        "pgd20@",
        "pgd20@linf=",
        "pgd20@linf=half",
        "pgd20@linf=1/0",
        "pgd20@linf=-1",
        "pgd20@linf=1e400",
        "pgd20@linf= 0.1",
        "pgd20@linf=0.1 ",
        "pgd20@=0.1",
        "pgd20=0.1",
    ],
)
def test_other_names_are_refused(name):
    with pytest.raises(ConfigError, match=r"config\.eval\.attacks"):
        make(name)


def test_tables_stand_for_their_columns():
    assert named.names(("table1", "pgd20", "table2")) == [
        *named.TABLES["table1"],
        *(name for name in named.TABLES["table2"] if name != "clean"),
    ]
    for name in named.names(("table1", "table2")):
        make(name)


@pytest.mark.parametrize("name", ["pgd20", "cw20", "fgsm", "ifgsm5", "mim5", "slide20", "spsa"])
def test_under_l1_a_name_means_what_it_means_in_python(name):
    """The ball of a table's attack is that of `pgd(L1(e))`, and of the training attack."""
    assert make(name, "l1").threat == make(f"{name}@l1").threat == L1(12.0)
    attack = dataclasses.replace(
        from_config_dict(digits_at.get_config()).attack, norm="l1", epsilon=12.0
    )
    assert methods.training_attack(attack).threat == L1(12.0)


def test_titles():
    titles = {
        "clean": "clean",
        "fgsm": "FGSM",
        "pgd20": "PGD-20",
        "pgd20x5": "PGD-20 x 5",
        "pgd20@l2": "PGD-20, L2",
        "pgd20-dense@l1": "PGD-20 dense, L1",
        "cw20x3-dense@l1=2": "CW-inf-20 x 3 dense, L1 2",
        "spsa10": "SPSA-10",
        "pgd20@linf=16/255": "PGD-20, Linf 16/255",
        "cw20": "CW-inf-20",
        "cw-l2@l2": "CW-L2",
        "mim10": "MIM-10",
        "autoattack": "AutoAttack",
        "autoattack-plus": "AutoAttack plus",
        "fast": "fast (not AutoAttack)",
        "apgd-ce": "APGD-CE",
        "spsa": "SPSA",
    }
    assert {name: named.title(name) for name in titles} == titles


@pytest.mark.parametrize(
    "attack", [None, make("pgd20"), make("spsa"), make("autoattack"), APGD(L1(1.0)), FAB(L2(1.0))]
)
def test_descriptions_are_json_without_addresses(attack):
    text = json.dumps(named.describe(attack))
    assert "0x" not in text
    if attack is not None:
        assert all(field.name in text for field in dataclasses.fields(attack))
