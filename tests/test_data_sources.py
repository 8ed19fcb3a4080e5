"""Data sets by name: where they are looked for, checks of splits, subsets, digits and batches."""

import dataclasses
import hashlib
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from agr_jax.data import Dataset, Split, load_dataset, sources
from agr_jax.data.batches import epoch_permutation, evaluation_batches, steps_per_epoch
from agr_jax.data.dataset import class_balanced_subset, hold_out
from agr_jax.data.official import records_digest
from agr_jax.data.sources import OFFICIAL
from agr_jax.errors import DataError

SHARED = Path(__file__).parents[1].parent / "shared"
BATCHES = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]


def make_split(labels, side=2):
    labels = np.asarray(labels, np.int32)
    # The index of an example, written into its image, tells it apart.
    index = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    return Split(np.broadcast_to(index, (len(labels), side, side, 1)), labels)


def make_cifar10(folder, per_class=1, constant=0):
    folder.mkdir(parents=True)
    for file in BATCHES:
        records = b"".join(bytes([y]) + bytes([constant]) * 3072 for y in range(10))
        (folder / file).write_bytes(records * per_class)
    return folder


@pytest.fixture(autouse=True)
def empty_working_folder(tmp_path, monkeypatch):
    """No test sees data sets of the machine it runs on."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)


def test_split_refuses_float_images():
    images = np.full((2, 4, 4, 3), 1.5, np.float32)
    with pytest.raises(DataError, match=r"uint8 .*0\.\.255, found float32 .*\[1.5, 1.5\].*255 \*"):
        Split(images, np.zeros(2, np.int32))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.int64), np.zeros(2, np.int32), "found int64 .*in .0, 0."),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.int32), r"\[N, H, W, C\], found shape"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, np.int64), "labels must be int32"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 1), np.int32), "labels must be int32"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, np.int32), "2 images but 3 labels"),
        (np.zeros((0, 4, 4, 3), np.uint8), np.zeros(0, np.int32), "at least one image"),
    ],
)
def test_split_refuses_malformed_arrays(images, labels, message):
    with pytest.raises(DataError, match=message):
        Split(images, labels)


def test_dataset_describes_itself():
    split = make_split([0, 1, 1])
    dataset = Dataset("Toy", ("a", "b"), split, split, None, "here", True)
    assert dataset.describe() == "Toy: 3 + 3 images of 2x2x1, 2 classes, from here"
    partial = Dataset("Toy", ("a", "b"), split, split, split, "here", False)
    assert partial.describe().endswith("(+ 3 held out) of 2x2x1, 2 classes, from here [SUBSET]")
    assert (dataset.num_classes, dataset.image_shape) == (2, (2, 2, 1))


def test_dataset_names_the_first_bad_label():
    good, bad = make_split([0, 1]), make_split([0, 5, -1])
    with pytest.raises(DataError, match=r"label 5 of test example 1 is outside 0\.\.1"):
        Dataset("Toy", ("a", "b"), good, bad, None, "here", True)
    with pytest.raises(DataError, match=r"label -1 of validation example 0"):
        Dataset("Toy", ("a", "b"), good, good, make_split([-1]), "here", True)
    with pytest.raises(DataError, match=r"test images are \(3, 3, 1\)"):
        Dataset("Toy", ("a", "b"), good, make_split([0], side=3), None, "here", True)


@pytest.mark.parametrize("examples", [1, 3, 10, 11, 29, 30])
def test_subset_is_balanced_seeded_and_ordered(examples):
    split = make_split(np.tile([2, 0, 1], 10))
    subset = class_balanced_subset(split, examples, num_classes=3, seed=4)
    counts = np.bincount(subset.labels, minlength=3)
    assert len(subset) == examples
    assert counts.max() - counts.min() <= 1
    chosen = subset.images[:, 0, 0, 0].astype(int)
    assert (np.diff(chosen) > 0).all()
    np.testing.assert_array_equal(subset.labels, split.labels[chosen])
    again = class_balanced_subset(split, examples, num_classes=3, seed=4)
    np.testing.assert_array_equal(again.images, subset.images)
    larger = class_balanced_subset(split, min(examples + 5, 30), num_classes=3, seed=4)
    assert set(chosen) <= set(larger.images[:, 0, 0, 0])


def test_subset_depends_on_the_seed():
    split = make_split(np.tile([0, 1], 50))
    drawn = [class_balanced_subset(split, 10, num_classes=2, seed=s).images for s in (0, 1)]
    assert (drawn[0] != drawn[1]).any()


def test_subset_uses_classes_that_have_one_to_spare():
    subset = class_balanced_subset(make_split([0, 1, 1, 2, 2]), 5, num_classes=3, seed=0)
    np.testing.assert_array_equal(np.bincount(subset.labels), [1, 2, 2])


def test_subset_names_the_numbers_of_an_impossible_request():
    split = make_split([0, 1, 1, 1, 2, 2])
    with pytest.raises(DataError, match="asked for 7 examples, but there are 6"):
        class_balanced_subset(split, 7, num_classes=3, seed=0)
    with pytest.raises(DataError, match=r"class 0 has 1; ask for at most 5"):
        class_balanced_subset(split, 6, num_classes=3, seed=0)
    with pytest.raises(DataError, match=r"class 3 has 0; ask for at most 3"):
        class_balanced_subset(split, 4, num_classes=4, seed=0)
    with pytest.raises(DataError, match="examples must be >= 1 and seed >= 0, got 0 and 0"):
        class_balanced_subset(split, 0, num_classes=3, seed=0)
    with pytest.raises(DataError, match="seed >= 0, got 2 and -1"):
        class_balanced_subset(split, 2, num_classes=3, seed=-1)
    with pytest.raises(DataError, match=r"found label 2, expected labels 0\.\.1"):
        class_balanced_subset(split, 2, num_classes=2, seed=0)


def test_what_a_seed_holds_out_never_changes():
    """A branch must hold out what its base did, also with a later version: a fact, not a draw."""
    split = make_split(np.tile([0, 1, 2], 10))
    _, held_out = hold_out(split, 9, num_classes=3, seed=0)
    subset = class_balanced_subset(split, 9, num_classes=3, seed=0)
    for part, rows in (
        (held_out, [2, 4, 8, 9, 10, 12, 19, 24, 29]),
        (subset, [6, 8, 11, 13, 19, 20, 21, 22, 27]),
    ):
        assert part.images[:, 0, 0, 0].tolist() == rows


def test_hold_out_is_disjoint_balanced_and_whole():
    split = make_split(np.tile([0, 1, 2], 10))
    rest, held_out = hold_out(split, 9, num_classes=3, seed=0)
    np.testing.assert_array_equal(np.bincount(held_out.labels), [3, 3, 3])
    both = np.concatenate([rest.images[:, 0, 0, 0], held_out.images[:, 0, 0, 0]])
    np.testing.assert_array_equal(np.sort(both), np.arange(30))
    with pytest.raises(DataError, match="leaves none"):
        hold_out(split, 30, num_classes=3, seed=0)


def test_digits():
    dataset = load_dataset("digits")
    assert dataset.image_shape == (8, 8, 1)
    assert dataset.num_classes == 10
    assert len(dataset.train) + len(dataset.test) == 1797
    test_counts, train_counts = np.bincount(dataset.test.labels), np.bincount(dataset.train.labels)
    np.testing.assert_array_equal(test_counts, (test_counts + train_counts) // 5)
    assert (dataset.train.images.min(), dataset.train.images.max()) == (0, 255)
    levels = np.unique(np.concatenate([dataset.train.images, dataset.test.images]))
    np.testing.assert_array_equal(levels, np.round(np.arange(17) * 255 / 16))
    assert dataset.complete


def test_digits_images_are_the_original_ones():
    datasets = pytest.importorskip("sklearn.datasets")
    original = datasets.load_digits()
    zeros = original.images[original.target == 0]
    dataset = load_dataset("digits")
    found = dataset.test.images[dataset.test.labels == 0][..., 0]
    np.testing.assert_array_equal(found, np.round(zeros[4::5] * 255 / 16))


def test_digits_without_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        load_dataset("digits")


def test_validation_does_not_depend_on_train_examples():
    loaded = [
        load_dataset("digits", validation_examples=50, train_examples=n, seed=3)
        for n in (None, 200, 20)
    ]
    for dataset in loaded:
        assert dataset.validation is not None
        np.testing.assert_array_equal(dataset.validation.images, loaded[0].validation.images)
        np.testing.assert_array_equal(np.bincount(dataset.validation.labels), np.full(10, 5))
    assert [len(d.train) for d in loaded] == [len(loaded[0].train), 200, 20]
    assert [d.complete for d in loaded] == [True, False, False]


def test_load_dataset_refuses_bad_arguments():
    with pytest.raises(DataError, match="unknown data set 'mnist': expected digits, cifar10"):
        load_dataset("mnist")
    with pytest.raises(DataError, match="image_size=64 is for tiny_imagenet and image_folder only"):
        load_dataset("cifar10", image_size=64)
    with pytest.raises(DataError, match="validation_examples must be >= 0"):
        load_dataset("digits", validation_examples=-1)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("cifar10", ["cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "170,052,171 bytes"]),
        ("cifar100", ["cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", "168,513,733 bytes"]),
        ("tiny_imagenet", ["cs231n.stanford.edu/tiny-imagenet-200.zip", "248,100,043 bytes"]),
    ],
)
def test_nothing_found_says_where_it_looked_and_what_to_do(name, facts, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    (tmp_path / "tfds").mkdir()
    with pytest.raises(DataError, match="not found") as caught:
        load_dataset(name)
    message = str(caught.value)
    for place in (tmp_path / "tfds", tmp_path / "cwd/data"):
        for subfolder in ("downloads", "downloads/manual", "manual"):
            assert str(place / subfolder) in message
    assert f"{tmp_path / 'tfds'};" in message
    assert f"{tmp_path / 'cwd/data'} (does not exist)" in message
    assert f"{tmp_path / 'home/tensorflow_datasets'} (does not exist)" in message
    assert f"python -m agr_jax.data.prepare {name} --dir=FOLDER" in message
    for fact in [*facts, "--config.data.dir=FOLDER", "./data"]:
        assert fact in message
    assert "\n" not in message


def test_an_explicit_directory_is_the_only_place(tmp_path):
    make_cifar10(tmp_path / "cwd/data/cifar-10-batches-bin")
    with pytest.raises(DataError, match="not found") as caught:
        load_dataset("cifar10", directory=str(tmp_path / "elsewhere"), subset_ok=True)
    assert "cwd/data" not in str(caught.value).split("Download")[0]


def test_without_a_network_the_failed_download_is_part_of_the_one_error(monkeypatch):
    here = dataclasses.replace(OFFICIAL["cifar10"], address="http://no-such-host.invalid/archive")
    monkeypatch.setitem(OFFICIAL, "cifar10", here)
    with pytest.raises(DataError, match=r"not found\. .* Downloading it failed: .*no network"):
        load_dataset("cifar10", may_download=True)


def test_what_is_on_the_machine_is_not_downloaded(tmp_path, monkeypatch):
    def fetch(official):
        raise AssertionError

    monkeypatch.setattr(sources, "fetch", fetch)
    make_cifar10(tmp_path / "home/tensorflow_datasets/downloads/manual/cifar-10-batches-bin")
    load_dataset("cifar10", subset_ok=True, may_download=True)
    with pytest.raises(DataError, match="not found"):
        load_dataset("cifar100", directory=str(tmp_path), may_download=True)


@pytest.mark.parametrize("subfolder", ["", "downloads", "downloads/manual", "manual"])
def test_places_are_tried_in_order(tmp_path, monkeypatch, subfolder):
    make_cifar10(
        tmp_path / "home/tensorflow_datasets" / subfolder / "cifar-10-batches-bin", constant=4
    )
    assert load_dataset("cifar10", subset_ok=True).train.images[0, 0, 0, 0] == 4
    make_cifar10(tmp_path / "cwd/data" / subfolder / "cifar-10-batches-bin", constant=1)
    assert load_dataset("cifar10", subset_ok=True).train.images[0, 0, 0, 0] == 1
    make_cifar10(tmp_path / "tfds" / subfolder / "cifar-10-batches-bin", constant=2)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    assert load_dataset("cifar10", subset_ok=True).train.images[0, 0, 0, 0] == 2
    given = make_cifar10(tmp_path / "given/any name", constant=3)
    loaded = load_dataset("cifar10", directory=str(given), subset_ok=True)
    assert loaded.train.images[0, 0, 0, 0] == 3


@pytest.mark.parametrize(
    "name", ["cifar-10-binary.tar.gz", "downloads/cs.toronto.edu_kriz_cifar-10-binaryODHP.tar.gz"]
)
def test_archives_are_found_and_may_be_given(tmp_path, name):
    folder = make_cifar10(tmp_path / "made/cifar-10-batches-bin")
    archive = tmp_path / "cwd/data" / name
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    assert load_dataset("cifar10", subset_ok=True).source == str(Path("data") / name)
    assert len(load_dataset("cifar10", directory=str(archive), subset_ok=True).train) == 50


def test_an_incomplete_official_folder_names_its_missing_files(tmp_path):
    folder = make_cifar10(tmp_path / "cifar-10-batches-bin")
    (folder / "data_batch_1.bin").unlink()
    for directory in (tmp_path, folder):
        with pytest.raises(DataError, match=r"missing data_batch_1\.bin"):
            load_dataset("cifar10", directory=str(directory))


def test_the_pickle_version_does_not_stop_the_download(tmp_path, monkeypatch):
    (tmp_path / "cwd/data/cifar-10-batches-py").mkdir(parents=True)
    asked = []
    monkeypatch.setattr(sources, "fetch", lambda official: asked.append(official.name) or tmp_path)
    monkeypatch.chdir(tmp_path / "cwd")
    assert sources.find(OFFICIAL["cifar10"], None, may_download=True) == tmp_path
    assert asked == ["cifar10"]


def test_the_pickle_version_is_named(tmp_path):
    pickled = tmp_path / "cwd/data/cifar-10-batches-py"
    pickled.mkdir(parents=True)
    message = r"cifar-10-binary.tar.gz .*cifar-10-batches-py: that is the Python \(pickle\) version"
    for directory in (None, str(pickled)):
        with pytest.raises(DataError, match=message):
            load_dataset("cifar10", directory=directory)


def test_a_partial_set_needs_permission(tmp_path):
    folder = make_cifar10(tmp_path / "cifar-10-batches-bin", per_class=2)
    with pytest.raises(
        DataError, match=r"expected 50,000 \+ 10,000 images of 10 classes, found 100 \+ 20"
    ):
        load_dataset("cifar10", directory=str(folder))
    with pytest.raises(DataError, match=r"--config\.data\.subset_ok=True"):
        load_dataset("cifar10", directory=str(folder))
    dataset = load_dataset("cifar10", directory=str(folder), subset_ok=True)
    assert dataset.describe().endswith("[SUBSET]")


def test_as_many_other_images_are_refused(tmp_path):
    make_cifar10(tmp_path / "cifar-10-batches-bin", per_class=1000)
    message = (
        r"not hold the images and labels of CIFAR-10.*expected SHA-256 3cb34.*found [0-9a-f]{64}"
    )
    with pytest.raises(DataError, match=message):
        load_dataset("cifar10", directory=str(tmp_path))
    dataset = load_dataset("cifar10", directory=str(tmp_path), subset_ok=True)
    assert not dataset.complete


def test_a_whole_set_needs_none(tmp_path, monkeypatch):
    make_cifar10(tmp_path / "cifar-10-batches-bin", per_class=1000)
    made = dataclasses.replace(OFFICIAL["cifar10"], digests={})
    monkeypatch.setitem(OFFICIAL, "cifar10", made)
    dataset = load_dataset("cifar10", directory=str(tmp_path), validation_examples=1000)
    assert dataset.complete
    assert (len(dataset.train), len(dataset.test)) == (49_000, 10_000)
    assert dataset.describe().startswith("CIFAR-10: 49,000 + 10,000 images (+ 1,000 held out)")


@pytest.mark.slow
@pytest.mark.skipif(
    not (SHARED / "data").is_dir(), reason=f"real images are not there: {SHARED / 'data'}"
)
def test_real_tiny_imagenet_subset_is_marked():
    archive = os.fspath(SHARED / "data/tiny-imagenet-20.zip")
    with pytest.raises(DataError, match=r"found 10,000 \+ 1,000 images of 20 classes"):
        load_dataset("tiny_imagenet", directory=archive)


@pytest.mark.skipif(
    not (SHARED / "data").is_dir(), reason=f"real images are not there: {SHARED / 'data'}"
)
@pytest.mark.slow
def test_the_digests_are_those_of_the_real_cifar10(tmp_path):
    """Every image and label of the official set, in its order; one changed pixel is noticed."""
    program = SHARED / "data" / "unpack.py"
    subprocess.run([sys.executable, str(program), str(tmp_path)], check=True)
    dataset = load_dataset("cifar10", directory=str(tmp_path))
    assert dataset.complete
    assert dict(dataset.digests) == dict(OFFICIAL["cifar10"].digests)
    batch = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    content = bytearray(batch.read_bytes())
    content[12_345_678] ^= 1
    batch.write_bytes(content)
    with pytest.raises(DataError, match="not hold the images and labels of CIFAR-10"):
        load_dataset("cifar10", directory=str(tmp_path))


def test_the_digest_sees_shape_pixels_labels_and_order():
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    labels = np.array([1, 2], np.int32)
    expected = hashlib.sha256(
        b"(2, 4, 4, 3)" + images.tobytes() + labels.astype("<i4").tobytes()
    ).hexdigest()
    assert records_digest(images, labels) == expected
    assert records_digest(images, labels.astype(np.int64)) == expected
    others = [
        (images.reshape(2, 2, 8, 3), labels),
        (images ^ 1, labels),
        (images, labels[::-1]),
        (images[::-1], labels[::-1]),
    ]
    assert len({records_digest(*other) for other in others} | {expected}) == 5


def test_steps_per_epoch():
    assert steps_per_epoch(50_000, 128, "drop") == 390
    assert steps_per_epoch(50_000, 128, "keep") == 391
    assert steps_per_epoch(100_000, 128, "keep") == 782
    assert steps_per_epoch(256, 128, "keep") == steps_per_epoch(256, 128, "drop") == 2
    assert steps_per_epoch(100, 128, "keep") == 1
    with pytest.raises(DataError, match="batch of 128 is larger than the 100"):
        steps_per_epoch(100, 128, "drop")
    with pytest.raises(DataError, match="'drop' or 'keep', got 'pad'"):
        steps_per_epoch(100, 10, "pad")
    with pytest.raises(DataError, match=">= 1, got 100, 0"):
        steps_per_epoch(100, 0, "drop")


def test_epoch_permutation_is_a_function_of_key_and_epoch():
    key = jax.random.key(0)
    order = epoch_permutation(key, 3, 100)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(100))
    traced = jax.jit(epoch_permutation, static_argnums=2)(key, 3, 100)
    np.testing.assert_array_equal(order, traced)
    assert (np.asarray(order) != np.asarray(epoch_permutation(key, 4, 100))).any()


def test_evaluation_batches_cover_everything_once():
    assert list(evaluation_batches(10, 4)) == [(0, 4), (4, 8), (8, 10)]
    assert list(evaluation_batches(8, 4)) == [(0, 4), (4, 8)]
    assert list(evaluation_batches(3, 4)) == [(0, 3)]
    with pytest.raises(DataError):
        list(evaluation_batches(0, 4))
