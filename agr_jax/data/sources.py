"""Finding a data set by its name, on this machine or else on the network, and loading it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from agr_jax import distributed
from agr_jax.config import Config, imported
from agr_jax.data import cache, tfds_reader
from agr_jax.data.cifar import CIFAR10, CIFAR100
from agr_jax.data.dataset import Allocate, Dataset, class_balanced_subset, hold_out
from agr_jax.data.decoding import Resize
from agr_jax.data.digits import read_digits
from agr_jax.data.download import DownloadError, download
from agr_jax.data.image_folder import read_image_folder
from agr_jax.data.official import Official, records_digest
from agr_jax.data.tiny_imagenet import TINY_IMAGENET
from agr_jax.errors import ConfigError, DataError

OFFICIAL: dict[str, Official] = {one.name: one for one in (CIFAR10, CIFAR100, TINY_IMAGENET)}
"""The data sets whose archives are read, by their names in configs."""
TITLES: Mapping[str, str] = {
    "digits": "digits",
    **{name: official.title for name, official in OFFICIAL.items()},
    "image_folder": "image folder",
}
"""All data sets: what people call them, by their names in configs."""
_SUBFOLDERS = ("", "downloads", "downloads/manual", "manual")


def load_dataset(
    name: str,
    *,
    directory: str | None = None,
    image_size: int | None = None,
    resize: Resize = "crop",
    subset_ok: bool = False,
    train_examples: int | None = None,
    validation_examples: int = 0,
    seed: int = 0,
    may_download: bool = False,
    use_cache: bool = False,
) -> Dataset:
    """Loads a data set, from the first of these places that has it.

    `directory`, and no other place, if it is given; `$TFDS_DATA_DIR`; `./data`; the default folder
    of TensorFlow Datasets, `~/tensorflow_datasets`; the official address. In a folder the official
    folder or archive is looked for, also in its `downloads`, `downloads/manual` and `manual`, and
    what TFDS prepared, `<name>/<version>`, in the folder itself.

    Args:
        name: "digits" (comes with scikit-learn), "cifar10", "cifar100", "tiny_imagenet", or
            "image_folder" (`read_image_folder`), which needs `directory` and `image_size`.
        directory: the only place to look at.
        image_size: side of an image folder's images; for tiny_imagenet 32 (the default, as in the
            official code) or 64; not for the others.
        resize: `crop` or `stretch`, for an image folder.
        subset_ok: accept a part of the official set, or images that differ from it.
        train_examples: keep a class-balanced draw of this many training examples; the set then
            counts as partial.
        validation_examples: first hold this many out of the training set, class-balanced. Which
            ones does not depend on `train_examples`.
        seed: of both draws, >= 0.
        may_download: fetch the official archive where nothing was found, into `$TFDS_DATA_DIR` or
            `~/tensorflow_datasets`.
        use_cache: keep the decoded images in `cache.default_folder()`, and use what is there.

    Returns:
        uint8 images and int32 labels in splits train, test and, if asked for, validation. With the
        cache the images are memory-mapped.

    Raises:
        DataError: unknown name, not found, damaged, partial, or too few examples.
    """
    _check_arguments(name, directory, image_size, validation_examples)
    if name == "digits":
        dataset = read_digits()
    elif name == "image_folder":
        dataset = _image_folder(
            Path(str(directory)).expanduser(), image_size or 0, resize, use_cache
        )
    else:
        official = OFFICIAL[name]
        path = find(official, directory, may_download=may_download)
        if len(official.image_sizes) > 1 and image_size is None:
            image_size = official.image_sizes[0]
        dataset = _official(official, path, image_size, subset_ok, use_cache)
    return _parts(dataset, train_examples, validation_examples, seed)


def from_config(config: Config) -> Dataset:
    """The data set that a config names.

    Args:
        config: settings of the run; `config.data.name` is a name of `load_dataset`, or
            `MODULE:FUNCTION` of your own, called with the config, which returns a `Dataset`. What
            of `config.data` it respects is its own affair, but for the examples that are held out
            or left out, which are taken from what it returns.

    Raises:
        ConfigError: if the function of your own cannot be imported, or returns no `Dataset`.
        DataError: as `load_dataset`.
    """
    data = config.data
    if imported.is_imported(data.name):
        made = imported.function("config.data.name", data.name)(config)
        if not isinstance(made, Dataset):
            raise ConfigError(
                f"config.data.name: {data.name} must return an agr_jax.data.Dataset, got "
                f"{type(made).__name__}"
            )
        digests = made.digests or _digests(made)
        return _parts(
            dataclasses.replace(made, digests=digests),
            data.train_examples or None,
            data.validation_examples,
            config.seed,
        )
    return load_dataset(
        data.name,
        directory=data.dir or None,
        image_size=data.image_size or None,
        resize=data.resize,
        subset_ok=data.subset_ok,
        train_examples=data.train_examples or None,
        validation_examples=data.validation_examples,
        seed=config.seed,
        may_download=data.download,
        use_cache=data.cache,
    )


def _parts(
    dataset: Dataset, train_examples: int | None, validation_examples: int, seed: int
) -> Dataset:
    """The data set with examples held out, and then with others left out."""
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


def _check_arguments(
    name: str, directory: str | None, image_size: int | None, validation_examples: int
) -> None:
    if name not in TITLES:
        raise DataError(f"unknown data set {name!r}: expected {', '.join(TITLES)}")
    if name == "image_folder":
        if directory is None:
            raise DataError("image_folder: dir must name the folder that holds train and test")
        if not image_size:
            raise DataError("image_folder: image_size must be given, in pixels")
    elif image_size is not None and (name not in OFFICIAL or len(OFFICIAL[name].image_sizes) == 1):
        resized = [other for other, official in OFFICIAL.items() if len(official.image_sizes) > 1]
        raise DataError(
            f"image_size={image_size} is for {', '.join(resized)} and image_folder only, not for "
            f"{name}"
        )
    if validation_examples < 0:
        raise DataError(f"validation_examples must be >= 0, got {validation_examples}")


def _official(
    official: Official, path: Path, image_size: int | None, subset_ok: bool, use_cache: bool
) -> Dataset:
    def build(allocate: Allocate) -> Dataset:
        if tfds_reader.is_prepared(path):
            dataset = tfds_reader.read_prepared(path, official, image_size=image_size)
        else:
            dataset = official.read(path, image_size or official.image_sizes[0], allocate)
        digests = _digests(dataset)
        differing = [split for split, d in official.digests.items() if digests[split] != d]
        if dataset.complete and differing:
            dataset = dataclasses.replace(dataset, complete=False)
        return dataclasses.replace(dataset, digests=digests)

    if use_cache:
        settings = {"image_size": image_size}
        dataset = cache.load_or_build(official.name, path, settings, build)
    else:
        dataset = build(np.empty)
    if not (dataset.complete or subset_ok):
        raise DataError(_incomplete(official, path, dataset))
    return dataset


def _incomplete(official: Official, path: Path, dataset: Dataset) -> str:
    found = (len(dataset.train), len(dataset.test)), dataset.num_classes
    permit = "to use it all the same pass --config.data.subset_ok=True"
    differing = (s for s, digest in official.digests.items() if dataset.digests[s] != digest)
    split = next(differing, None)
    if found == (official.sizes, official.classes) and split is not None:
        return (
            f"{path} does not hold the images and labels of {official.title}, though as many: "
            f"expected SHA-256 {official.digests[split]} of the {split} records, found "
            f"{dataset.digests[split]}; get the official archive again, or {permit}"
        )
    return (
        f"{path} holds a part of {official.title}: expected {official.described}, found "
        f"{len(dataset.train):,} + {len(dataset.test):,} images of {dataset.num_classes} "
        f"classes; {permit}"
    )


def _image_folder(path: Path, image_size: int, resize: Resize, use_cache: bool) -> Dataset:
    def build(allocate: Allocate) -> Dataset:
        dataset = read_image_folder(path, image_size=image_size, resize=resize, allocate=allocate)
        return dataclasses.replace(dataset, digests=_digests(dataset))

    if not use_cache:
        return build(np.empty)
    settings = {"image_size": image_size, "resize": resize}
    return cache.load_or_build("image_folder", path, settings, build)


def _digests(dataset: Dataset) -> dict[str, str]:
    return {
        name: records_digest(split.images, split.labels)
        for name, split in (("train", dataset.train), ("test", dataset.test))
    }


@contextmanager
def _named(field: str) -> Iterator[None]:
    """Puts the argument's name before the message of an error."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{field}: {error}") from error


def default_tfds_folder() -> Path:
    """Where TensorFlow Datasets puts data sets by default."""
    return Path.home() / "tensorflow_datasets"


def _bases(directory: str | None) -> list[Path]:
    if directory is not None:
        return [Path(directory).expanduser()]
    from_environment = os.environ.get("TFDS_DATA_DIR")
    bases = [Path(from_environment).expanduser()] if from_environment else []
    return [*bases, Path("data"), default_tfds_folder()]


def find(official: Official, directory: str | None, *, may_download: bool = False) -> Path:
    """The first official folder, archive or prepared folder in the places to look at.

    Args:
        official: what to look for.
        directory: the only place, or `None` for all.
        may_download: fetch the archive where nothing was found and no place was given.

    Raises:
        DataError: nothing found: the places, and what to do.
    """
    looked_at: list[str] = []
    unreadable: list[str] = []
    for base in _bases(directory):
        found = find_raw(official, base)
        if found is None:
            found = base if tfds_reader.is_prepared(base) else None
        if found is None:
            found = tfds_reader.find_prepared(base, official.name)
        if found is not None:
            return found
        for place in (base / subfolder for subfolder in _SUBFOLDERS):
            looked_at.append(f"{place.absolute()}{'' if place.is_dir() else ' (does not exist)'}")
            unreadable += [str(place / n) for n in official.unreadable if (place / n).exists()]
        if base.name in official.unreadable:
            unreadable.append(str(base))
    failed = ""
    if may_download and directory is None:
        try:
            return fetch(official)
        except DownloadError as error:
            failed = f" Downloading it failed: {error}."
    raise DataError(_not_found(official, looked_at, unreadable, failed))


def find_raw(official: Official, base: Path) -> Path | None:
    """The official folder or archive at a place, in it, or in its folders of downloads."""
    itself = base.is_file() or (base / official.marker).is_file()
    if itself or base.name == official.folder:
        return base
    places = (base / subfolder for subfolder in _SUBFOLDERS)
    return next((found for place in places if (found := _find_in(official, place))), None)


def find_raw_anywhere(official: Official, first: Path) -> Path | None:
    """The official folder or archive in `first`, or else in the usual places."""
    bases = (first, *_bases(None))
    return next((found for base in bases if (found := find_raw(official, base))), None)


def fetch(official: Official) -> Path:
    """Downloads the official archive into `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.

    Raises:
        DownloadError: if that fails.
    """
    base = Path(os.environ.get("TFDS_DATA_DIR") or default_tfds_folder()).expanduser()
    path = base / "downloads" / "manual" / official.archive
    distributed.say(
        f"{official.title}: not on this machine; downloading {official.archive_bytes / 1e6:.0f} MB "
        f"from {official.address} to {path}",
    )
    return download(official.address, path, size=official.archive_bytes, checksum=official.checksum)


def _not_found(official: Official, looked_at: list[str], unreadable: list[str], failed: str) -> str:
    message = (
        f"{official.title} not found. Looked for the folder {official.folder}, the archive "
        f"{official.archive} and {official.name} as TFDS prepares it in: "
        f"{'; '.join(looked_at)}.{failed} Download {official.archive} "
        f"({official.archive_bytes:,} bytes, {official.archive_bytes / 1e6:.0f} MB) from "
        f"{official.address} and put it into ./data, or pass --config.data.dir=FOLDER with the "
        "folder that holds it. On a machine with a network `python -m agr_jax.data.prepare "
        f"{official.name} --dir=FOLDER` downloads and prepares it; copy the folder here."
    )
    if unreadable:
        message += (
            f" Found {', '.join(unreadable)}: that is the Python (pickle) version, which is never "
            "read; the binary version is needed."
        )
    return message


def _find_in(official: Official, place: Path) -> Path | None:
    if (place / official.folder).is_dir():
        return place / official.folder
    if (place / official.archive).is_file():
        return place / official.archive
    # TensorFlow Datasets puts the address before the archive's name and a hash behind it.
    stem, dot, suffix = official.archive.partition(".")
    renamed = sorted(place.glob(f"*{stem}*{dot}{suffix}")) if place.name == "downloads" else []
    return renamed[0] if renamed else None
