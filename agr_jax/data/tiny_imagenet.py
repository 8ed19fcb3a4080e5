"""Tiny ImageNet in its official layout: the folder or the .zip archive."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from agr_jax.data.archives import ZipMembers
from agr_jax.data.dataset import Allocate, Dataset, Split
from agr_jax.data.decoding import decode_all
from agr_jax.data.official import Official
from agr_jax.errors import DataError

# The archive's checksum is the one that its PyTorch loaders check. There are no digests of records
# yet: they can only be taken from the whole set.
TINY_IMAGENET = Official(
    name="tiny_imagenet",
    title="Tiny ImageNet",
    folder="tiny-imagenet-200",
    marker="wnids.txt",
    archive="tiny-imagenet-200.zip",
    archive_bytes=248_100_043,
    checksum="md5:90528d7ca1a48142e341f4ef8d21d0de",
    address="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    sizes=(100_000, 10_000),
    classes=200,
    side=64,
    read=lambda path, image_size, allocate: read_tiny_imagenet(
        path, image_size=image_size, allocate=allocate
    ),
    image_sizes=(32, 64),  # 32 as in AGR's published code
)
_MEMBER_LIMIT = 16 * 2**20
_TOTAL_LIMIT = 2 * 2**30


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
            folder, _, file = name.removeprefix(f"{TINY_IMAGENET.folder}/").rpartition("/")
            if _is_jpeg(file):
                self._listings.setdefault(folder, []).append(file)

    def listing(self, folder: str) -> list[str]:
        return sorted(self._listings.get(folder, []))

    def read(self, name: str) -> bytes:
        return self._members.read(f"{TINY_IMAGENET.folder}/{name}")


def read_tiny_imagenet(
    path: str | Path, *, image_size: int = 64, allocate: Allocate = np.empty
) -> Dataset:
    """Reads Tiny ImageNet from the folder `tiny-imagenet-200` or `tiny-imagenet-200.zip`.

    Class i is the i-th of the sorted WordNet ids, and the labelled validation images are the test
    split, as is usual: the official test images have no labels.

    Args:
        path: the folder or the archive.
        image_size: 64, or 32 for Pillow's antialiased bilinear resize (torchvision's `Resize`).
        allocate: makes the array of a split's images.

    Returns:
        uint8 [N, image_size, image_size, 3] images, grey ones converted to RGB; `complete` iff
        200 classes x 500 training images and 10,000 test images.

    Raises:
        DataError: missing or damaged, or Pillow is not installed.
    """
    if image_size not in TINY_IMAGENET.image_sizes:
        raise DataError(f"tiny_imagenet: image_size must be 32 or 64, got {image_size}")
    path = Path(path)
    with _open_tree(path) as tree:
        class_names, files = _listed(path, tree)
        train = _decode(path, tree, files["train"], image_size, allocate)
        test = _decode(path, tree, files["test"], image_size, allocate)
    of_train, of_test = TINY_IMAGENET.sizes
    per_class = np.bincount(train.labels, minlength=len(class_names))
    return Dataset(
        name=TINY_IMAGENET.title,
        class_names=class_names,
        train=train,
        test=test,
        validation=None,
        source=str(path),
        complete=per_class.tolist() == [of_train // TINY_IMAGENET.classes] * TINY_IMAGENET.classes
        and len(test) == of_test,
    )


def list_files(path: str | Path) -> tuple[tuple[str, ...], dict[str, list[tuple[str, int]]]]:
    """The names of the classes, and the files of both splits with their labels.

    Raises:
        DataError: missing or damaged.
    """
    with _open_tree(Path(path)) as tree:
        return _listed(Path(path), tree)


def contents(
    path: str | Path, files: Sequence[tuple[str, int]]
) -> Iterator[tuple[str, int, bytes]]:
    """Name, label and content of each file that `list_files` gave.

    Raises:
        DataError: missing or damaged.
    """
    with _open_tree(Path(path)) as tree:
        for name, label in files:
            yield name, label, tree.read(name)


def _listed(path: Path, tree: _Tree) -> tuple[tuple[str, ...], dict[str, list[tuple[str, int]]]]:
    wordnet_ids = sorted(set(_lines(tree.read("wnids.txt"))))
    if not wordnet_ids:
        raise DataError(f"{path}: expected WordNet ids in wnids.txt, found none")
    train: list[tuple[str, int]] = []
    for label, wordnet_id in enumerate(wordnet_ids):
        folder = f"train/{wordnet_id}/images"
        names = tree.listing(folder)
        if not names:
            raise DataError(f"{path}: expected JPEG images in {folder}, found none")
        train += [(f"{folder}/{name}", label) for name in names]
    test = _annotations(path, tree, wordnet_ids)
    return _class_names(tree, wordnet_ids), {"train": train, "test": test}


@contextlib.contextmanager
def _open_tree(path: Path) -> Iterator[_Tree]:
    if path.is_dir():
        yield _FolderTree(path)
    else:
        with ZipMembers(path, member_limit=_MEMBER_LIMIT, total_limit=_TOTAL_LIMIT) as members:
            yield _ZipTree(members)


def _annotations(path: Path, tree: _Tree, wordnet_ids: list[str]) -> list[tuple[str, int]]:
    """Files and labels of the test split, from val/val_annotations.txt."""
    labels_of = {wordnet_id: label for label, wordnet_id in enumerate(wordnet_ids)}
    present = set(tree.listing("val/images"))
    files: list[tuple[str, int]] = []
    for line in _lines(tree.read("val/val_annotations.txt")):
        name, wordnet_id, *_ = [*line.split("\t"), ""]
        if wordnet_id not in labels_of:
            raise DataError(
                f"{path}: val/val_annotations.txt: expected FILE<tab>WNID with a WNID of "
                f"wnids.txt, found {line!r}"
            )
        if name not in present:
            raise DataError(f"{path}: expected the image val/images/{name}, found none")
        files.append((f"val/images/{name}", labels_of[wordnet_id]))
    if not files:
        raise DataError(f"{path}: expected lines in val/val_annotations.txt, found none")
    return files


def _class_names(tree: _Tree, wordnet_ids: list[str]) -> tuple[str, ...]:
    """First synonym of each class in words.txt, or its WordNet id."""
    try:
        lines = _lines(tree.read("words.txt"))
    except DataError:
        return tuple(wordnet_ids)
    words = dict(line.split("\t", 1) for line in lines if "\t" in line)
    return tuple(words.get(wordnet_id, wordnet_id).split(",")[0] for wordnet_id in wordnet_ids)


def _decode(
    path: Path,
    tree: _Tree,
    files: Sequence[tuple[str, int]],
    image_size: int,
    allocate: Allocate,
) -> Split:
    images = allocate((len(files), image_size, image_size, 3), np.uint8)
    names = [name for name, _ in files]
    decode_all(names, tree.read, images, source=str(path), native_size=TINY_IMAGENET.side)
    return Split(images, np.array([label for _, label in files], np.int32))


def _is_jpeg(name: str) -> bool:
    return name.lower().endswith((".jpeg", ".jpg")) and not name.startswith(".")


def _lines(content: bytes) -> list[str]:
    text = content.decode("utf-8", errors="replace")
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]
