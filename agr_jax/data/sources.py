"""Finding a data set on disk by its name, and loading it."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agr_jax.data.cifar import read_cifar10, read_cifar100
from agr_jax.data.dataset import Dataset, class_balanced_subset, hold_out
from agr_jax.data.digits import read_digits
from agr_jax.data.tiny_imagenet import read_tiny_imagenet
from agr_jax.errors import DataError

DatasetName = Literal["digits", "cifar10", "cifar100", "tiny_imagenet"]
_SUBFOLDERS = ("", "downloads", "downloads/manual", "manual")


@dataclass(frozen=True)
class _Official:
    """What the authors of a data set publish."""

    title: str
    folder: str
    marker: str  # a file that shows that a folder of any name is this data set
    archive: str
    archive_bytes: int
    address: str
    sizes: str
    unreadable: tuple[str, ...]  # the pickle version
    read: Callable[[Path], Dataset]


_OFFICIAL = {
    "cifar10": _Official(
        title="CIFAR-10",
        folder="cifar-10-batches-bin",
        marker="data_batch_1.bin",
        archive="cifar-10-binary.tar.gz",
        archive_bytes=170_052_171,
        address="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        sizes="50,000 + 10,000 images",
        unreadable=("cifar-10-batches-py", "cifar-10-python.tar.gz"),
        read=read_cifar10,
    ),
    "cifar100": _Official(
        title="CIFAR-100",
        folder="cifar-100-binary",
        marker="fine_label_names.txt",
        archive="cifar-100-binary.tar.gz",
        archive_bytes=168_513_733,
        address="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        sizes="50,000 + 10,000 images of 100 classes",
        unreadable=("cifar-100-python", "cifar-100-python.tar.gz"),
        read=read_cifar100,
    ),
    "tiny_imagenet": _Official(
        title="Tiny ImageNet",
        folder="tiny-imagenet-200",
        marker="wnids.txt",
        archive="tiny-imagenet-200.zip",
        archive_bytes=248_100_043,
        address="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        sizes="100,000 + 10,000 images of 200 classes",
        unreadable=(),
        read=read_tiny_imagenet,
    ),
}


def load_dataset(
    name: DatasetName | str,
    *,
    directory: str | None = None,
    image_size: int | None = None,
    subset_ok: bool = False,
    train_examples: int | None = None,
    validation_examples: int = 0,
    seed: int = 0,
) -> Dataset:
    """Loads a data set into memory from files that are already on this machine.

    Args:
        name: "digits" (comes with scikit-learn), "cifar10", "cifar100" or "tiny_imagenet".
        directory: the only place to look at: the official folder or archive, or a folder that
            holds one. By default $TFDS_DATA_DIR, then ./data.
        image_size: 32 (the default, as in the official code) or 64; for tiny_imagenet only.
        subset_ok: accept files that hold a part of the official set.
        train_examples: keep a class-balanced draw of this many training examples; the set then
            counts as partial.
        validation_examples: first hold this many out of the training set, class-balanced. Which
            ones does not depend on `train_examples`.
        seed: of both draws, >= 0.

    Returns:
        uint8 images and int32 labels in splits train, test and, if asked for, validation.

    Raises:
        DataError: unknown name, not found, damaged, partial, or too few examples.
    """
    if name != "digits" and name not in _OFFICIAL:
        raise DataError(f"unknown data set {name!r}: expected digits, {', '.join(_OFFICIAL)}")
    if image_size is not None and name != "tiny_imagenet":
        raise DataError(f"image_size={image_size} is for tiny_imagenet only, not for {name}")
    if validation_examples < 0:
        raise DataError(f"validation_examples must be >= 0, got {validation_examples}")
    if name == "digits":
        dataset = read_digits()
    else:
        official = _OFFICIAL[name]
        path = _find(official, directory)
        if name == "tiny_imagenet":
            dataset = read_tiny_imagenet(path, image_size=32 if image_size is None else image_size)
        else:
            dataset = official.read(path)
        if not dataset.complete and not subset_ok:
            raise DataError(
                f"{path} holds a part of {official.title}: expected {official.sizes}, found "
                f"{len(dataset.train):,} + {len(dataset.test):,} images of {dataset.num_classes} "
                "classes; to use it all the same pass --config.data.subset_ok=True"
            )
    if validation_examples:
        with _named("validation_examples"):
            rest, held_out = hold_out(
                dataset.train, validation_examples, num_classes=dataset.num_classes, seed=seed
            )
        dataset = dataclasses.replace(dataset, train=rest, validation=held_out)
    if train_examples is not None:
        with _named("train_examples"):
            subset = class_balanced_subset(
                dataset.train, train_examples, num_classes=dataset.num_classes, seed=seed
            )
        complete = dataset.complete and len(subset) == len(dataset.train)
        dataset = dataclasses.replace(dataset, train=subset, complete=complete)
    return dataset


@contextmanager
def _named(field: str) -> Iterator[None]:
    """Puts the argument's name before the message of an error."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{field}: {error}") from error


def _find(official: _Official, directory: str | None) -> Path:
    """The first official folder or archive in the places to look at."""
    if directory is not None:
        bases = [Path(directory).expanduser()]
    else:
        from_environment = os.environ.get("TFDS_DATA_DIR")
        bases = [Path(from_environment).expanduser()] if from_environment else []
        bases.append(Path("data"))
    looked_at: list[str] = []
    unreadable: list[str] = []
    for base in bases:
        if base.is_file() or (base / official.marker).is_file() or base.name == official.folder:
            return base
        for place in (base / subfolder for subfolder in _SUBFOLDERS):
            looked_at.append(f"{place.absolute()}{'' if place.is_dir() else ' (does not exist)'}")
            found = _find_in(official, place)
            if found is not None:
                return found
            unreadable += [str(place / n) for n in official.unreadable if (place / n).exists()]
        if base.name in official.unreadable:
            unreadable.append(str(base))
    message = (
        f"{official.title} not found. Looked for the folder {official.folder} and the archive "
        f"{official.archive} in: {'; '.join(looked_at)}. Download {official.archive} "
        f"({official.archive_bytes:,} bytes, {official.archive_bytes / 1e6:.0f} MB) from "
        f"{official.address} and put it into ./data, or pass --config.data.dir=FOLDER with the "
        "folder that holds it."
    )
    if unreadable:
        message += (
            f" Found {', '.join(unreadable)}: that is the Python (pickle) version, which is never "
            "read; the binary version is needed."
        )
    raise DataError(message)


def _find_in(official: _Official, place: Path) -> Path | None:
    if (place / official.folder).is_dir():
        return place / official.folder
    if (place / official.archive).is_file():
        return place / official.archive
    # TensorFlow Datasets puts the address before the archive's name and a hash behind it.
    stem, dot, suffix = official.archive.partition(".")
    renamed = sorted(place.glob(f"*{stem}*{dot}{suffix}")) if place.name == "downloads" else []
    return renamed[0] if renamed else None
