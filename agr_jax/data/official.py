"""What the authors of a data set publish: archive, address, sizes, digests; and who reads it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from agr_jax.data.dataset import Allocate, Dataset


@dataclass(frozen=True)
class Official:
    """What the authors of a data set publish.

    Attributes:
        name: in configs, and of the TFDS builder.
        title: as people write it.
        folder: what the archive unpacks to.
        marker: a file that shows that a folder of any name is this data set.
        archive: file name.
        archive_bytes: its size.
        checksum: of the archive, `sha256:...` or `md5:...`, for downloads.
        address: where it is downloaded from.
        sizes: number of training and test images.
        classes: number of classes.
        side: of its square images.
        read: reads the folder or archive: `read(path, image_size, allocate)`; the size is one of
            `image_sizes`.
        image_sizes: that its images may be resized to; the first one is the default.
        unreadable: names of the pickle version, which is never read.
        digests: `records_digest` of each split, images in the official order and size.
    """

    name: str
    title: str
    folder: str
    marker: str
    archive: str
    archive_bytes: int
    checksum: str
    address: str
    sizes: tuple[int, int]
    classes: int
    side: int
    read: Callable[[Path, int, Allocate], Dataset]
    image_sizes: tuple[int, ...]
    unreadable: tuple[str, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def described(self) -> str:
        """For messages."""
        train, test = self.sizes
        return f"{train:,} + {test:,} images of {self.classes} classes"


def records_digest(images: np.ndarray, labels: np.ndarray) -> str:
    """SHA-256 of shape, pixels and labels, in hexadecimal.

    Args:
        images: uint8 [N, H, W, C].
        labels: integers [N].
    """
    found = hashlib.sha256(str(images.shape).encode())
    for start in range(0, len(images), 4096):
        found.update(np.ascontiguousarray(images[start : start + 4096]).data)
    found.update(np.ascontiguousarray(labels, "<i4").data)
    return found.hexdigest()
