"""Single rows of an array, without the memory of the whole one where it is a mapped file."""

from __future__ import annotations

import mmap
import os
import weakref
from typing import Any

import numpy as np


class RowReader:
    """Reads rows of an array by their numbers.

    Rows of a mapped file are read from the file: touching them in the mapping would keep its pages,
    and their neighbours, in this process's memory until an epoch has brought in all.

    Args:
        array: `[rows, ...]`.
    """

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self._file: int | None = None
        self._offset = 0
        mapped = _whole_mapping(array)
        if mapped is not None:
            try:
                self._file = os.open(str(mapped.filename), os.O_RDONLY)
            except OSError:  # replaced since: the mapping still holds what it held
                return
            weakref.finalize(self, os.close, self._file)
            self._offset = mapped.offset

    @property
    def is_file(self) -> bool:
        """Whether rows are read from a mapped file."""
        return self._file is not None

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """A copy of the rows, in the order asked for."""
        if self._file is None:
            return self._array[rows]
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self._array):
            raise IndexError(f"rows must lie in 0..{len(self._array) - 1}, got {rows}")
        found = np.empty([len(rows), *self._array.shape[1:]], self._array.dtype)
        size = self._array[:1].nbytes
        content = found.reshape(-1).view(np.uint8).data
        for index, row in enumerate(rows.tolist()):
            into = content[index * size : (index + 1) * size]
            read = os.preadv(self._file, [into], self._offset + row * size)
            if read != size:
                raise OSError(f"{self._array.shape}: row {row} was cut short: {read} of {size} B")
        return found


def _whole_mapping(array: np.ndarray) -> np.memmap | None:
    """The mapped file that an array is, all of it, as it stands there."""
    base: Any = array
    while isinstance(base, np.ndarray):
        # A part of a mapped array is one too, but does not say where it begins.
        if isinstance(base, np.memmap) and isinstance(base.base, mmap.mmap) and base.filename:
            is_whole = base.shape == array.shape and base.dtype == array.dtype
            is_there = base.ctypes.data == array.ctypes.data and array.flags.c_contiguous
            return base if is_whole and is_there else None
        base = base.base
    return None
