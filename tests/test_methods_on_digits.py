"""Every method on digits, from its config file as it is: it learns, and what it learns is robust.

PGD-20 of radius 0.15, seed 0. Digits are a smoke test: no ranking of methods follows from it.
"""

import importlib
import json
import os

import pytest

from agr_jax.config import from_config_dict
from agr_jax.files import read_json_lines
from agr_jax.training import train_run

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


BRANCH_EPOCH = 30
# All methods take a quarter of an hour; each step of theirs is tested in test_methods.py too.
LONG = bool(os.environ.get("AGR_JAX_LONG"))


def trained(folder, method, base=None, epochs=40):
    """Accuracies of the last checkpoint on the test set, and the records of the run's epochs."""
    values = importlib.import_module(f"configs.digits_{method}").get_config("paper")
    values.agr.enabled = base is not None
    values.init_from = str(base or "")
    values.epochs = epochs
    # To be quick: neither is what is tested here.
    values.checkpoints.every_epochs = values.eval.every_epochs = 10
    values.checkpoints.keep_epochs = (BRANCH_EPOCH,)
    assert train_run(from_config_dict(values), folder) == 0
    row = json.loads((folder / "evaluations" / "last.json").read_text())
    assert (row["epoch"], row["seed"], row["examples"]) == (epochs, 0, 355)
    assert row["complete_data"]
    records = read_json_lines(folder / "metrics.jsonl")
    assert len(records) == (epochs - BRANCH_EPOCH if base else epochs)
    accuracy = {name: attack["accuracy"] for name, attack in row["attacks"].items()}
    print(method, base, accuracy)
    return accuracy, records


def assert_halved(first, last, name):
    print(name, first[name], last[name])
    assert last[name] < first[name] / 2


@pytest.mark.parametrize("method", OWN_LOSS if LONG else ("at", "trades"))
def test_an_adversarial_method_and_its_agr_branch_are_robust(tmp_path, method):
    """AGR branches where its interpolation begins, as the README's first line does."""
    epochs = 40 if method == "at" else BRANCH_EPOCH
    without, records = trained(tmp_path / "base", method, epochs=epochs)
    step = BRANCH_EPOCH * records[0]["step"]
    branch_point = tmp_path / "base" / "checkpoints" / str(step)
    accuracy, branch_records = trained(tmp_path / "branch", method, branch_point)
    assert branch_records[0]["epoch"] == BRANCH_EPOCH + 1
    assert "cosine" not in records[-1]
    assert "cosine" in branch_records[0]
    for found in (without, accuracy):
        assert found["pgd20"] >= 0.60
        assert found["clean"] >= found["fgsm"] >= found["pgd20"]
    for last in (records[-1], branch_records[-1]):
        assert_halved(records[0], last, OWN_LOSS[method])
    if method == "at":
        assert abs(accuracy["pgd20"] - without["pgd20"]) <= 0.05


def test_standard_training_is_accurate_and_not_robust(tmp_path):
    accuracy, records = trained(tmp_path / "run", "standard")
    assert accuracy["clean"] >= 0.95
    assert accuracy["pgd20"] < 0.25
    assert_halved(records[0], records[-1], "adversarial_loss")
