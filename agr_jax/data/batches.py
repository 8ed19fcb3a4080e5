"""How an epoch is shuffled and cut into batches."""

from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from agr_jax.errors import DataError

LastBatch = Literal["drop", "keep"]


def steps_per_epoch(examples: int, batch_size: int, last_batch: LastBatch | str) -> int:
    """Returns the number of batches in one epoch.

    Args:
        examples: number of training examples.
        batch_size: examples in a batch.
        last_batch: whether a smaller last batch is "drop"ped or "keep" (kept).

    Raises:
        DataError: a number below 1, an unknown `last_batch`, or "drop" with no whole batch.
    """
    if last_batch not in ("drop", "keep"):
        raise DataError(f"last_batch must be 'drop' or 'keep', got {last_batch!r}")
    if examples < 1 or batch_size < 1:
        raise DataError(f"expected examples and batch_size >= 1, got {examples}, {batch_size}")
    if last_batch == "keep":
        return -(-examples // batch_size)
    if batch_size > examples:
        raise DataError(
            f"a batch of {batch_size:,} is larger than the {examples:,} training examples and "
            "last_batch='drop' leaves no step; take a smaller batch or last_batch='keep'"
        )
    return examples // batch_size


def epoch_permutation(key: jax.Array, epoch: int | jax.Array, examples: int) -> jax.Array:
    """Returns the order of the examples in an epoch, int32 [examples], a function of key and epoch.

    Args:
        key: a random key, the same for all epochs.
        epoch: index of the epoch, may be traced.
        examples: number of training examples.
    """
    order = jax.random.permutation(jax.random.fold_in(key, epoch), examples)
    return order.astype(jnp.int32)


def evaluation_batches(examples: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of consecutive batches; the last one may be smaller.

    Raises:
        DataError: a number below 1.
    """
    for start in range(0, steps_per_epoch(examples, batch_size, "keep") * batch_size, batch_size):
        yield start, min(start + batch_size, examples)
