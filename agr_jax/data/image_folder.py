"""A user's own images: `train/CLASS/*` beside `test/CLASS/*` or `val/CLASS/*`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from agr_jax.data.dataset import Allocate, Dataset, Split
from agr_jax.data.decoding import Resize, decode_all
from agr_jax.errors import DataError

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
_TEST_FOLDERS = ("test", "val")


def read_image_folder(
    path: str | Path,
    *,
    image_size: int,
    resize: Resize = "crop",
    allocate: Allocate = np.empty,
) -> Dataset:
    """Reads a tree of image files; a folder's name is the class of what is in it.

    Classes are the folders in `train`, sorted; images are sorted by name within a class. Files
    whose names do not end in one of `SUFFIXES`, or begin with a dot, are left out.

    Args:
        path: the folder that holds `train`, and `test` or else `val`.
        image_size: side of the images in pixels, >= 1.
        resize: `crop` resizes the shorter side and keeps the middle; `stretch` gives up the
            proportions.
        allocate: makes the array of a split's images.

    Returns:
        uint8 [N, image_size, image_size, 3] images, grey ones converted to RGB; `complete`.

    Raises:
        DataError: another layout, an unreadable file, which is named, or no Pillow.
    """
    path = Path(path)
    if image_size < 1:
        raise DataError(f"image_size must be >= 1 for an image folder, got {image_size}")
    if resize not in ("crop", "stretch"):
        raise DataError(f"resize must be 'crop' or 'stretch', got {resize!r}")
    test, classes = _layout(path)

    def read(split: str, required: Sequence[str]) -> Split:
        files: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            found = _images(path / split / name)
            if not found and name in required:
                raise DataError(
                    f"{path / split / name}: expected images ({', '.join(SUFFIXES)}), found none"
                )
            files += [f"{split}/{name}/{file}" for file in found]
            labels += [label] * len(found)
        if not files:
            raise DataError(
                f"{path / split}: expected images ({', '.join(SUFFIXES)}) in folders of the "
                f"classes {_shortened(classes)}, found none"
            )
        images = allocate((len(files), image_size, image_size, 3), np.uint8)
        decode_all(
            files, lambda file: _content(path / file), images, source=str(path), resize=resize
        )
        return Split(images, np.asarray(labels, np.int32))

    return Dataset(
        name=path.resolve().name,
        class_names=tuple(classes),
        train=read("train", classes),
        test=read(test, ()),
        validation=None,
        source=str(path),
        complete=True,
    )


def _layout(path: Path) -> tuple[str, list[str]]:
    """The name of the test images' folder, and the classes.

    Raises:
        DataError: another layout.
    """
    test = next((name for name in _TEST_FOLDERS if (path / name).is_dir()), None)
    if test is None or not (path / "train").is_dir():
        raise DataError(
            f"{path}: expected the folders train and test (or val), with a folder for each class "
            f"in both; found {_shortened(_names(path)) if path.is_dir() else 'no such folder'}"
        )
    classes = [name for name in _names(path / "train") if (path / "train" / name).is_dir()]
    if len(classes) < 2:
        raise DataError(
            f"{path / 'train'}: expected a folder for each of at least 2 classes, found "
            f"{_shortened(classes)}"
        )
    unknown = [
        name
        for name in _names(path / test)
        if (path / test / name).is_dir() and name not in classes
    ]
    if unknown:
        raise DataError(
            f"{path / test}: expected the classes of train ({_shortened(classes)}), found also "
            f"{_shortened(unknown)}"
        )
    return test, classes


def _names(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def _images(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return [name for name in _names(folder) if name.lower().endswith(SUFFIXES)]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: unreadable image: {error}") from error


def _shortened(names: Sequence[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
