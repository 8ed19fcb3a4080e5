"""How training images reach the step: all on the devices, or streamed from the host in batches."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from agr_jax import distributed, sharding
from agr_jax.data.batches import epoch_permutation
from agr_jax.data.dataset import Split
from agr_jax.errors import DataError

_EXTRA_STREAM = 2  # of random numbers, beside those in `dataset`
_BATCHES_AHEAD = 2
# Of a device's memory, without a budget of the user's.
_SHARE_OF_DEVICE = 0.3
_SHARE_OF_HOST = 0.25


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingImages:
    """The training set, and extra images that fill a share of every batch.

    An image is known by its row: those of `train` come first, then those of `extra`.

    Attributes:
        train: whose length is that of an epoch.
        extra: further images of the same shape, or `None`.
        extra_fraction: share of each batch that comes from `extra`, above 0 and below 1; rounded
            to whole images.
        seed: of the draws from `extra`.

    Raises:
        DataError: a fraction out of range, or with no extra images.
    """

    train: Split
    extra: Split | None = None
    extra_fraction: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.extra is None) != (self.extra_fraction == 0):
            raise DataError(
                "extra images and extra_fraction need each other: "
                f"{'no extra images' if self.extra is None else f'{len(self.extra):,} images'}, "
                f"extra_fraction {self.extra_fraction}"
            )
        if not 0 <= self.extra_fraction < 1:
            raise DataError(
                f"extra_fraction must be at least 0 and below 1, got {self.extra_fraction}"
            )

    @property
    def parts(self) -> tuple[Split, ...]:
        """The sets behind one another."""
        return (self.train,) if self.extra is None else (self.train, self.extra)

    @property
    def nbytes(self) -> int:
        """Of all images."""
        return sum(part.nbytes for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        """What to record of the extra images: JSON values."""
        if self.extra is None:
            return {}
        return {"extra": {"examples": len(self.extra), "fraction": self.extra_fraction}}

    def order(self, key: jax.Array, epoch: int, batch_sizes: Sequence[int]) -> np.ndarray:
        """Rows in the order in which an epoch uses them, int32; a function of its arguments.

        Without extra images it is a permutation of the training set. With them, an epoch has as
        many steps, and sees only so much of the training set as its batches have room for, drawn
        again without replacement.

        Args:
            key: of the permutations.
            epoch: counted from 0.
            batch_sizes: of the epoch's steps.
        """
        permutation = np.asarray(epoch_permutation(key, epoch, len(self.train)))
        if self.extra is None:
            return permutation
        shares = [round(self.extra_fraction * size) for size in batch_sizes]
        drawn = len(self.train) + self._drawn(epoch, sum(shares))
        pieces, used, used_extra = [], 0, 0
        for size, share in zip(batch_sizes, shares, strict=True):
            pieces.append(permutation[used : used + size - share])
            pieces.append(drawn[used_extra : used_extra + share])
            used, used_extra = used + size - share, used_extra + share
        return np.concatenate(pieces).astype(np.int32)

    def _drawn(self, epoch: int, count: int) -> np.ndarray:
        """Rows of the extra images; one comes again only when all have come."""
        assert self.extra is not None
        generator = np.random.default_rng([_EXTRA_STREAM, self.seed, epoch])
        whole, rest = divmod(count, len(self.extra))
        rounds = [generator.permutation(len(self.extra)) for _ in range(whole)]
        return np.concatenate([*rounds, generator.choice(len(self.extra), rest, replace=False)])

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of rows, read from where they are."""
        if self.extra is None:
            return self.train.read(rows), self.train.labels[rows]
        images = np.empty([len(rows), *self.train.image_shape], np.uint8)
        labels = np.empty(len(rows), np.int32)
        of_train = rows < len(self.train)
        for part, mine, first in (
            (self.train, of_train, 0),
            (self.extra, ~of_train, len(self.train)),
        ):
            images[mine] = part.read(rows[mine] - first)
            labels[mine] = part.labels[rows[mine] - first]
        return images, labels


class Feed:
    """Hands batches to the training step: from the devices if all images fit, else from the host.

    Attributes:
        on_device: whether every device holds all images.

    Args:
        images: of the run.
        mesh: devices that share each batch, of all processes.
        budget_mb: megabytes (10^6 bytes) that the images may take on each device; 0 for 30 % of
            its memory, or on CPU, where the devices share it, a quarter of the machine's.
    """

    def __init__(self, images: TrainingImages, mesh: Mesh, *, budget_mb: int = 0) -> None:
        self._images, self._mesh = images, mesh
        # Another budget in another process would be another program there.
        budget = budget_mb * 10**6 or distributed.from_first(lambda: _budget(mesh.local_devices))
        self.on_device = images.nbytes <= budget
        self._everything: dict[str, jax.Array] = {}
        if self.on_device:
            parts = images.parts
            pixels, labels = [[getattr(p, n) for p in parts] for n in ("images", "labels")]
            whole = {
                "images": pixels[0] if len(parts) == 1 else np.concatenate(pixels),
                "labels": labels[0] if len(parts) == 1 else np.concatenate(labels),
            }
            self._everything = sharding.put(whole, sharding.replicated(mesh))

    def epoch(
        self, order: np.ndarray, batch_sizes: Sequence[int], first: int
    ) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
        """Arguments of `Trainer.step`, or of `Trainer.step_on_batch` when streaming.

        Args:
            order: rows of the epoch, see `TrainingImages.order`.
            batch_sizes: of all its steps.
            first: index of the first step to take.

        Returns:
            Arguments that all steps share, and those of each step.
        """
        if self.on_device:
            permutation = sharding.put(order, sharding.replicated(self._mesh))
            shared = {**self._everything, "permutation": permutation}
            return shared, ({"batch_size": size} for size in batch_sizes[first:])
        pieces = np.split(order, np.cumsum(batch_sizes))[: len(batch_sizes)]
        return {}, prefetched(pieces[first:], self._load)

    def _load(self, rows: np.ndarray) -> dict[str, jax.Array]:
        """A batch on its way to the devices: of several processes each reads its own rows."""
        images, labels = sharding.put_rows(
            lambda part: self._images.batch(rows[part]), len(rows), self._mesh
        )
        return {"images": images, "labels": labels}

    def describe(self) -> str:
        """For the first lines of a run."""
        where = "each device" if self._mesh.size > 1 else "the device"
        size = f"{self._images.nbytes / 1e6:,.1f} MB of images"
        return f"{size} on {where}" if self.on_device else f"{size} streamed to {where}"


def _budget(devices: Sequence[jax.Device]) -> float:
    statistics = devices[0].memory_stats() or {}
    if devices[0].platform != "cpu" and "bytes_limit" in statistics:
        return _SHARE_OF_DEVICE * statistics["bytes_limit"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return _SHARE_OF_HOST * memory / len(devices)


def prefetched(
    rows: Sequence[np.ndarray], load: Callable[[np.ndarray], Any], ahead: int = _BATCHES_AHEAD
) -> Iterator[Any]:
    """Yields `load(rows[0])`, `load(rows[1])`, ...; a thread loads a few batches ahead."""
    waiting: collections.deque[Future[Any]] = collections.deque()
    with ThreadPoolExecutor(1, "prefetch") as pool:
        try:
            for each in rows:
                waiting.append(pool.submit(load, each))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
