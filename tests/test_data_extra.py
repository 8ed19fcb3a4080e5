"""Extra training images: mapped where they lie, checked, and mixed into every batch."""

import io
import time
import zipfile

import jax
import numpy as np
import pytest

from agr_jax.data import Split
from agr_jax.data.extra import read_extra
from agr_jax.data.feed import Feed, TrainingImages, prefetched
from agr_jax.errors import DataError
from agr_jax.sharding import data_mesh

SHAPE = (4, 4, 3)
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg/agr_jax/data"


def numbered(count, first=0):
    """Images that hold their number, and labels that follow from it."""
    numbers = np.arange(first, first + count)
    images = np.broadcast_to(numbers.reshape(-1, 1, 1, 1), (count, *SHAPE)).astype(np.uint8)
    return images, (numbers % 10).astype(np.int64)


def read(path, **options):
    return read_extra(path, **{"image_shape": SHAPE, "num_classes": 10, **options})


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_an_uncompressed_file_is_mapped_where_it_lies(tmp_path, cache_folder, dtype):
    images, labels = numbered(50)
    np.savez(tmp_path / "extra.npz", image=images, label=labels.astype(dtype))
    extra = read(tmp_path / "extra.npz")
    np.testing.assert_array_equal(extra.images, images)
    np.testing.assert_array_equal(extra.labels, labels)
    assert not extra.images.flags.owndata
    assert not extra.images.flags.writeable
    assert not cache_folder.exists()


def test_a_compressed_file_is_unpacked_once(tmp_path, cache_folder, capsys):
    images, labels = numbered(50)
    np.savez_compressed(tmp_path / "extra.npz", label=labels, image=images)
    for turn in range(2):
        extra = read(tmp_path / "extra.npz")
        np.testing.assert_array_equal(extra.images, images)
        assert ("unpacking" in capsys.readouterr().out) == (turn == 0)
    assert len(list(cache_folder.iterdir())) == 1


def refused(path, match, **options):
    with pytest.raises(DataError, match=match):
        read(path, **options)


def saved(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_wrong_arrays_are_named(tmp_path):
    images, labels = numbered(5)
    path = tmp_path / "e.npz"
    refused(path, "expected an .npz file of extra images, found none")
    refused(saved(path, images=images), "expected the arrays image and label, found images")
    refused(saved(path, image=images.astype(np.float32), label=labels), r"uint8 .*found float32")
    refused(saved(path, image=images[..., :1], label=labels), r"\(N, 4, 4, 3\).*\(5, 4, 4, 1\)")
    moved = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    refused(saved(path, image=moved, label=labels), r"\(5, 3, 4, 4\)")
    refused(saved(path, image=np.asfortranarray(images), label=labels), "Fortran")
    refused(saved(path, image=images, label=labels[:4]), r"\(5,\).*found int64 \(4,\)")
    refused(saved(path, image=images, label=labels / 2), "integers .*float64")
    refused(saved(path, image=images, label=labels + 8), r"label 10 of image 2 is outside 0\.\.9")
    refused(saved(path, image=images[:0], label=labels[:0]), "found uint8")
    refused(saved(path, image=images, label=np.array([{}] * 5)), "damaged.*[oO]bject")


def test_damaged_files_are_refused(tmp_path):
    images, labels = numbered(50)
    path = saved(tmp_path / "e.npz", image=images, label=labels)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, r"e.npz \(\d.* bytes\): damaged: .*BadZipFile")
    path.write_bytes(b"")
    refused(path, "damaged")
    # A header that promises more than there is.
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "|u1", "fortran_order": False, "shape": (1000, *SHAPE)}
    )
    label = io.BytesIO()
    np.save(label, np.zeros(1000, np.int64))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("image.npy", stream.getvalue() + bytes(100))
        archive.writestr("label.npy", label.getvalue())
    refused(path, "image.npy holds .* not what its shape needs")


# ---- mixing


def mixture(train=20, extra=30, fraction=0.25, seed=0):
    images, labels = numbered(train)
    more, more_labels = numbered(extra, 100)
    return TrainingImages(
        Split(images, labels.astype(np.int32)),
        Split(more, more_labels.astype(np.int32)),
        fraction,
        seed,
    )


def test_every_batch_has_its_share_of_extra_images():
    images = mixture()
    order = images.order(KEY, 0, [8, 8, 4])
    assert order.dtype == np.int32
    for rows, share in zip(np.split(order, [8, 16]), (2, 2, 1), strict=True):
        assert (rows >= 20).sum() == share
        pixels, labels = images.batch(rows)
        expected = np.where(rows < 20, rows, rows + 80)
        np.testing.assert_array_equal(pixels[:, 0, 0, 0], expected)
        np.testing.assert_array_equal(labels, expected % 10)
    assert len(set(order.tolist())) == len(order)  # none comes twice in an epoch


def test_epochs_differ_and_are_functions_of_seed_and_epoch():
    images = mixture()
    np.testing.assert_array_equal(images.order(KEY, 3, [8, 8]), images.order(KEY, 3, [8, 8]))
    assert (images.order(KEY, 3, [8, 8]) != images.order(KEY, 4, [8, 8])).any()
    other = mixture(seed=1).order(KEY, 3, [8, 8])
    ours = images.order(KEY, 3, [8, 8])
    np.testing.assert_array_equal(ours[ours < 20], other[other < 20])  # the set's own, by the key
    assert (ours != other).any()


def test_few_extra_images_come_again_only_when_all_have_come():
    rows = mixture(train=40, extra=5, fraction=0.5).order(KEY, 0, [8] * 3)
    extra = rows[rows >= 40]
    assert len(extra) == 12
    assert sorted(np.bincount(extra - 40, minlength=5)) == [2, 2, 2, 3, 3]


def test_over_many_epochs_every_image_is_drawn():
    images = mixture(train=20, extra=30, fraction=0.25)
    seen = np.bincount(
        np.concatenate([images.order(KEY, epoch, [8, 8]) for epoch in range(200)]), minlength=50
    )
    # 12 of 20 own images an epoch, 4 of 30 extra ones: 120 and 26.7 in 200 epochs.
    assert np.abs(seen[:20] - 120).max() < 5 * np.sqrt(200 * 0.6 * 0.4)
    assert np.abs(seen[20:] - 200 * 4 / 30).max() < 5 * np.sqrt(200 * 4 / 30)


def test_without_extra_images_the_order_is_a_permutation():
    images, labels = numbered(20)
    plain = TrainingImages(Split(images, labels.astype(np.int32)))
    np.testing.assert_array_equal(np.sort(plain.order(KEY, 0, [8, 8])), np.arange(20))


def test_fraction_and_extra_images_need_each_other():
    split = Split(numbered(5)[0], numbered(5)[1].astype(np.int32))
    with pytest.raises(DataError, match=r"each other: no extra images, extra_fraction 0\.5"):
        TrainingImages(split, None, 0.5)
    with pytest.raises(DataError, match="need each other: 5 images"):
        TrainingImages(split, split, 0.0)
    with pytest.raises(DataError, match=r"at least 0 and below 1, got 1\.5"):
        TrainingImages(split, split, 1.5)


@pytest.mark.parametrize("budget_mb", [0, 1])
def test_both_feeds_give_the_same_batches(budget_mb, monkeypatch):
    images = mixture()
    if budget_mb:
        monkeypatch.setattr(TrainingImages, "nbytes", property(lambda self: 2 * 10**6))
    feed = Feed(images, data_mesh(), budget_mb=budget_mb)
    assert feed.on_device == (budget_mb == 0)
    sizes = [8, 8, 4]
    order = images.order(KEY, 1, sizes)
    shared, batches = feed.epoch(order, sizes, first=1)
    found = []
    for index, batch in zip((1, 2), batches, strict=True):
        if feed.on_device:
            start = 8 * index
            rows = np.asarray(shared["permutation"])[start : start + batch["batch_size"]]
            found.append((shared["images"][rows], shared["labels"][rows]))
        else:
            assert batch["images"].sharding.spec == jax.sharding.PartitionSpec("data")
            found.append((batch["images"], batch["labels"]))
    for (pixels, labels), rows in zip(found, np.split(order, [8, 16])[1:], strict=True):
        expected = images.batch(rows)
        np.testing.assert_array_equal(pixels, expected[0])
        np.testing.assert_array_equal(labels, expected[1])


def test_prefetching_keeps_the_order_runs_ahead_and_passes_errors_on():
    loaded = []

    def load(row):
        loaded.append(int(row[0]))
        if row[0] == 7:
            raise DataError("row 7 cannot be read")
        return int(row[0])

    rows = [np.array([i]) for i in range(10)]
    batches = prefetched(rows, load, ahead=2)
    assert next(batches) == 0
    for _ in range(1000):  # the next ones are loaded though nobody asked for them
        if len(loaded) >= 2:
            break
        time.sleep(0.01)
    assert len(loaded) >= 2
    assert [next(batches) for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(DataError, match="row 7"):
        list(batches)
    loaded.clear()
    batches = prefetched(rows, load, ahead=2)
    next(batches)
    batches.close()
    assert len(loaded) <= 3
