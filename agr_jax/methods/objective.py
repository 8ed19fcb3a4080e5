"""What a training method gives the trainer: adversarial images, and two losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from agr_jax.attacks import LogitsFn

PyTree = Any
Forward = Callable[[PyTree, PyTree, jax.Array], tuple[jax.Array, PyTree]]
"""`forward(params, batch_stats, images) -> (logits, batch_stats)`, in training mode."""


class Batch(NamedTuple):
    """One batch of a training step.

    Attributes:
        images: `[batch, height, width, channels]`, augmented, in [0, 1].
        adversarial: the same shape, from the method's attack.
        labels: `[batch]` integers.
    """

    images: jax.Array
    adversarial: jax.Array
    labels: jax.Array


class Outcome(NamedTuple):
    """What a loss found on the way.

    Attributes:
        logits: `[batch, classes]` of the pass whose accuracy is reported.
        batch_stats: running statistics after the pass.
    """

    logits: jax.Array
    batch_stats: PyTree


class Method(Protocol):
    """A training method, a frozen object.

    The trainer takes the gradients of `clean_loss` and `adversarial_loss` with respect to the
    parameters, and AGR combines them, whichever method it is.
    """

    def adversarial_images(
        self, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> jax.Array:
        """The inner attack; `logits_fn` is the network in evaluation mode."""
        ...

    def clean_loss(
        self, forward: Forward, params: PyTree, batch_stats: PyTree, batch: Batch
    ) -> tuple[jax.Array, Outcome]:
        """The loss whose gradient is g_c, a mean over the batch."""
        ...

    def adversarial_loss(
        self, forward: Forward, params: PyTree, batch_stats: PyTree, batch: Batch
    ) -> tuple[jax.Array, Outcome]:
        """The method's own loss, whose gradient is g_a, a mean over the batch."""
        ...
