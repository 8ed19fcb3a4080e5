"""The examples: a method of one's own trains with AGR, all kinds of classifiers are attacked."""

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from agr_jax import methods
from agr_jax.config import from_config_dict
from agr_jax.data import Dataset, Split
from agr_jax.evaluation.evaluate import evaluate_run
from agr_jax.files import read_json_lines
from agr_jax.runs import Run
from agr_jax.runs.folder import default_folder, read_config
from agr_jax.training import train_run
from examples import cifar10_autoattack, logit_pairing, own_classifier, own_images, own_network


def small() -> ConfigDict:
    values = logit_pairing.get_config()
    values.epochs = 2
    values.label_smoothing = 0.1
    values.batch_size = 64
    values.data.train_examples = 256
    values.attack.steps = 2
    values.data.picture = False
    values.agr.gics_start_epoch = 1
    values.eval.examples = 60
    values.eval.attacks = ("clean", "pgd3")
    return values


@pytest.mark.slow
def test_logit_pairing_trains_with_agr(tmp_path):
    config = from_config_dict(small())
    assert config.label_smoothing == 0.1
    assert methods.from_config(config) == logit_pairing.LogitPairing(
        methods.training_attack(config.attack), label_smoothing=0.1
    )
    assert train_run(config, tmp_path) == 0
    for record in read_json_lines(tmp_path / "metrics.jsonl"):
        assert record["logit_distance"] > 0
        assert -1 <= record["cosine"] <= 1
    assert (tmp_path / "evaluations" / "last-first60.json").exists()
    assert read_config(tmp_path) == config


@pytest.mark.slow
def test_own_network_trains_and_goes_on(tmp_path):
    """Without BatchNorm there are no running statistics to keep."""
    values = small()
    values.method = "at"
    values.model.name = own_network.get_config().model.name
    values.averaging.decay = 0.5
    values.epochs = 1
    assert train_run(from_config_dict(values), tmp_path / "run") == 0
    values.epochs = 2
    assert train_run(from_config_dict(values), tmp_path / "run") == 0
    assert train_run(from_config_dict(values), tmp_path / "whole") == 0
    found = [
        evaluate_run(
            Run.from_config(from_config_dict(values), tmp_path / name), which=("last", "average")
        )
        for name in ("run", "whole")
    ]
    for resumed, whole in zip(*found, strict=True):
        assert resumed["digests"] == whole["digests"]
    assert {record["checkpoint"] for record in found[0]} == {"last", "average"}


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
    assert str(default_folder(from_config_dict(values))) == folder


@pytest.mark.slow
def test_own_images_train(tmp_path, capsys):
    for c, name in enumerate(("dark", "light")):
        for split in ("train", "test"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(8):
                noise = np.random.default_rng([c, i]).integers(0, 100, (30, 40, 3), np.uint8)
                Image.fromarray(noise + np.uint8(100 * c)).save(folder / f"{i}.jpg")
    values = own_images.get_config()
    values.data.dir = str(tmp_path / "images")
    values.data.image_size = 16
    values.data.crop_padding = 2
    values.data.cutout_size = 8
    values.data.cache = False
    values.model.name = "wrn10_1"
    values.model.width = 4
    values.epochs = 1
    values.batch_size = 8
    values.attack.steps = 1
    values.eval.attacks = ("clean", "fgsm")
    assert train_run(from_config_dict(values), tmp_path / "run") == 0
    assert "images: 16 + 16 images of 16x16x3, 2 classes" in capsys.readouterr().out
    assert (tmp_path / "run" / "first_batch.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "linen", "nnx", "equinox"])
def test_any_classifier_is_attacked(kind, capsys):
    own_classifier.main(kind)
    assert "AutoAttack, Linf epsilon 0.01, 20 images" in capsys.readouterr().out


@pytest.mark.slow
def test_cifar10_autoattack(monkeypatch, capsys, tmp_path):
    """With images of random pixels in the place of CIFAR-10's."""
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    split = Split(images, np.arange(8, dtype=np.int32))
    asked = []

    def load(name, **options):
        asked.append(name)
        return Dataset(name, tuple("0123456789"), split, split, None, "nowhere", False)

    monkeypatch.setattr(cifar10_autoattack, "load_dataset", load)
    arguments = ["--examples=4", "--version=fast", f"--folder={tmp_path}"]
    cifar10_autoattack.main(arguments)
    printed = capsys.readouterr().out
    assert "fast, not AutoAttack), Linf epsilon 0.03137, 4 images" in printed
    assert asked == ["cifar10"]
    assert any(tmp_path.iterdir())
