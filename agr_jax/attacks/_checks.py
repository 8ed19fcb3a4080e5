"""What is looked at before and after an attack: inputs, labels, the radius, the network.

What is refused raises an error; what makes a result unreliable gives an `EvaluationWarning`.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agr_jax.attacks._outcome import Blind
from agr_jax.threat import covers_the_box

LogitsFn = Callable[..., jax.Array]


class EvaluationWarning(UserWarning):
    """Something that makes a robust accuracy unreliable."""


def warn(message: str) -> None:
    """Shows a message where the attack or the evaluation was asked for."""
    warnings.warn(message, EvaluationWarning, stacklevel=_outside())


def _outside() -> int:
    """The level of the first frame that is not of this package."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").startswith("agr_jax"):
        frame, level = frame.f_back, level + 1
    return level - 1


def warn_of_radius(threat: Any, images: jax.Array | np.ndarray) -> None:
    """Warns where the ball holds every image."""
    if covers_the_box(threat, math.prod(images.shape[1:])):
        warn(
            f"{type(threat).__name__}.epsilon of {threat.epsilon:g} covers the whole box [0, 1]: "
            f"a radius in pixels is divided by 255, {threat.epsilon:g} / 255"
        )


def warn_of_blind(attack: Any, blind: Blind) -> None:
    """Warns of images at which the attack could not see which way the loss rises."""
    if isinstance(blind.zero_gradient, jax.core.Tracer):
        return
    zero, nan = int(blind.zero_gradient.sum()), int(blind.nan_gradient.sum())
    found = [f"zero for {zero}"] * (zero > 0) + [f"NaN for {nan}"] * (nan > 0)
    if found:
        warn(
            f"{type(attack).__name__}: the gradient of the loss is {' and '.join(found)} of "
            f"{blind.zero_gradient.size} images where it starts: the attack is blind there, which "
            "says nothing of the network's robustness; look for a stopped gradient, quantised or "
            "saturated activations, and compare with `square`"
        )


# Distance between normalised logits above which two evaluations count as different.
SAME_LOGITS = 1e-4


def batch_message(difference: float) -> str:
    """What an image's logits that depend on its batch mean."""
    return (
        "the logits of an image depend on the other images of its batch, or on its place among "
        f"them (they move by {difference:.2g} of their norm): pass the network in evaluation mode, "
        "with BatchNorm's running statistics (train=False, use_running_average=True) and without "
        "dropout"
    )


def batch_dependence(network: LogitsFn, images: jax.Array) -> float | None:
    """How far logits move with the rest of the batch or the place in it; `None` if they do not.

    Args:
        network: a pytree callable.
        images: a batch; nothing is found of a single image.
    """
    if images.shape[0] < 2:
        return None
    kept = images.shape[0] // 2
    logits = logits_of(network, images)
    others = jnp.concatenate([images[:kept], 1 - images[kept:]])
    moved = [
        logits_difference(logits[:kept], logits_of(network, others)[:kept]),
        logits_difference(jnp.roll(logits, 1, 0), logits_of(network, jnp.roll(images, 1, 0))),
    ]
    return max(moved) if max(moved) > SAME_LOGITS else None


def logits_difference(logits: jax.Array, others: jax.Array) -> float:
    """Largest distance between an image's two logit vectors, each scaled to length 1."""

    def unit(rows: jax.Array) -> jax.Array:
        return rows / (jnp.linalg.norm(rows, axis=1, keepdims=True) + 1e-10)

    return float(jnp.linalg.norm(unit(logits) - unit(others), axis=1).max())


@jax.jit
def logits_of(network: LogitsFn, images: jax.Array) -> jax.Array:
    """The logits of a pytree callable, compiled."""
    return network(images)


def check_inputs(images: jax.Array, labels: jax.Array) -> None:
    """Refuses images and labels that no attack can mean.

    Values are looked at only outside `jit`, where they are known.

    Args:
        images: see any attack.
        labels: see any attack.

    Raises:
        ValueError: no images, images not float32 or float64 or outside [0, 1], labels not integers
            or not one per image.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images must be floats in [0, 1], got dtype {images.dtype}; divide pixels by 255"
        )
    if jnp.finfo(images.dtype).bits < 32:
        raise ValueError(
            f"images must be float32 or float64, got {images.dtype}, whose rounding leaves the "
            "ball; cast them, images.astype(jnp.float32), and let the network cast what it gets"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels must be integers of shape {images.shape[:1]}, "
            f"got {labels.dtype} of shape {labels.shape}"
        )
    if not labels.size:
        raise ValueError("there are no images to attack")
    if isinstance(images, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():  # images may be constants of a program that is traced
        low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):  # also true of NaN
        raise ValueError(f"images must lie in [0, 1], got values from {low} to {high}")


def check_labels(labels: jax.Array | np.ndarray, num_classes: int) -> None:
    """Refuses labels that are no class, where their values are known.

    Raises:
        ValueError: naming the range found.
    """
    if isinstance(labels, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():
        low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels must lie in [0, {num_classes}), the network's classes, got {low} to {high}"
        )


def as_array(value: Any) -> Any:
    """A list or a NumPy array as JAX's."""
    return value if isinstance(value, jax.Array) else jnp.asarray(value)
