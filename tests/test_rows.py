"""Rows of arrays in memory and of mapped files: the same values, less memory."""

import gc
import os

import numpy as np
import pytest

from agr_jax.data import Split
from agr_jax.data.rows import RowReader
from agr_jax.errors import DataError


@pytest.fixture
def saved(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (50, 4, 3, 2), np.uint8)
    np.save(tmp_path / "images.npy", array)
    return array, tmp_path / "images.npy"


ROWS = np.array([7, 0, 49, 7], np.int32)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.dtype(">i4")])
def test_rows_of_a_mapped_file(tmp_path, dtype):
    array = np.arange(600).reshape(100, 2, 3).astype(dtype)
    np.save(tmp_path / "array.npy", array)
    mapped = np.load(tmp_path / "array.npy", mmap_mode="r")
    for each in (mapped, np.asarray(mapped), array):
        found = RowReader(each)(ROWS)
        np.testing.assert_array_equal(found, array[ROWS])
        assert found.dtype == array.dtype
        assert found.flags.owndata
    assert RowReader(mapped)(ROWS[:0]).shape == (0, 2, 3)


def test_parts_and_other_orders_of_a_mapped_file(saved):
    _, path = saved
    mapped = np.load(path, mmap_mode="r")
    for view in (mapped[1:], mapped[::-1], mapped[:, :2], mapped.transpose(0, 2, 1, 3)):
        rows = np.array([3, 1])
        np.testing.assert_array_equal(RowReader(view)(rows), np.array(view)[rows])


def test_a_file_that_is_replaced_is_still_the_one_that_was_mapped(saved):
    array, path = saved
    before, mapped = RowReader(np.load(path, mmap_mode="r")), np.load(path, mmap_mode="r")
    path.unlink()
    np.testing.assert_array_equal(before(ROWS), array[ROWS])
    np.testing.assert_array_equal(RowReader(mapped)(ROWS), array[ROWS])


def test_a_file_that_is_cut_short_is_an_error(saved):
    _, path = saved
    read = RowReader(np.load(path, mmap_mode="r"))
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(OSError, match="row 49 was cut short: 14 of 24 B"):
        read(ROWS)


def test_the_file_is_closed(saved):
    _, path = saved
    mapped = np.load(path, mmap_mode="r")
    count = len(os.listdir("/proc/self/fd"))
    read = RowReader(mapped)
    read(ROWS)
    assert len(os.listdir("/proc/self/fd")) > count
    del read
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == count


def test_examples_taken_from_a_file_are_read_when_asked_for(saved):
    array, path = saved
    labels = np.arange(50, dtype=np.int32)
    in_memory = Split(array, labels)
    in_file = Split(np.asarray(np.load(path, mmap_mode="r")), labels)
    for rows in (np.array([5, 1, 40]), np.arange(49, -1, -1)):
        expected, found = (split.take(rows) for split in (in_memory, in_file))
        assert "images" not in vars(found)
        assert len(found) == len(rows)
        assert found.image_shape == expected.image_shape
        assert found.nbytes == expected.nbytes
        some = np.array([2, 0])
        np.testing.assert_array_equal(found.read(some), expected.images[some])
        again = found.take(some)
        np.testing.assert_array_equal(again.images, expected.images[some])
        np.testing.assert_array_equal(again.labels, expected.labels[some])
        assert "images" not in vars(found)
        np.testing.assert_array_equal(found.images, expected.images)
    for picks in (labels % 7 == 3, np.array([-1, -50]), slice(3, 9, 2)):
        expected, found = (split.take(picks) for split in (in_memory, in_file))
        np.testing.assert_array_equal(found.images, expected.images)
        np.testing.assert_array_equal(found.labels, expected.labels)
    for rows in (np.array([50]), np.array([-1])):
        with pytest.raises(IndexError, match=r"must lie in 0\.\.49"):
            in_file.read(rows)
    with pytest.raises(DataError, match="at least one image"):
        in_file.take(np.array([], int))
