"""What makes an evaluation unreliable, looked for before and after it.

Each check returns a message that says what to do, or `None`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from agr_jax.attacks._attack import LogitsFn
from agr_jax.attacks._checks import (
    SAME_LOGITS,
    batch_dependence,
    batch_message,
    logits_difference,
    logits_of,
)


def check_finite(logits: np.ndarray) -> None:
    """Refuses NaN and infinities at clean images.

    Raises:
        ValueError: if there are any.
    """
    if not np.isfinite(logits).all():
        raise ValueError("logits_fn returns NaN or infinite logits for clean images")


def check_batch_independence(network: LogitsFn, images: jax.Array) -> None:
    """Refuses a network whose logits for an image depend on the rest of the batch.

    Raises:
        ValueError: if they do, as with BatchNorm in training mode, or on the image's place in the
            batch, as with dropout from one key.
    """
    difference = batch_dependence(network, images)
    if difference is not None:
        raise ValueError(batch_message(difference))


def randomised(network: LogitsFn, again: LogitsFn, images: jax.Array) -> str | None:
    """A network that gives other logits for the same images.

    Args:
        network: as it was traced once.
        again: as it was traced another time.
        images: a batch.
    """
    results = [logits_of(each, images) for each in (network, network, again, again)]
    difference = max(logits_difference(results[0], other) for other in results[1:])
    if difference <= SAME_LOGITS:
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
    """Images at whose start the loss had no gradient, or one that is NaN."""
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
