"""CIFAR-10 and CIFAR-100 in their binary versions: folders or .tar.gz archives."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agr_jax.data.archives import MissingMembersError, read_tar_members
from agr_jax.data.dataset import Dataset, Split
from agr_jax.data.official import Official
from agr_jax.errors import DataError

_SIDE = 32
_PIXEL_BYTES = 3 * _SIDE * _SIDE
_NAMES_LIMIT = 64 * 1024
_COARSE_NAMES = "coarse_label_names.txt"


@dataclass(frozen=True)
class _Layout:
    """What is within an official folder."""

    official: Official
    train_files: tuple[str, ...]
    test_file: str
    names_file: str
    records: Mapping[str, int]  # file -> number of records in the official set
    labels: tuple[tuple[str, int], ...]  # (kind, number of classes) of each label byte
    class_names: tuple[str, ...]

    @property
    def record_bytes(self) -> int:
        return len(self.labels) + _PIXEL_BYTES

    @property
    def num_classes(self) -> int:
        return self.labels[-1][1]


# The archives' checksums are those that TensorFlow Datasets publishes. CIFAR-100 has no digests of
# records yet: they can only be taken from the whole set.
CIFAR10 = Official(
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
    side=_SIDE,
    read=lambda path, image_size, allocate: read_cifar10(path),
    image_sizes=(_SIDE,),
    unreadable=("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    digests={
        "train": "3cb34bc1eb7b3510d605b1a112ba2921cd6b3cd80ca2d046129ed2eb563c0571",
        "test": "268e889ad366fcc26a10ded082db6922af67d7ad6066328d098e5093806a6511",
    },
)
CIFAR100 = Official(
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
    side=_SIDE,
    read=lambda path, image_size, allocate: read_cifar100(path),
    image_sizes=(_SIDE,),
    unreadable=("cifar-100-python", "cifar-100-python.tar.gz"),
)
_CIFAR10 = _Layout(
    official=CIFAR10,
    train_files=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    test_file="test_batch.bin",
    names_file="batches.meta.txt",
    records={**{f"data_batch_{i}.bin": 10_000 for i in range(1, 6)}, "test_batch.bin": 10_000},
    labels=(("label", CIFAR10.classes),),
    class_names=(
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ),
)
_CIFAR100 = _Layout(
    official=CIFAR100,
    train_files=("train.bin",),
    test_file="test.bin",
    names_file="fine_label_names.txt",
    records={"train.bin": 50_000, "test.bin": 10_000},
    labels=(("coarse label", 20), ("fine label", CIFAR100.classes)),
    class_names=tuple(f"class_{i}" for i in range(CIFAR100.classes)),
)


def read_cifar10(path: str | Path) -> Dataset:
    """Reads CIFAR-10 from the folder `cifar-10-batches-bin` or `cifar-10-binary.tar.gz`.

    Returns:
        uint8 [N, 32, 32, 3] images in the official order; `complete` iff every file has its
        official number of records.

    Raises:
        DataError: missing, damaged, or the Python pickle version, which is never read.
    """
    return _read(Path(path), _CIFAR10)


def read_cifar100(path: str | Path) -> Dataset:
    """Reads CIFAR-100 from the folder `cifar-100-binary` or `cifar-100-binary.tar.gz`.

    Returns:
        uint8 [N, 32, 32, 3] images in the official order with their fine labels; `complete` iff
        every file has its official number of records.

    Raises:
        DataError: missing, damaged, or the Python pickle version, which is never read.
    """
    return _read(Path(path), _CIFAR100)


def read_coarse_labels(
    path: str | Path,
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Reads CIFAR-100's 20 coarse labels from its folder or archive.

    Returns:
        `{"train": int32 [N], "test": int32 [N]}` in the official order, and the names.

    Raises:
        DataError: as `read_cifar100`, or without `coarse_label_names.txt`.
    """
    path = Path(path)
    contents = _contents(path, _CIFAR100, _COARSE_NAMES)
    if _COARSE_NAMES not in contents:
        raise DataError(f"{path}: expected the file {_COARSE_NAMES}, found none")
    names = _class_names(path / _COARSE_NAMES, contents[_COARSE_NAMES], 20)
    coarse = {}
    for split, file in (("train", "train.bin"), ("test", "test.bin")):
        _decode(path / file, contents[file], _CIFAR100)  # checks it
        table = np.frombuffer(contents[file], np.uint8).reshape(-1, _CIFAR100.record_bytes)
        coarse[split] = table[:, 0].astype(np.int32)
    return coarse, names


def _contents(path: Path, layout: _Layout, names_file: str) -> dict[str, bytes]:
    """Contents of the layout's files, and of the file of class names if it is there."""
    if path.is_dir():
        return _read_folder(path, layout, names_file)
    if "-python" in path.name:
        raise _pickle_error(path, layout)
    return _read_archive(path, layout, names_file)


def _read(path: Path, layout: _Layout) -> Dataset:
    contents = _contents(path, layout, layout.names_file)
    names = contents.pop(layout.names_file, None)
    class_names = layout.class_names
    if names is not None:
        class_names = _class_names(path / layout.names_file, names, layout.num_classes)
    parts = {file: _decode(path / file, content, layout) for file, content in contents.items()}
    train_parts = [parts[file] for file in layout.train_files]
    return Dataset(
        name=layout.official.title,
        class_names=class_names,
        train=Split(
            np.concatenate([part.images for part in train_parts]),
            np.concatenate([part.labels for part in train_parts]),
        ),
        test=parts[layout.test_file],
        validation=None,
        source=str(path),
        complete=all(len(parts[file]) == records for file, records in layout.records.items()),
    )


def _size_limits(layout: _Layout) -> dict[str, int]:
    return {file: records * layout.record_bytes for file, records in layout.records.items()}


def _read_folder(path: Path, layout: _Layout, names_file: str) -> dict[str, bytes]:
    limits = _size_limits(layout)
    missing = [file for file in limits if not (path / file).is_file()]
    if missing:
        has_pickles = (path / "data_batch_1").is_file() or (path / "train").is_file()
        if path.name in layout.official.unreadable or has_pickles:
            raise _pickle_error(path, layout)
        raise DataError(
            f"{path}: expected the {layout.official.title} files {', '.join(limits)}; "
            f"missing {', '.join(missing)}"
        )
    contents = {}
    for file, limit in {**limits, names_file: _NAMES_LIMIT}.items():
        if not (path / file).is_file():
            continue  # the class names, the only file that may be absent
        size = (path / file).stat().st_size
        if size > limit:
            raise DataError(f"{path / file}: expected at most {limit:,} bytes, found {size:,}")
        contents[file] = (path / file).read_bytes()
    return contents


def _read_archive(path: Path, layout: _Layout, names_file: str) -> dict[str, bytes]:
    prefix = f"{layout.official.folder}/"
    try:
        members = read_tar_members(
            path,
            {prefix + file: limit for file, limit in _size_limits(layout).items()},
            optional={prefix + names_file: _NAMES_LIMIT},
        )
    except MissingMembersError as error:
        if any(name.partition("/")[0] in layout.official.unreadable for name in error.found):
            raise _pickle_error(path, layout) from error
        raise
    return {name.removeprefix(prefix): content for name, content in members.items()}


def _decode(path: Path, content: bytes, layout: _Layout) -> Split:
    """Turns records `<label bytes><R><G><B>` into images and their last label."""
    records, rest = divmod(len(content), layout.record_bytes)
    if rest or not records:
        raise DataError(
            f"{path}: expected a multiple of {layout.record_bytes} bytes (records of "
            f"{layout.official.title}), at least one, found {len(content):,} bytes: {records:,} "
            f"records and {rest} bytes"
        )
    table = np.frombuffer(content, np.uint8).reshape(records, layout.record_bytes)
    for column, (kind, classes) in enumerate(layout.labels):
        bad = np.flatnonzero(table[:, column] >= classes)
        if bad.size:
            raise DataError(
                f"{path}: {kind} {table[bad[0], column]} of record {bad[0]} is outside "
                f"0..{classes - 1}: damaged, or not {layout.official.title}"
            )
    pixels = table[:, len(layout.labels) :].reshape(records, 3, _SIDE, _SIDE)
    return Split(
        np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)),
        table[:, len(layout.labels) - 1].astype(np.int32),
    )


def _class_names(path: Path, content: bytes, expected: int) -> tuple[str, ...]:
    lines = content.decode("utf-8", errors="replace").split("\n")
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) != expected:
        raise DataError(f"{path}: expected {expected} class names, found {len(names)}")
    return names


def _pickle_error(path: Path, layout: _Layout) -> DataError:
    return DataError(
        f"{path} is the Python (pickle) version of {layout.official.title}, which is never read "
        f"because unpickling runs code; get the binary version, {layout.official.archive} or the "
        f"folder {layout.official.folder}"
    )
