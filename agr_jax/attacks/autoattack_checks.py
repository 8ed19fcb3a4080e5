"""What makes an evaluation unreliable, looked for before and after it.

Each check returns a message that says what to do, or `None`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from agr_jax.attacks.attack import LogitsFn

# Distance between normalised logits above which two evaluations count as different.
_SAME = 1e-4


class EvaluationWarning(UserWarning):
    """Something that makes a robust accuracy unreliable."""


def warn(message: str) -> None:
    """Shows a message of a check where the evaluation was asked for."""
    warnings.warn(message, EvaluationWarning, stacklevel=4)


def check_logits(logits: jax.Array, examples: int) -> None:
    """Refuses what is not `[examples, classes]` of finite floats.

    Raises:
        ValueError: naming what was found.
    """
    if logits.ndim != 2 or logits.shape[0] != examples or logits.shape[1] < 2:
        raise ValueError(
            f"logits_fn must return [batch, classes] with two or more classes, got shape "
            f"{logits.shape} for {examples} images"
        )
    if not bool(jnp.isfinite(logits).all()):
        raise ValueError("logits_fn returns NaN or infinite logits for clean images")


def check_batch_independence(logits_fn: LogitsFn, images: jax.Array) -> None:
    """Refuses a network whose logits for an image depend on the other images of the batch.

    Raises:
        ValueError: if they do, as with BatchNorm in training mode.
    """
    if images.shape[0] < 2:
        return
    kept = images.shape[0] // 2
    others = 1 - images[kept:]
    logits = _evaluate(logits_fn, images)
    again = _evaluate(logits_fn, jnp.concatenate([images[:kept], others]))
    difference = _difference(logits[:kept], again[:kept])
    if difference > _SAME:
        raise ValueError(
            "the logits of an image depend on the other images of its batch (they move by "
            f"{difference:.2g} of their norm): pass the network in evaluation mode, with "
            "BatchNorm's running statistics (train=False, use_running_average=True)"
        )


def randomised(logits_fn: LogitsFn, images: jax.Array) -> str | None:
    """A network that gives other logits for the same images."""
    # Traced anew each time: what a network draws in Python is a constant of one trace.
    results = []
    for _ in range(2):
        evaluate = jax.jit(functools.partial(_traced_anew, object()))
        results += [evaluate(logits_fn, images), evaluate(logits_fn, images)]
    difference = max(_difference(results[0], other) for other in results[1:])
    if difference <= _SAME:
        return None
    return (
        "the network gives other logits for the same images (they move by "
        f'{difference:.2g} of their norm), a randomised defence: use version="rand", with '
        "logits_fn(images, key)"
    )


def probabilities(logits: jax.Array) -> str | None:
    """Outputs that are a distribution over the classes."""
    sums = jnp.abs(logits.sum(-1) - 1)
    if float(logits.max()) < 1 + 1e-5 and float(logits.min()) > -1e-5 and float(sums.max()) < 1e-5:
        return (
            "the network seems to return probabilities: return the logits before the softmax, "
            "whose gradients do not vanish"
        )
    return None


def too_few_classes(num_classes: int, attacks: Sequence[str]) -> str | None:
    """Losses of AutoAttack that do not exist for so few classes."""
    replaced = []
    if "apgd-t" in attacks and num_classes < 4:
        replaced.append("apgd-t (the targeted DLR loss needs 4)")
    if "apgd-dlr" in attacks and num_classes < 3:
        replaced.append("apgd-dlr (the DLR loss needs 3)")
    if not replaced:
        return None
    return (
        f"the network has only {num_classes} classes: {' and '.join(replaced)} raises the "
        "difference of logits instead; do not compare the result with a published AutoAttack"
    )


def zero_gradients(counts: Mapping[str, int]) -> str | None:
    """Images at whose start a DLR loss had no gradient, or any loss one that is NaN."""
    found = [f"{name}: {count}" for name, count in counts.items() if count]
    if not found:
        return None
    return (
        "some runs started where the loss has no gradient, or one that is NaN (images x runs, "
        f"{', '.join(found)}): gradient-based attacks may be blind there; compare with Square, and "
        "look for saturated or quantised activations"
    )


def square_improves(after: Mapping[str, float]) -> str | None:
    """A gradient-free attack that beats the gradient-based ones."""
    others = [accuracy for name, accuracy in after.items() if name not in ("clean", "square")]
    if "square" not in after or not others or after["square"] >= min(others) - 0.002:
        return None
    return (
        f"Square lowered the robust accuracy by {100 * (min(others) - after['square']):.2f} "
        "points, which suggests masked gradients: run Square with more queries, or an attack "
        "adapted to the defence"
    )


def _traced_anew(_: object, logits_fn: LogitsFn, images: jax.Array) -> jax.Array:
    return logits_fn(images)


@jax.jit
def _evaluate(logits_fn: LogitsFn, images: jax.Array) -> jax.Array:
    return logits_fn(images)


def _difference(logits: jax.Array, others: jax.Array) -> float:
    """Largest distance between an image's two logit vectors, each scaled to length 1."""

    def unit(rows: jax.Array) -> jax.Array:
        return rows / (jnp.linalg.norm(rows, axis=1, keepdims=True) + 1e-10)

    return float(jnp.linalg.norm(unit(logits) - unit(others), axis=1).max())
