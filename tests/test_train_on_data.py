"""Runs on every data set, from every place that it can come from, on the device and streamed."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from official_archives import (
    as_tar,
    as_zip,
    made_tiny_imagenet,
    needs_shared,
    real_cifar10,
    real_cifar100,
)
from PIL import Image
from test_train import assert_bit_identical, overridden, variables_of
from test_train import small as digits

from agr_jax.data import prepare
from agr_jax.data.feed import TrainingImages
from agr_jax.errors import ConfigError, DataError
from agr_jax.files import read_json_lines
from agr_jax.runs import Run
from agr_jax.training import Trainer, train_run
from agr_jax.training.batch_picture import batch_picture
from configs import base


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    """A part of CIFAR-10 in the official layout."""
    return real_cifar10(tmp_path_factory.mktemp("cifar10"))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Small sets: folders and archives of the official layouts, prepared TFDS folders."""
    root = tmp_path_factory.mktemp("places")
    found = {}
    makers = {
        "cifar10": (real_cifar10, as_tar, "cifar-10-binary.tar.gz"),
        "cifar100": (real_cifar100, as_tar, "cifar-100-binary.tar.gz"),
        "tiny_imagenet": (made_tiny_imagenet, as_zip, "tiny-imagenet-200.zip"),
    }
    for name, (make, pack, archive) in makers.items():
        folder = make(root)
        found[name, "folder"] = folder
        found[name, "archive"] = pack(folder, root / archive)
        try:
            found[name, "prepared"] = prepare.prepare(name, root / "tfds", source=folder)
        except DataError:
            found[name, "prepared"] = None
    return found


def small(name, path, **overrides):
    """Width 4, two steps of PGD-1 on 64 images."""
    values = base.recipe(name.replace("_", "").replace("imagefolder", "cifar10"), "at", "paper")
    values.data.name = name
    values.data.dir = str(path)
    values.data.subset_ok = True
    values.data.train_examples = 64
    values.data.picture = False
    values.epochs = 1
    values.batch_size = 32
    values.model.name = "wrn10_1"
    values.model.width = 4
    values.attack.steps = 1
    values.agr.gics_start_epoch = 0
    values.eval.examples = 32
    values.eval.batch_size = 32
    values.eval.attacks = ("clean",)
    return overridden(values, **overrides)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("xdg")


@pytest.fixture(autouse=True)
def own_cache(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny_imagenet"])
def test_every_place_gives_the_same_run(places, tmp_path, capsys, name):
    runs = {}
    for place in ("folder", "archive", "prepared"):
        path = places[name, place]
        if path is None:
            pytest.skip("tensorflow-datasets is not installed")
        for turn in ("read", "cached") if place == "folder" else ("read",):
            folder = tmp_path / f"{place}-{turn}"
            assert train_run(small(name, path), folder) == 0
            assert f"from {path} [SUBSET]" in capsys.readouterr().out
            runs[folder.name] = variables_of(folder)
            record = json.loads((folder / "data.json").read_text())
            assert record["examples"]["train"] == 64
            assert record["source"] == str(path)
            assert len(record["digests"]["train"]) == 64
    for variables in runs.values():
        assert_bit_identical(variables, runs["folder-read"])


@pytest.fixture
def image_folder(tmp_path):
    for c, name in enumerate(("low", "middle", "high")):
        for split in ("train", "val"):
            folder = tmp_path / "own" / split / name
            folder.mkdir(parents=True)
            for i in range(24):
                noise = np.random.default_rng([c, i]).integers(0, 60, (20, 30, 3), np.uint8)
                Image.fromarray(noise + np.uint8(80 * c)).save(folder / f"{i}.png")
    return tmp_path / "own"


@pytest.mark.slow
def test_an_image_folder_trains(image_folder, tmp_path, capsys):
    config = small("image_folder", image_folder, data__image_size=32, data__train_examples=0)
    for turn in ("read", "cached"):
        assert train_run(config, tmp_path / turn) == 0
        assert f"own: 72 + 72 images of 32x32x3, 3 classes, from {image_folder}" in (
            capsys.readouterr().out
        )
    assert_bit_identical(variables_of(tmp_path / "read"), variables_of(tmp_path / "cached"))
    record = json.loads((tmp_path / "read/data.json").read_text())
    assert record["class_names"] == ["high", "low", "middle"]


# ---- on the device and streamed


@pytest.fixture(scope="module")
def extra(tmp_path_factory):
    path = tmp_path_factory.mktemp("extra") / "extra.npz"
    generator = np.random.default_rng(0)
    np.savez(
        path,
        image=generator.integers(0, 256, (500, 32, 32, 3), np.uint8),
        label=generator.integers(0, 10, 500),
    )
    return path


STREAMED = {"data__device_budget_mb": 1}


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize(("last_batch", "with_extra"), [("keep", False), ("drop", True)])
def test_streamed_equals_on_device_bit_for_bit(
    cifar10, extra, tmp_path, capsys, monkeypatch, last_batch, with_extra
):
    """Two epochs with a short last batch: 1.2 MB of images are over the budget of 1 MB."""
    overrides = {
        "data__train_examples": 400,
        "batch_size": 48 if last_batch == "drop" else 112,
        "data__last_batch": last_batch,
        "epochs": 2,
        "agr__gics_start_epoch": 1,
    }
    if with_extra:
        overrides |= {"data__extra": str(extra), "data__extra_fraction": 0.25}
    assert train_run(small("cifar10", cifar10, **overrides), tmp_path / "device") == 0
    assert "MB of images on each device" in capsys.readouterr().out
    assert train_run(small("cifar10", cifar10, **overrides, **STREAMED), tmp_path / "streamed") == 0
    printed = capsys.readouterr().out
    assert "MB of images streamed to each device" in printed
    assert ("extra: 500 images" in printed) == with_extra
    assert_bit_identical(variables_of(tmp_path / "device"), variables_of(tmp_path / "streamed"))
    device, streamed = (
        [
            {k: v for k, v in record.items() if "second" not in k and k != "peak_memory_mb"}
            for record in read_json_lines(tmp_path / which / "metrics.jsonl")
        ]
        for which in ("device", "streamed")
    )
    assert device == streamed
    assert len(device) == 2


@needs_shared
@pytest.mark.slow
def test_a_run_may_go_on_with_another_budget(cifar10, tmp_path):
    overrides = {"data__train_examples": 400, "batch_size": 48}
    assert train_run(small("cifar10", cifar10, **overrides, epochs=1), tmp_path / "run") == 0
    continued = small("cifar10", cifar10, **overrides, epochs=2, **STREAMED)
    assert train_run(continued, tmp_path / "run") == 0
    assert train_run(small("cifar10", cifar10, **overrides, epochs=2), tmp_path / "whole") == 0
    assert_bit_identical(variables_of(tmp_path / "run"), variables_of(tmp_path / "whole"))


@pytest.mark.slow  # every day one streams them, above
@needs_shared
def test_extra_images_change_the_run_and_are_recorded(cifar10, extra, tmp_path):
    with_extra = {"data__extra": str(extra), "data__extra_fraction": 0.5}
    assert train_run(small("cifar10", cifar10), tmp_path / "without") == 0
    assert train_run(small("cifar10", cifar10, **with_extra), tmp_path / "with") == 0
    without, mixed = variables_of(tmp_path / "without"), variables_of(tmp_path / "with")
    assert any((without[name] != mixed[name]).any() for name in without)
    record = json.loads((tmp_path / "with/data.json").read_text())
    assert record["extra"] == {"examples": 500, "fraction": 0.5}


@needs_shared
def test_extra_images_and_their_share_need_each_other(cifar10, extra, tmp_path):
    for overrides in ({"data__extra": str(extra)}, {"data__extra_fraction": 0.5}):
        with pytest.raises(ConfigError, match=r"config\.data\.extra_fraction: must be above 0 if"):
            train_run(small("cifar10", cifar10, **overrides), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"config\.data\.extra_fraction: must be at least 0"):
        small("cifar10", cifar10, data__extra_fraction=1.0)
    missing = {"data__extra": "none.npz", "data__extra_fraction": 0.5}
    with pytest.raises(DataError, match=r"none\.npz: expected an \.npz file"):
        train_run(small("cifar10", cifar10, **missing), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


# ---- the picture of the first batch


@pytest.mark.slow
@needs_shared
def test_the_picture_shows_what_the_first_step_sees(cifar10, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(
        "agr_jax.training.batch_picture.batch_picture", lambda *parts: shown.append(parts) or b"png"
    )
    config = small("cifar10", cifar10, data__picture=True)
    assert train_run(config, tmp_path / "run") == 0
    assert (tmp_path / "run/first_batch.png").read_bytes() == b"png"
    ((images, augmented, adversarial, names),) = shown
    seen = first_inputs(config)
    np.testing.assert_array_equal(images, seen[0])
    np.testing.assert_array_equal(augmented, seen[1])
    # The same sums in another batch size may round differently: a sign at 0 may flip.
    assert (np.abs(adversarial - seen[2]) > 1e-6).mean() < 0.01
    assert np.abs(adversarial - augmented).max() <= 8 / 255 + 1e-6
    assert len(names) == 8
    # A run that goes on keeps its picture.
    (tmp_path / "run/first_batch.png").write_bytes(b"kept")
    assert train_run(dataclasses.replace(config, epochs=2), tmp_path / "run") == 0
    assert (tmp_path / "run/first_batch.png").read_bytes() == b"kept"


def first_inputs(config):
    """Of the first eight images of the whole first batch: as they are, augmented, adversarial."""
    run = Run.from_config(config, Path())
    dataset, trainer = run.dataset, Trainer.from_run(run)
    root = jax.random.key(config.seed)
    init_key, order_key, step_key = (jax.random.fold_in(root, i) for i in range(3))
    state = trainer.init(init_key, dataset.image_shape)
    images = TrainingImages(dataset.train)
    batch = images.batch(images.order(order_key, 0, [32, 32])[:32])
    inputs = jax.jit(trainer.inputs)(state, *batch, step_key)
    return batch[0][:8], np.asarray(inputs.images)[:8], np.asarray(inputs.adversarial)[:8]


def test_the_picture_is_a_png_of_four_rows(tmp_path):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (3, 8, 8, 1), np.uint8)
    clean = images / 255
    content = batch_picture(images, clean, clean + 0.01, ["zero", "one", "two"])
    (tmp_path / "a.png").write_bytes(content)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture)
    side = 96
    assert pixels.shape == (16 + 4 * (side + 20), 3 * (side + 4) + 4, 3)
    first = pixels[32 : 32 + side, 4 : 4 + side, 0]
    np.testing.assert_array_equal(first[::12, ::12], images[0, ..., 0])
    last = pixels[32 + 3 * (side + 20) : 32 + 3 * (side + 20) + side, 4 : 4 + side]
    assert (last == round(255 * 0.6)).all()


def test_old_runs_without_the_newer_fields_go_on(tmp_path):
    """A run folder from before these fields existed."""
    assert train_run(digits(epochs=1), tmp_path / "run") == 0
    path = tmp_path / "run/config.json"
    values = json.loads(path.read_text())
    for field in ("resize", "download", "cache", "extra", "extra_fraction", "picture"):
        del values["data"][field]
    del values["data"]["device_budget_mb"]
    path.write_text(json.dumps(values))
    assert train_run(digits(epochs=2), tmp_path / "run") == 0
    shutil.rmtree(tmp_path / "run")
