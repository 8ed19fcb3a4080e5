"""Data sets that TensorFlow Datasets prepared, read without TensorFlow."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from agr_jax.data.dataset import Dataset, Split
from agr_jax.data.decoding import decode_all
from agr_jax.data.official import Official
from agr_jax.errors import DataError

_INFO, _FEATURES = "dataset_info.json", "features.json"
_TEST_SPLITS = ("test", "validation")


def is_prepared(path: Path) -> bool:
    """Whether a folder is one version of a data set, as TFDS prepares it."""
    return (path / _INFO).is_file() and (path / _FEATURES).is_file()


def find_prepared(base: Path, name: str) -> Path | None:
    """The newest `<name>/<version>` below a TFDS folder, or below `base` itself, or `None`."""
    found = [
        version
        for parent in (base / name, base)
        if parent.name == name and parent.is_dir()
        for version in parent.iterdir()
        if is_prepared(version) and all(part.isdecimal() for part in version.name.split("."))
    ]
    return max(found, key=lambda path: [int(part) for part in path.name.split(".")], default=None)


def read_prepared(path: Path, official: Official, *, image_size: int | None = None) -> Dataset:
    """Reads a prepared data set: `array_record` or `tfrecord` files.

    Examples with an `id`, as those of `tfds_builders` and of TFDS's own CIFAR builders, come back
    in the official order; others in the order of the files.

    Args:
        path: the folder of one version.
        official: which data set it must be.
        image_size: of the result; `None` for the set's own.

    Returns:
        uint8 images, and labels; `complete` iff the splits have the official sizes.

    Raises:
        DataError: another data set, damaged files, or TFDS is not installed.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"{path}: tensorflow-datasets is missing: pip install tensorflow-datasets array_record"
        ) from error
    try:
        builder = tfds.builder_from_directory(path)
        features = builder.info.features
        names, splits = builder.name, list(builder.info.splits)
    except Exception as error:  # whatever TFDS raises on damaged files
        raise _damaged(path, official, error) from error
    if names != official.name or not {"image", "label"} <= set(features):
        raise DataError(
            f"{path}: expected {official.name} with the features image and label, found {names} "
            f"with {', '.join(features)}"
        )
    test = _test_split(path, splits)
    skip = {"image": tfds.decode.SkipDecoding()}

    def read(split: str) -> Split:
        info = builder.info.splits[split]
        try:
            examples = [
                features.deserialize_example_np(record, decoders=skip)
                for file in info.filepaths
                for record in _records(Path(file))
            ]
        except Exception as error:  # whatever its parsers raise on damaged files
            raise _damaged(path, official, error) from error
        if len(examples) != info.num_examples:
            raise DataError(
                f"{path}: expected {info.num_examples:,} {split} examples, found {len(examples):,}"
            )
        if "id" in features:
            examples.sort(key=lambda example: bytes(example["id"]))
        labels = np.array([example["label"] for example in examples], np.int32)
        size = official.side if image_size is None else image_size
        images = np.empty((len(examples), size, size, 3), np.uint8)
        places = {f"{split} example {i}": i for i in range(len(examples))}
        decode_all(
            list(places),
            lambda name: bytes(examples[places[name]]["image"]),
            images,
            source=str(path),
            native_size=official.side,
        )
        return Split(images, labels)

    train, tested = read("train"), read(test)
    return Dataset(
        name=official.title,
        class_names=tuple(features["label"].names),
        train=train,
        test=tested,
        validation=None,
        source=str(path),
        complete=(len(train), len(tested)) == official.sizes,
    )


def _test_split(path: Path, splits: list[str]) -> str:
    """Name of the test split.

    Raises:
        DataError: if there is none, or no training split beside it.
    """
    test = next((name for name in _TEST_SPLITS if name in splits), None)
    if "train" not in splits or test is None:
        raise DataError(
            f"{path}: expected the splits train and test, found {', '.join(splits) or 'none'}"
        )
    return test


def _records(path: Path) -> Iterator[bytes]:
    """Serialised examples of one file."""
    if "tfrecord" in path.name:
        yield from _tfrecords(path)
        return
    from array_record.python import array_record_module

    reader: Any = array_record_module.ArrayRecordReader(str(path))
    try:
        if reader.num_records():
            yield from reader.read_all()
    finally:
        reader.close()


def _tfrecords(path: Path) -> Iterator[bytes]:
    """The framing is length, its checksum, content, its checksum; see TensorFlow's tutorial.

    Checksums are not looked at: the records' digest is, and images have their own.
    """
    with path.open("rb") as file:
        while head := file.read(12):
            if len(head) < 12:
                raise EOFError(f"{path.name} ends within a record's head")
            (length,) = struct.unpack("<Q", head[:8])
            content = file.read(length + 4)
            if len(content) < length + 4:
                raise EOFError(f"{path.name} ends within a record of {length:,} bytes")
            yield content[:-4]


def _damaged(path: Path, official: Official, error: Exception) -> DataError:
    text = str(error).strip().splitlines()
    return DataError(
        f"{path}: damaged: expected {official.title} as TFDS prepares it, found "
        f"{type(error).__name__}: {text[0] if text else ''}. Prepare it again: "
        f"python -m agr_jax.data.prepare {official.name} --dir=FOLDER"
    )
