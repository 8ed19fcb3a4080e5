"""Decoded data sets on disk, memory-mapped, so that a second start decodes nothing.

One folder for one source, size and version: `.npy` files and `about.json`. It is written under
another name and renamed when it is whole, so that two processes at once, or a kill, do no harm.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from agr_jax import distributed
from agr_jax.data.dataset import Allocate, Dataset, Split
from agr_jax.errors import DataError

# To be raised whenever a reader gives other pixels, labels or order than before.
_VERSION = 1
_SPLITS = ("train", "test")
_ABOUT = "about.json"
_PARTIAL = ".partial-"
_SECONDS_UNTIL_ABANDONED = 24 * 3600


def default_folder() -> Path:
    """`agr_jax/data` in the user's cache folder (`$XDG_CACHE_HOME`, or `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agr_jax" / "data"


def load_or_build(
    name: str,
    path: Path,
    settings: Mapping[str, Any],
    build: Callable[[Allocate], Dataset],
    *,
    folder: Path | None = None,
) -> Dataset:
    """The decoded data set from the cache, or built and then kept there.

    Args:
        name: of the data set; part of the cache entry's name.
        path: the archive or folder that it is read from. Whatever changes sizes, names or times of
            its files makes another entry, which replaces the old one.
        settings: what else decides about the result, such as the image size; JSON values.
        build: reads and checks the data set; gets what makes arrays on disk.
        folder: of the cache, by default `default_folder()`.

    Returns:
        A data set with memory-mapped images.

    Raises:
        DataError: what `build` raises. A cache that cannot be written is reported, not raised.
    """
    folder = default_folder() if folder is None else folder
    source = {"path": str(path.resolve()), "settings": dict(settings), "name": name}
    family = _short_digest(source)
    entry = folder / f"{name}-{family}-{_short_digest([_VERSION, fingerprint(path)])}"
    found = _load(entry, path)
    if found is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _forget_abandoned(folder)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder))
    except OSError as error:
        distributed.say(f"no cache of decoded images: {folder} cannot be written: {error}")
        return build(np.empty)
    try:
        dataset = build(_OnDisk(partial))
        try:
            _write(partial, dataset)
            _publish(partial, entry)
        except OSError as error:
            distributed.say(f"no cache of decoded images: {folder} cannot be written: {error}")
            return dataset
    finally:
        # What is mapped from there stays readable.
        shutil.rmtree(partial, ignore_errors=True)
    for old in folder.glob(f"{name}-{family}-*"):
        if old != entry:
            shutil.rmtree(old, ignore_errors=True)  # the source has changed since
    found = _load(entry, path)
    return dataset if found is None else found


def fingerprint(path: Path) -> str:
    """A digest of names, sizes and times of a file, or of all files in a folder.

    Raises:
        DataError: no such file or folder.
    """
    try:
        if path.is_dir():
            facts = sorted(_facts(os.fspath(path), ""))
        else:
            found = path.stat()
            facts = [(path.name, found.st_size, found.st_mtime_ns)]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return _short_digest(facts)


def _facts(folder: str, prefix: str) -> Iterator[tuple[str, int, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _facts(entry.path, f"{prefix}{entry.name}/")
            else:
                found = entry.stat()
                yield prefix + entry.name, found.st_size, found.st_mtime_ns


def _short_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class _OnDisk:
    """Makes arrays in a folder; in memory where the disk has no room for them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made = 0

    def __call__(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        path = self._folder / f"array-{self._made}.npy"
        self._made += 1
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
            "fortran_order": False,
            "shape": tuple(shape),
        }
        try:
            with path.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                # All of it now: a full disk under a mapped array would kill the process.
                size = int(np.prod(shape)) * np.dtype(dtype).itemsize
                os.posix_fallocate(file.fileno(), file.tell(), size)
            array: np.ndarray = np.load(path, mmap_mode="r+", allow_pickle=False)
        except OSError:
            path.unlink(missing_ok=True)
            return np.empty(shape, dtype)
        return array


def _write(folder: Path, dataset: Dataset) -> None:
    files: dict[str, dict[str, str]] = {}
    for name in _SPLITS:
        split: Split = getattr(dataset, name)
        images = split.images
        if isinstance(images, np.memmap) and Path(str(images.filename)).parent == folder:
            images.flush()
            kept = Path(str(images.filename)).name
        else:
            kept = f"{name}-images.npy"
            np.save(folder / kept, images, allow_pickle=False)
        np.save(folder / f"{name}-labels.npy", split.labels, allow_pickle=False)
        files[name] = {"images": kept, "labels": f"{name}-labels.npy"}
    about = {
        "name": dataset.name,
        "class_names": list(dataset.class_names),
        "complete": dataset.complete,
        "digests": dict(dataset.digests),
        "files": files,
    }
    (folder / _ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _publish(partial: Path, entry: Path) -> None:
    """Renames; if another process was faster its entry, which is the same, stays."""
    try:
        partial.rename(entry)
    except OSError:
        if not (entry / _ABOUT).is_file():
            raise


def _load(entry: Path, path: Path) -> Dataset | None:
    """The data set in an entry; `None` if there is none, or it is damaged."""
    try:
        about = json.loads((entry / _ABOUT).read_text(encoding="utf-8"))
        splits = {
            name: Split(
                _mapped(entry / files["images"]),
                np.load(entry / files["labels"], allow_pickle=False),
            )
            for name, files in about["files"].items()
        }
        return Dataset(
            name=about["name"],
            class_names=tuple(about["class_names"]),
            train=splits["train"],
            test=splits["test"],
            validation=None,
            source=str(path),
            complete=about["complete"],
            digests=about["digests"],
        )
    except FileNotFoundError:
        if not entry.exists():
            return None
        reason = "a file is missing"
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        reason = str(error)
    distributed.say(f"decoding again: the cache {entry} is damaged: {reason}")
    shutil.rmtree(entry, ignore_errors=True)
    return None


def _mapped(path: Path) -> np.ndarray:
    # Without its own class, a mapped array is an array like any other.
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _forget_abandoned(folder: Path) -> None:
    """Removes what killed processes left unfinished a day ago and earlier."""
    for path in folder.glob(f"{_PARTIAL}*"):
        try:
            written = path.stat().st_mtime
        except FileNotFoundError:  # another process was faster
            continue
        if time.time() - written <= _SECONDS_UNTIL_ABANDONED:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:  # of `extra`
            path.unlink(missing_ok=True)
