"""The data sets of the paper as their authors publish them: archives, addresses, sizes, digests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


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
    unreadable: tuple[str, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def described(self) -> str:
        """For messages."""
        train, test = self.sizes
        return f"{train:,} + {test:,} images of {self.classes} classes"


# The CIFAR archives' checksums are those that TensorFlow Datasets publishes; Tiny ImageNet's is
# the one that its PyTorch loaders check. CIFAR-100 and Tiny ImageNet have no digests of records
# yet: they can only be taken from the whole sets.
OFFICIAL = {
    one.name: one
    for one in (
        Official(
            name="cifar10",
            title="CIFAR-10",
            folder="cifar-10-batches-bin",
            marker="data_batch_1.bin",
            archive="cifar-10-binary.tar.gz",
            archive_bytes=170_052_171,
            checksum="sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            address="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            sizes=(50_000, 10_000),
            classes=10,
            unreadable=("cifar-10-batches-py", "cifar-10-python.tar.gz"),
            digests={
                "train": "3cb34bc1eb7b3510d605b1a112ba2921cd6b3cd80ca2d046129ed2eb563c0571",
                "test": "268e889ad366fcc26a10ded082db6922af67d7ad6066328d098e5093806a6511",
            },
        ),
        Official(
            name="cifar100",
            title="CIFAR-100",
            folder="cifar-100-binary",
            marker="fine_label_names.txt",
            archive="cifar-100-binary.tar.gz",
            archive_bytes=168_513_733,
            checksum="sha256:58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            address="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            sizes=(50_000, 10_000),
            classes=100,
            unreadable=("cifar-100-python", "cifar-100-python.tar.gz"),
        ),
        Official(
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
        ),
    )
}


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
