"""What all attacks share: their inputs, their loop, and what one unit of an attack finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LogitsFn = Callable[..., jax.Array]
LossFn = Callable[..., jax.Array]
Attack = Callable[[LogitsFn, jax.Array, jax.Array, jax.Array], jax.Array]


class Outcome(NamedTuple):
    """What one restart, or one target class, of an attack found.

    Attributes:
        points: `[batch, ...]`, in the ball and the box: misclassified where `fooled`, elsewhere
            the best point that the attack met.
        fooled: booleans `[batch]`.
        zero_gradient: booleans `[batch]`: the loss had no gradient where the attack started.
    """

    points: jax.Array
    fooled: jax.Array
    zero_gradient: jax.Array


Step = Callable[[Any, Any], Any]
Loop = Callable[..., Any]


def loop_on_device(
    step: Step, state: Any, count: int, finished: Callable[[Any], jax.Array] | None = None
) -> Any:
    """`state = step(state, index)` for each index below `count`, or until it is finished.

    One `lax.while_loop`: nothing on the host, also within `jit`.
    """

    def unfinished(carry: tuple[jax.Array, Any]) -> jax.Array:
        index, state = carry
        return (index < count) if finished is None else (index < count) & ~finished(state)

    def one(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        index, state = carry
        return index + 1, step(state, index)

    return lax.while_loop(unfinished, one, (jnp.int32(0), state))[1]


def loop_from_host(
    step: Step, state: Any, count: int, finished: Callable[[Any], jax.Array] | None = None
) -> Any:
    """The same with one dispatch a step, for a `step` that is a pytree.

    XLA's CPU compiler gives convolutions their fast form only outside of loops: there this is
    several times faster for networks that do not bring a convolution of their own.
    """
    for index in range(count):
        state = _step_once(step, state, jnp.int32(index))
        if finished is not None and index % 10 == 9 and bool(finished(state)):
            break
    return state


@jax.jit
def _step_once(step: Step, state: Any, index: jax.Array) -> Any:
    return step(state, index)


def as_pytree(logits_fn: LogitsFn) -> LogitsFn:
    """Makes a callable acceptable to `jit`: its arrays are arguments, all else is constant.

    So `Partial(model.apply, variables, train=False)` keeps its weights as arguments, and a plain
    function is a constant as a whole.
    """
    leaves, structure = jax.tree.flatten(logits_fn)
    is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    if all(is_array):
        return logits_fn
    arrays = [leaf for leaf, array in zip(leaves, is_array, strict=True) if array]
    constants = tuple(None if array else leaf for leaf, array in zip(leaves, is_array, strict=True))
    return _WithConstants(arrays, constants, tuple(is_array), structure)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _WithConstants:
    """A callable pytree some of whose leaves are no arrays."""

    arrays: list[Any]
    constants: tuple[Any, ...] = dataclasses.field(metadata={"static": True})
    is_array: tuple[bool, ...] = dataclasses.field(metadata={"static": True})
    structure: Any = dataclasses.field(metadata={"static": True})

    def __call__(self, *arguments: Any) -> jax.Array:
        arrays = iter(self.arrays)
        leaves = [
            next(arrays) if array else constant
            for constant, array in zip(self.constants, self.is_array, strict=True)
        ]
        logits: jax.Array = jax.tree.unflatten(self.structure, leaves)(*arguments)
        return logits


def check_inputs(images: jax.Array, labels: jax.Array) -> None:
    """Refuses images and labels that no attack can mean.

    Values are looked at only outside `jit`, where they are known.

    Raises:
        ValueError: images not floating or outside [0, 1], labels not integers or not one per image.
    """
    images, labels = _as_array(images), _as_array(labels)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be floats in [0, 1], got dtype {images.dtype}")
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels must be integers of shape {images.shape[:1]}, "
            f"got {labels.dtype} of shape {labels.shape}"
        )
    if isinstance(images, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():  # images may be constants of a program that is traced
        low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):  # also true of NaN
        raise ValueError(f"images must lie in [0, 1], got values from {low} to {high}")


def _as_array(value: Any) -> Any:
    return value if isinstance(value, jax.Array) else jnp.asarray(value)


def likeliest_wrong_class(logits: jax.Array, labels: jax.Array, rank: jax.Array | int) -> jax.Array:
    """The class with the `rank`-th largest logit (from 0) beside the label, `[batch]`."""
    is_label = jax.nn.one_hot(labels, logits.shape[1], dtype=bool)
    return jnp.argsort(jnp.where(is_label, jnp.inf, logits), axis=1)[:, -2 - rank]
