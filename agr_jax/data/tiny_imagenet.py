"""Tiny ImageNet in its official layout: the folder or the .zip archive."""

import contextlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from agr_jax.data.archives import ZipMembers
from agr_jax.data.dataset import Dataset, Split
from agr_jax.errors import DataError

_FOLDER = "tiny-imagenet-200"
_NATIVE_SIZE = 64
_CLASSES = 200
_TRAIN_PER_CLASS = 500
_TEST_EXAMPLES = 10_000
_MEMBER_LIMIT = 16 * 2**20
_TOTAL_LIMIT = 2 * 2**30
_IMAGES_PER_TASK = 256


class _Tree(Protocol):
    """Files of the data set by their path relative to `tiny-imagenet-200`."""

    def listing(self, folder: str) -> list[str]:
        """Names of the JPEG files in a folder, sorted; empty if there is none."""

    def read(self, name: str) -> bytes:
        """Content of a file; DataError if it is missing."""


class _FolderTree:
    def __init__(self, root: Path) -> None:
        self._root = root

    def listing(self, folder: str) -> list[str]:
        path = self._root / folder
        return sorted(n for n in os.listdir(path) if _is_jpeg(n)) if path.is_dir() else []

    def read(self, name: str) -> bytes:
        try:
            return (self._root / name).read_bytes()
        except OSError as error:
            raise DataError(f"{self._root}: expected the file {name}, found none") from error


class _ZipTree:
    def __init__(self, members: ZipMembers) -> None:
        self._members = members
        self._listings: dict[str, list[str]] = {}
        for name in members.names:
            folder, _, file = name.removeprefix(f"{_FOLDER}/").rpartition("/")
            if _is_jpeg(file):
                self._listings.setdefault(folder, []).append(file)

    def listing(self, folder: str) -> list[str]:
        return sorted(self._listings.get(folder, []))

    def read(self, name: str) -> bytes:
        return self._members.read(f"{_FOLDER}/{name}")


def read_tiny_imagenet(path: str | Path, *, image_size: int = 64) -> Dataset:
    """Reads Tiny ImageNet from the folder `tiny-imagenet-200` or `tiny-imagenet-200.zip`.

    Class i is the i-th of the sorted WordNet ids, and the labelled validation images are the test
    split, as is usual: the official test images have no labels.

    Args:
        path: the folder or the archive.
        image_size: 64, or 32 for Pillow's antialiased bilinear resize (torchvision's `Resize`).

    Returns:
        uint8 [N, image_size, image_size, 3] images, grey ones converted to RGB; `complete` iff
        200 classes x 500 training images and 10,000 test images.

    Raises:
        DataError: missing or damaged, or Pillow is not installed.
    """
    if image_size not in (32, _NATIVE_SIZE):
        raise DataError(f"tiny_imagenet: image_size must be 32 or 64, got {image_size}")
    path = Path(path)
    with _open_tree(path) as tree:
        wordnet_ids = sorted(set(_lines(tree.read("wnids.txt"))))
        if not wordnet_ids:
            raise DataError(f"{path}: expected WordNet ids in wnids.txt, found none")
        train_files: list[str] = []
        train_labels: list[int] = []
        per_class = []
        for label, wordnet_id in enumerate(wordnet_ids):
            folder = f"train/{wordnet_id}/images"
            files = tree.listing(folder)
            if not files:
                raise DataError(f"{path}: expected JPEG images in {folder}, found none")
            per_class.append(len(files))
            train_files += [f"{folder}/{file}" for file in files]
            train_labels += [label] * len(files)
        test_files, test_labels = _annotations(path, tree, wordnet_ids)
        class_names = _class_names(tree, wordnet_ids)
        train = _decode(path, tree, train_files, train_labels, image_size)
        test = _decode(path, tree, test_files, test_labels, image_size)
    return Dataset(
        name="Tiny ImageNet",
        class_names=class_names,
        train=train,
        test=test,
        validation=None,
        source=str(path),
        complete=per_class == [_TRAIN_PER_CLASS] * _CLASSES and len(test) == _TEST_EXAMPLES,
    )


@contextlib.contextmanager
def _open_tree(path: Path) -> Iterator[_Tree]:
    if path.is_dir():
        yield _FolderTree(path)
    else:
        with ZipMembers(path, member_limit=_MEMBER_LIMIT, total_limit=_TOTAL_LIMIT) as members:
            yield _ZipTree(members)


def _annotations(path: Path, tree: _Tree, wordnet_ids: list[str]) -> tuple[list[str], list[int]]:
    """Files and labels of the test split, from val/val_annotations.txt."""
    labels_of = {wordnet_id: label for label, wordnet_id in enumerate(wordnet_ids)}
    present = set(tree.listing("val/images"))
    files: list[str] = []
    labels: list[int] = []
    for line in _lines(tree.read("val/val_annotations.txt")):
        name, wordnet_id, *_ = [*line.split("\t"), ""]
        if wordnet_id not in labels_of:
            raise DataError(
                f"{path}: val/val_annotations.txt: expected FILE<tab>WNID with a WNID of "
                f"wnids.txt, found {line!r}"
            )
        if name not in present:
            raise DataError(f"{path}: expected the image val/images/{name}, found none")
        files.append(f"val/images/{name}")
        labels.append(labels_of[wordnet_id])
    if not files:
        raise DataError(f"{path}: expected lines in val/val_annotations.txt, found none")
    return files, labels


def _class_names(tree: _Tree, wordnet_ids: list[str]) -> tuple[str, ...]:
    """First synonym of each class in words.txt, or its WordNet id."""
    try:
        lines = _lines(tree.read("words.txt"))
    except DataError:
        return tuple(wordnet_ids)
    words = dict(line.split("\t", 1) for line in lines if "\t" in line)
    return tuple(words.get(wordnet_id, wordnet_id).split(",")[0] for wordnet_id in wordnet_ids)


def _decode(path: Path, tree: _Tree, files: list[str], labels: list[int], image_size: int) -> Split:
    images = np.empty((len(files), image_size, image_size, 3), np.uint8)

    def decode_range(start: int) -> None:
        for index in range(start, min(start + _IMAGES_PER_TASK, len(files))):
            images[index] = _decode_jpeg(path, files[index], tree.read(files[index]), image_size)

    # Pillow decodes outside the interpreter lock, so threads suffice.
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(decode_range, range(0, len(files), _IMAGES_PER_TASK)):
            pass
    return Split(images, np.asarray(labels, np.int32))


def _decode_jpeg(path: Path, name: str, content: bytes, image_size: int) -> np.ndarray:
    """One image, uint8 [image_size, image_size, 3]."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("tiny_imagenet: Pillow is missing: pip install pillow") from error
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as opened:
            size = opened.size
            # Checked before decoding: a small file may declare a gigantic image.
            image = opened.convert("RGB") if size == (_NATIVE_SIZE, _NATIVE_SIZE) else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path}: unreadable image {name}: expected a JPEG file, "
            f"found {len(content):,} bytes: {error}"
        ) from error
    if image is None:
        raise DataError(
            f"{path}: image {name}: expected {_NATIVE_SIZE}x{_NATIVE_SIZE} pixels, "
            f"found {size[0]}x{size[1]}"
        )
    if image_size != _NATIVE_SIZE:
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _is_jpeg(name: str) -> bool:
    return name.lower().endswith((".jpeg", ".jpg")) and not name.startswith(".")


def _lines(content: bytes) -> list[str]:
    text = content.decode("utf-8", errors="replace")
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]
