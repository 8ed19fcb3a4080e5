"""Extra training images from one `.npz` file, such as millions of generated ones, memory-mapped."""

from __future__ import annotations

import os
import shutil
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from agr_jax import distributed
from agr_jax.data import cache
from agr_jax.data.dataset import Split
from agr_jax.errors import DataError

_DAMAGE = (
    OSError,
    ValueError,
    EOFError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_BLOCK_BYTES = 2**24


def read_extra(
    path: str | Path,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    folder: Path | None = None,
) -> Split:
    """Reads extra training images with their labels, true ones or pseudo-labels.

    An uncompressed file (`numpy.savez`) is memory-mapped. A compressed one
    (`numpy.savez_compressed`) is unpacked once, into the cache.

    Args:
        path: an `.npz` file with `image`, uint8 [N, H, W, C], and `label`, integers [N].
        image_shape: (H, W, C) of the data set.
        num_classes: of the data set.
        folder: of the cache, by default `cache.default_folder()`.

    Returns:
        Memory-mapped images, and labels as int32.

    Raises:
        DataError: missing, damaged, or not as described above.
    """
    path = Path(path).expanduser()
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            missing = [f for f in ("image.npy", "label.npy") if f not in members]
            if missing:
                raise DataError(
                    f"{path}: expected the arrays image and label, found "
                    f"{', '.join(sorted(n.removesuffix('.npy') for n in members)) or 'none'}"
                )
            with archive.open("label.npy") as file:
                labels = np.lib.format.read_array(file, allow_pickle=False)
            with archive.open("image.npy") as file:
                shape, dtype = _header(file, path)
            _check(path, shape, dtype, labels, image_shape, num_classes)
            info = members["image.npy"]
            if info.compress_type == zipfile.ZIP_STORED:
                images = _mapped(path, info, shape)
            else:
                images = _unpacked(path, archive, info, shape, folder)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected an .npz file of extra images, found none") from error
    except _DAMAGE as error:
        size = f"{path.stat().st_size:,} bytes" if path.is_file() else "not a file"
        raise DataError(
            f"{path} ({size}): damaged: expected a whole .npz file; found "
            f"{type(error).__name__}: {error}"
        ) from error
    return Split(images, labels.astype(np.int32))


def _header(file: IO[bytes], path: Path) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"image.npy has format version {version}, expected 1.0 or 2.0")
    shape, fortran, dtype = read(file)
    if fortran:
        raise DataError(f"{path}: image must be in C order, found Fortran order")
    return shape, dtype


def _check(
    path: Path,
    shape: tuple[int, ...],
    dtype: np.dtype,
    labels: np.ndarray,
    image_shape: tuple[int, int, int],
    num_classes: int,
) -> None:
    if dtype != np.uint8 or len(shape) != 4 or shape[1:] != image_shape or not shape[0]:
        raise DataError(
            f"{path}: image must be uint8 of shape (N, {', '.join(map(str, image_shape))}), as the "
            f"data set's, found {dtype} {shape}"
        )
    if labels.dtype.kind not in "iu" or labels.shape != shape[:1]:
        raise DataError(
            f"{path}: label must be integers of shape ({shape[0]},), one for each image, found "
            f"{labels.dtype} {labels.shape}"
        )
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if bad.size:
        raise DataError(
            f"{path}: label {labels[bad[0]]} of image {bad[0]} is outside 0..{num_classes - 1}"
        )


def _mapped(path: Path, info: zipfile.ZipInfo, shape: tuple[int, ...]) -> np.ndarray:
    """The array in a stored member, from its place in the file."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        if header[0] != b"PK\x03\x04":
            raise zipfile.BadZipFile("no member where the directory says")
        file.seek(header[-2] + header[-1], os.SEEK_CUR)
        start = file.tell()
        _header(file, path)
        offset = file.tell()
    size = int(np.prod(shape))
    if offset - start + size != info.file_size or offset + size > path.stat().st_size:
        raise ValueError(f"image.npy holds {info.file_size:,} bytes, not what its shape needs")
    return np.asarray(np.memmap(path, np.uint8, "r", offset, shape))


def _unpacked(
    path: Path,
    archive: zipfile.ZipFile,
    info: zipfile.ZipInfo,
    shape: tuple[int, ...],
    folder: Path | None,
) -> np.ndarray:
    """The array in a compressed member, from the cache, or unpacked there first."""
    folder = cache.default_folder() if folder is None else folder
    target = folder / f"extra-{cache.fingerprint(path)}.npy"
    if not target.is_file():
        distributed.say(
            f"{path}: compressed; unpacking {info.file_size / 1e9:.1f} GB into {folder} "
            "(numpy.savez makes files that are memory-mapped)",
        )
        folder.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".partial-{target.name}.{os.getpid()}")
        try:
            with archive.open(info) as source, partial.open("wb") as unpacked:
                shutil.copyfileobj(source, unpacked, _BLOCK_BYTES)
                unpacked.flush()
                os.fsync(unpacked.fileno())  # before it gets its name
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    images: np.ndarray = np.load(target, mmap_mode="r", allow_pickle=False)
    if images.shape != shape or images.dtype != np.uint8:
        target.unlink()
        raise ValueError(f"{target} does not hold it")
    return np.asarray(images)
