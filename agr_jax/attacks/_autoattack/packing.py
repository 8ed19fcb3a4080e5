"""How runs of an attack on images are packed into batches of a few shapes, all that is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


def batch_shapes(batch_size: int) -> tuple[int, ...]:
    """The full batch, a quarter and a sixteenth of it: all that is ever compiled."""
    wanted = {batch_size, *(batch_size // share for share in (4, 16) if batch_size // share >= 8)}
    return tuple(sorted(wanted, reverse=True))


class Batch(NamedTuple):
    """Runs that go to the devices together: the `units[i]`-th on image `rows[i]`."""

    rows: np.ndarray
    units: np.ndarray
    shape: int


def next_batch(
    robust: np.ndarray, done: np.ndarray, units: int, shapes: tuple[int, ...]
) -> Batch | None:
    """The first run on every image that is robust, then the second; `None` when all are done.

    The next runs follow in the same batch. Where an image would be in it more than twice on
    average, the batch is a smaller one: runs that come after a success are wasted.

    Args:
        robust: booleans, which images are left.
        done: integers, how many runs each of them has behind it.
        units: how many there are.
        shapes: of batches, largest first.
    """
    left = np.flatnonzero(robust & (done < units))
    if not len(left):
        return None
    unit, position = np.nonzero(np.arange(units)[:, None] >= done[left])
    wanted = [shape for shape in shapes if len(left) <= shape <= 2 * len(left)][-1:]
    wanted += [shape for shape in shapes if shape <= len(left)]
    shape = (*wanted, shapes[-1])[0]
    if shape > len(unit):
        shape = _shape(len(unit), shapes)
    return Batch(left[position[:shape]], unit[:shape], shape)


def until_fooled(rows: np.ndarray, fooled: np.ndarray) -> np.ndarray:
    """Which runs come before or with the first one that fools their image."""
    order = np.arange(len(rows))
    first = np.full(rows.max() + 1, len(rows))
    np.minimum.at(first, rows[fooled], order[fooled])
    return order <= first[rows]


def _shape(count: int, shapes: tuple[int, ...]) -> int:
    """The smallest shape that holds all, if it leaves no room for another batch; else less."""
    holding = [shape for shape in shapes if count <= shape < count + shapes[-1]]
    return holding[-1] if holding else max(shape for shape in shapes if shape <= count)


def pack(rows: np.ndarray, shapes: tuple[int, ...]) -> Iterator[tuple[np.ndarray, int]]:
    """Cuts rows into batches of the given shapes, with little to fill up."""
    while len(rows):
        shape = _shape(len(rows), shapes)
        yield rows[:shape], shape
        rows = rows[shape:]
