"""The cache of decoded images: the same pixels, rebuilt when the source changes, safe."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from official_archives import as_tar

from agr_jax.data import cache, cifar, load_dataset
from agr_jax.data.official import records_digest
from agr_jax.errors import DataError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The cache's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "agr_jax" / "data"


def made_cifar10(root, seed=0):
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for file in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        table = generator.integers(0, 256, (20, 3073), np.uint8)
        table[:, 0] = np.arange(20) % 10
        (folder / file).write_bytes(table.tobytes())
    return folder


def load(path, **options):
    return load_dataset("cifar10", directory=str(path), subset_ok=True, **options)


def same(left, right):
    for split in ("train", "test"):
        np.testing.assert_array_equal(getattr(left, split).images, getattr(right, split).images)
        np.testing.assert_array_equal(getattr(left, split).labels, getattr(right, split).labels)
    assert (left.name, left.class_names, left.source, left.complete, left.digests) == (
        right.name,
        right.class_names,
        right.source,
        right.complete,
        right.digests,
    )


def forbid_reading(monkeypatch):
    def read(path):
        raise AssertionError("decoded again")

    monkeypatch.setattr(cifar, "read_cifar10", read)


def test_the_second_start_decodes_nothing(tmp_path, folder, monkeypatch):
    path = made_cifar10(tmp_path)
    plain = load(path)
    same(load(path, use_cache=True), plain)
    forbid_reading(monkeypatch)
    again = load(path, use_cache=True)
    same(again, plain)
    assert not again.train.images.flags.writeable
    (entry,) = folder.iterdir()
    about = json.loads((entry / "about.json").read_text())
    assert about["digests"]["train"] == records_digest(plain.train.images, plain.train.labels)


def test_draws_come_from_the_cache_too(tmp_path, folder, monkeypatch):
    path = made_cifar10(tmp_path)
    options = {"train_examples": 40, "validation_examples": 20, "seed": 5}
    plain = load(path, **options)
    load(path, use_cache=True)
    forbid_reading(monkeypatch)
    cached = load(path, use_cache=True, **options)
    same(cached, plain)
    np.testing.assert_array_equal(cached.validation.images, plain.validation.images)


def test_a_changed_source_is_decoded_again_and_replaces_the_old(tmp_path, folder):
    path = made_cifar10(tmp_path)
    load(path, use_cache=True)
    made_cifar10(tmp_path, seed=1)
    os.utime(path / "test_batch.bin", ns=(1, 1))  # same size and content: the time is enough
    same(load(path, use_cache=True), load(path))
    assert len(list(folder.iterdir())) == 1


def test_sources_and_sizes_have_entries_of_their_own(tmp_path, folder):
    path = made_cifar10(tmp_path / "a")
    other = as_tar(made_cifar10(tmp_path / "b", seed=1), tmp_path / "cifar-10-binary.tar.gz")
    same(load(path, use_cache=True), load(path))
    same(load(other, use_cache=True), load(other))
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("damage", ["truncated", "missing", "no json", "labels"])
def test_a_damaged_entry_is_built_again(tmp_path, folder, capsys, damage):
    path = made_cifar10(tmp_path)
    plain = load(path, use_cache=True)
    (entry,) = folder.iterdir()
    images = entry / json.loads((entry / "about.json").read_text())["files"]["train"]["images"]
    if damage == "truncated":
        os.truncate(images, 1000)
    elif damage == "missing":
        images.unlink()
    elif damage == "no json":
        (entry / "about.json").write_text("{")
    else:
        np.save(entry / "test-labels.npy", np.full(20, 99, np.int32))
    expected = load(path)
    same(load(path, use_cache=True), expected)
    assert f"decoding again: the cache {entry} is damaged" in capsys.readouterr().out
    assert plain.complete is False
    same(load(path, use_cache=True), expected)
    assert capsys.readouterr().out == ""


def test_a_cache_that_cannot_be_written_is_reported_and_done_without(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = made_cifar10(tmp_path)
    same(load(path, use_cache=True), load(path))
    assert "no cache of decoded images" in capsys.readouterr().out


def test_a_full_disk_is_reported_and_done_without(tmp_path, folder, monkeypatch, capsys):
    path = made_cifar10(tmp_path)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    loaded = load(path, use_cache=True)
    monkeypatch.undo()
    same(loaded, load(path))
    assert "No space left on device" in capsys.readouterr().out
    assert list(folder.iterdir()) == []


def test_arrays_on_a_full_disk_are_made_in_memory(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    array = cache._OnDisk(tmp_path)((3, 4), np.uint8)
    assert array.shape == (3, 4)
    assert not isinstance(array, np.memmap)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_refused_leaves_nothing(tmp_path, folder):
    path = made_cifar10(tmp_path)
    (path / "test_batch.bin").write_bytes(b"\x0b" * 3073)
    with pytest.raises(DataError, match="label 11 of record 0"):
        load(path, use_cache=True)
    assert list(folder.iterdir()) == []


def test_what_a_killed_process_left_is_removed_a_day_later(tmp_path, folder):
    old, recent = folder / ".partial-old", folder / ".partial-recent"
    for path in (old, recent):
        path.mkdir(parents=True)
    file = folder / ".partial-extra-0.npy.1"
    file.touch()
    for path in (old, file):
        os.utime(path, (1, 1))
    load(made_cifar10(tmp_path), use_cache=True)
    assert not old.exists()
    assert not file.exists()
    assert recent.exists()


def test_what_another_process_removes_first_is_no_error(tmp_path, monkeypatch):
    gone = tmp_path / ".partial-gone"
    monkeypatch.setattr(cache.Path, "glob", lambda *_: iter([gone]))
    cache._forget_abandoned(tmp_path)
    assert not gone.exists()


def test_processes_at_once_all_get_the_same(tmp_path, folder):
    path = made_cifar10(tmp_path)
    program = (
        "import sys\n"
        "from agr_jax.data import load_dataset\n"
        "d = load_dataset('cifar10', directory=sys.argv[1], subset_ok=True, use_cache=True)\n"
        "print(int(d.train.images.sum()), d.digests['train'])\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for _ in range(4)
    ]
    printed = {process.communicate()[0] for process in processes}
    assert all(process.returncode == 0 for process in processes)
    plain = load(path)
    assert printed == {
        f"{int(plain.train.images.sum())} {load(path, use_cache=True).digests['train']}\n"
    }
    assert len(list(folder.iterdir())) == 1
