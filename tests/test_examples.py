"""The examples: a method of one's own trains with AGR, all kinds of classifiers are attacked."""

import pytest
from ml_collections import ConfigDict

from agr_jax import methods, run_folder, train
from agr_jax.config import from_config_dict
from agr_jax.metrics import read_json_lines
from examples import logit_pairing, own_classifier


def small() -> ConfigDict:
    values = logit_pairing.get_config()
    values.epochs = 2
    values.batch_size = 64
    values.data.train_examples = 256
    values.attack.steps = 2
    values.agr.gics_start_epoch = 1
    values.eval.examples = 60
    values.eval.attacks = ("clean", "pgd3")
    return values


def test_logit_pairing_trains_with_agr(tmp_path):
    config = from_config_dict(small())
    assert methods.from_config(config) == logit_pairing.LogitPairing(
        methods.training_attack(config.attack)
    )
    assert train.run(config, tmp_path) == 0
    for record in read_json_lines(tmp_path / "metrics.jsonl"):
        assert record["logit_distance"] > 0
        assert -1 <= record["cosine"] <= 1
    assert (tmp_path / "evaluations" / "last-first60.json").exists()
    assert run_folder.read_config(tmp_path) == config


@pytest.mark.parametrize(
    ("field", "folder"),
    [
        ({}, "runs/digits_logit_pairing"),
        ({"method": "trades"}, "runs/digits_logit_pairing-trades"),
        ({"method": "at"}, "runs/digits_logit_pairing"),
    ],
)
def test_default_folders(field, folder):
    values = small()
    values.update(field)
    assert str(run_folder.default_folder(from_config_dict(values))) == folder


@pytest.mark.parametrize("kind", ["plain", "linen", "nnx", "equinox"])
def test_any_classifier_is_attacked(kind, capsys):
    if kind == "equinox":
        pytest.importorskip("equinox")
    own_classifier.main(kind)
    assert "AutoAttack, Linf epsilon 0.01, 20 images" in capsys.readouterr().out
