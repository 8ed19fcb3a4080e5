"""Every method on digits, from its config file as it is: it learns, and what it learns is robust.

PGD-20 of radius 0.15, seed 0. Digits are a smoke test: no ranking of methods follows from it.
"""

import importlib
import json

import pytest

from agr_jax import train
from agr_jax.config import from_config_dict
from agr_jax.metrics import read_json_lines

pytestmark = pytest.mark.slow

# What each method lowers: its own loss, except for two. MART's divergence is 0 for an untrained
# network and must rise; AVmixup's soft labels have an entropy, below which its loss cannot fall.
OWN_LOSS = {
    "at": "adversarial_loss",
    "trades": "adversarial_loss",
    "mart": "mart_bce",
    "awp": "adversarial_loss",
    "avmixup": "avmixup_kl",
}


def trained(folder, method, **agr):
    """Accuracies of the last checkpoint on the test set, and the records of all epochs."""
    values = importlib.import_module(f"configs.digits_{method}").get_config("paper")
    values.agr.update(agr)
    assert train.run(from_config_dict(values), folder) == 0
    row = json.loads((folder / "evaluations" / "last.json").read_text())
    assert (row["epoch"], row["seed"], row["examples"]) == (40, 0, 355)
    assert row["complete_data"]
    records = read_json_lines(folder / "metrics.jsonl")
    assert len(records) == 40
    accuracy = {name: attack["accuracy"] for name, attack in row["attacks"].items()}
    print(method, agr, accuracy)
    return accuracy, records


def assert_halved(records, name):
    first, last = records[0][name], records[-1][name]
    print(name, first, last)
    assert last < first / 2


@pytest.mark.parametrize("agr", [True, False], ids=["agr", "baseline"])
@pytest.mark.parametrize("method", OWN_LOSS)
def test_an_adversarial_method_is_robust(tmp_path, method, agr):
    accuracy, records = trained(tmp_path / "run", method, enabled=agr)
    assert ("cosine" in records[0]) == agr
    assert accuracy["pgd20"] >= 0.50
    assert accuracy["clean"] >= accuracy["fgsm"] >= accuracy["pgd20"]
    assert_halved(records, OWN_LOSS[method])


def test_standard_training_is_accurate_and_not_robust(tmp_path):
    accuracy, records = trained(tmp_path / "run", "standard")
    assert accuracy["clean"] >= 0.95
    assert accuracy["pgd20"] < 0.25
    assert_halved(records, "adversarial_loss")
