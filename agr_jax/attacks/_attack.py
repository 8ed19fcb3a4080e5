"""What all attacks share: how they are called, and their loop."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from agr_jax.attacks._checks import LogitsFn, warn_of_blind
from agr_jax.attacks._outcome import Blind

LossFn = Callable[..., jax.Array]
Attack = Callable[[LogitsFn, jax.Array, jax.Array, jax.Array], jax.Array]


class GradientAttack(abc.ABC):
    """An attack that follows the gradient of a loss, and says where there was none."""

    def __call__(
        self, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> jax.Array:
        """Returns adversarial images, of the shape and dtype of `images`, in the ball and the box.

        Args:
            logits_fn: any callable that maps images `[batch, ...]` to logits `[batch, classes]`, in
                evaluation mode; where the attack has `draws`, it takes a key too. It is traced at
                each call: what it closes over, such as weights, is used as it is now.
            images: float32 or float64 in [0, 1].
            labels: `[batch]` integers, the classes to leave, or, if targeted, to reach.
            key: one JAX key, or one per image; not used by attacks that draw nothing.

        Raises:
            ValueError: if images, labels or key have the wrong dtype, shape or range, or logits or
                losses the wrong shape.

        Warns:
            EvaluationWarning: outside of `jit`: of images whose gradient, or SPSA's estimate of it,
                is zero or NaN at the start, of a network that depends on the batch, of a radius as
                large as the box.
        """
        adversarial, blind = self.look(logits_fn, images, labels, key)
        warn_of_blind(self, blind)
        return adversarial

    @abc.abstractmethod
    def look(
        self, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Blind]:
        """What a call returns, and at which images the attack was blind, without a warning."""


class Step(Protocol):
    """What an attack repeats: a pytree whose leaves have one row for each image.

    Its state is such a pytree too. The network comes apart from both: it has no rows.
    """

    def __call__(self, logits_fn: LogitsFn, state: Any, index: jax.Array) -> Any:
        """The next state, of the same structure."""
        ...


Loop = Callable[..., Any]


def loop_on_device(
    step: Step,
    logits_fn: LogitsFn,
    state: Any,
    count: int,
    finished: Callable[[Any], jax.Array] | None = None,
) -> Any:
    """`state = step(logits_fn, state, index)` for each index below `count`, or until finished.

    One `lax.while_loop`: nothing on the host, also within `jit`.
    """

    def unfinished(carry: tuple[jax.Array, Any]) -> jax.Array:
        index, state = carry
        return (index < count) if finished is None else (index < count) & ~finished(state)

    def one(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        index, state = carry
        return index + 1, step(logits_fn, state, index)

    return lax.while_loop(unfinished, one, (jnp.int32(0), state))[1]


def differing(value: jax.Array, like: jax.Array) -> jax.Array:
    """The value, as one that differs between devices where `like` does; both of one shape.

    Within `shard_map` a loop must begin with what differs where its results do, and constants are
    the same on all devices. The compiler takes the choice between equals away.
    """
    return jnp.where(like == like, value, value)  # noqa: PLR0124
