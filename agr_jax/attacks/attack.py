"""What all attacks share: their inputs, their loop, and what one unit of an attack finds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from agr_jax import mesh

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
        nan_gradient: booleans `[batch]`: it was NaN there.
    """

    points: jax.Array
    fooled: jax.Array
    zero_gradient: jax.Array
    nan_gradient: jax.Array


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


def loop_from_host(
    step: Step,
    logits_fn: LogitsFn,
    state: Any,
    count: int,
    finished: Callable[[Any], jax.Array] | None = None,
    *,
    on: Mesh | None = None,
) -> Any:
    """The same with one dispatch a step.

    XLA's CPU compiler gives convolutions their fast form only outside of loops: there this is
    several times faster for networks that do not bring a convolution of their own.
    """
    if on is not None:
        # Constants of the start lie on every device; as a state they are split like the rest.
        step, state = jax.device_put((step, state), mesh.batch_sharding(on))
    for index in range(count):
        state = _step_once(on, step, logits_fn, state, jnp.int32(index))
        if finished is not None and index % 10 == 9 and bool(finished(state)):
            break
    return state


@functools.partial(jax.jit, static_argnums=0)
def _step_once(
    on: Mesh | None, step: Step, logits_fn: LogitsFn, state: Any, index: jax.Array
) -> Any:
    def once(step: Step, logits_fn: LogitsFn, state: Any, index: jax.Array) -> Any:
        return step(logits_fn, state, index)

    rows, whole = mesh.ROWS, mesh.WHOLE
    return mesh.apart(once, on, (rows, whole, rows, whole))(step, logits_fn, state, index)


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


def check_inputs(images: jax.Array, labels: jax.Array, logits_fn: LogitsFn | None = None) -> None:
    """Refuses images and labels that no attack can mean.

    Values are looked at only outside `jit`, where they are known.

    Args:
        images: see any attack.
        labels: see any attack.
        logits_fn: a pytree whose classes the labels must be among; `None` where that is checked
            elsewhere. It is traced, not run.

    Raises:
        ValueError: no images, images not floating or outside [0, 1], labels not integers, not one
            per image, or no class of the network.
    """
    images, labels = _as_array(images), _as_array(labels)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be floats in [0, 1], got dtype {images.dtype}")
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels must be integers of shape {images.shape[:1]}, "
            f"got {labels.dtype} of shape {labels.shape}"
        )
    if not labels.size:
        raise ValueError("there are no images to attack")
    if logits_fn is not None and not isinstance(labels, jax.core.Tracer):
        num_classes = _call.eval_shape(logits_fn, images).shape[-1]
        if num_classes > 1:  # one logit for two classes is for a loss of one's own
            check_labels(labels, num_classes)
    if isinstance(images, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():  # images may be constants of a program that is traced
        low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):  # also true of NaN
        raise ValueError(f"images must lie in [0, 1], got values from {low} to {high}")


@jax.jit
def _call(logits_fn: LogitsFn, images: jax.Array) -> jax.Array:
    """Under `jit` so that a network's shapes are found once."""
    return logits_fn(images)


def check_labels(labels: jax.Array | np.ndarray, num_classes: int) -> None:
    """Refuses labels that are no class.

    Raises:
        ValueError: naming the range found.
    """
    with jax.ensure_compile_time_eval():
        low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels must lie in [0, {num_classes}), the network's classes, got {low} to {high}"
        )


def _as_array(value: Any) -> Any:
    return value if isinstance(value, jax.Array) else jnp.asarray(value)


def misclassified(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Where the prediction is not the label, `[batch]`; NaN logits are no prediction."""
    return (jnp.argmax(logits, axis=1) != labels) & ~jnp.isnan(logits).any(axis=1)


def likeliest_wrong_class(logits: jax.Array, labels: jax.Array, rank: jax.Array | int) -> jax.Array:
    """The class with the `rank`-th largest logit (from 0) beside the label, `[batch]`.

    `rank` is one number, or one for each image.
    """
    num_classes = logits.shape[1]
    is_label = jax.nn.one_hot(labels, num_classes, dtype=bool)
    by_logit = jnp.argsort(jnp.where(is_label, jnp.inf, logits), axis=1)
    position = num_classes - 2 - jnp.broadcast_to(rank, labels.shape)
    # A sum, not an index, which would gather from all devices.
    return jnp.where(jax.nn.one_hot(position, num_classes, dtype=bool), by_logit, 0).sum(1)
