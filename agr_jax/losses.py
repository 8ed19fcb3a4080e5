"""Losses on logits, one value per example, for training to lower and attacks to raise.

Every function takes logits `[batch, classes]` (float, any scale) and integer labels `[batch]` and
returns `[batch]` in the dtype of the logits. None of them makes a NaN from logits whose differences
are finite, in the value or in the gradient.

Example:
    >>> import jax.numpy as jnp
    >>> from agr_jax import losses
    >>> logits, labels = jnp.array([[2.0, 1.0, 0.0]]), jnp.array([1])
    >>> losses.margin(logits, labels).tolist()
    [1.0]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0
) -> jax.Array:
    """Cross-entropy `-log softmax(logits)[label]`, in nats.

    Args:
        logits: `[batch, classes]`.
        labels: `[batch]`, integers in `[0, classes)`.
        label_smoothing: share of the target spread evenly over all classes, in `[0, 1)`.
    """
    log_probabilities = jax.nn.log_softmax(logits)
    loss = -_pick(log_probabilities, labels)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_probabilities.mean(-1)
    return loss


def log_odds(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Log odds against the label, `log(1 - p) - log(p)` with p = softmax(logits)[label].

    The cross-entropy is `softplus` of it: both rise together, and for one image their gradients
    point the same way. But the cross-entropy loses the label's half of its gradient where p rounds
    to 1 (in float32 from a margin of 16.7), and all of it where the other probabilities round to 0
    (from 88); this one has a gradient of the same size everywhere. Attacks that are given the
    cross-entropy therefore climb this.

    Args:
        logits: `[batch, classes]`, two classes or more.
        labels: `[batch]`, integers in `[0, classes)`.
    """
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    others = jax.nn.logsumexp(jnp.where(is_label, -jnp.inf, logits), axis=-1)
    return others - _pick(logits, labels)


def margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Largest other logit minus the label's: positive where misclassified.

    Its sign-gradient attack is the "CW-inf" of adversarial training papers (without kappa).
    """
    return _best_other(logits, labels) - _pick(logits, labels)


def dlr(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Difference of logits ratio, `margin / (z_(1) - z_(3) + 1e-12)`; needs three classes.

    Where the denominator is less than one rounding of the logits, as at ties of three, the gradient
    is that with this rounding in its place, and so bounded.

    Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of
    diverse parameter-free attacks", ICML 2020, equation 6.
    https://arxiv.org/abs/2003.01690
    """
    _need_classes(logits, 3, "dlr")
    wide = _wide(logits)
    ordered = jnp.sort(wide, axis=-1)
    ratio = _ratio(wide, margin(wide, labels), ordered[:, -1] - ordered[:, -3])
    return ratio.astype(logits.dtype)


def targeted_dlr(logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
    """Targeted DLR, `(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12)`; needs four classes.

    Ties are treated as by `dlr`.

    Source: as `dlr`, equation 7.
    """
    _need_classes(logits, 4, "targeted_dlr")
    wide = _wide(logits)
    ordered = jnp.sort(wide, axis=-1)
    spread = ordered[:, -1] - 0.5 * (ordered[:, -3] + ordered[:, -4])
    return _ratio(wide, targeted_margin(wide, labels, targets), spread).astype(logits.dtype)


def targeted_margin(logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
    """The target's logit minus the label's, for networks with too few classes for a DLR loss."""
    return _pick(logits, targets) - _pick(logits, labels)


def kl_divergence(logits: jax.Array, other_logits: jax.Array) -> jax.Array:
    """KL(softmax(logits) || softmax(other_logits)) per example, in nats, with 0 log 0 = 0."""
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(other_logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy with a distribution over the classes as the target, in nats.

    Args:
        logits: `[batch, classes]`.
        targets: `[batch, classes]`, rows that sum to 1.
    """
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


def boosted_cross_entropy(
    logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0
) -> jax.Array:
    """MART's loss on adversarial logits: cross-entropy plus a margin term.

    `-log q_y - log(1.0001 - max_(j != y) q_j + 1e-12)` with q = softmax(logits). The second term is
    evaluated as the sum of the other probabilities, which does not cancel where one class has them
    all.

    Args:
        logits: `[batch, classes]`.
        labels: `[batch]`, integers.
        label_smoothing: of the first term.

    Source: Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified
    Examples", ICLR 2020, equation 9; constants of its published code.
    """
    wide = _wide(logits)
    is_label = jax.nn.one_hot(labels, wide.shape[-1], dtype=bool)
    best_other = jnp.argmax(jnp.where(is_label, -jnp.inf, wide), axis=-1)
    is_best_other = jax.nn.one_hot(best_other, wide.shape[-1], dtype=bool)
    remaining = jnp.sum(jnp.where(is_best_other, 0, jax.nn.softmax(wide)), axis=-1)
    first = cross_entropy(wide, labels, label_smoothing=label_smoothing)
    return (first - jnp.log(remaining + (1e-4 + 1e-12))).astype(logits.dtype)


def weighted_kl_divergence(
    logits: jax.Array, other_logits: jax.Array, labels: jax.Array
) -> jax.Array:
    """MART's regulariser: KL(p || q), heavier where the clean prediction p doubts the label.

    `(1.0000001 - p_y) sum_k p_k (log p_k - log(q_k + 1e-12))` with p = softmax(logits) and
    q = softmax(other_logits).

    Source: as `boosted_cross_entropy`, equation 10.
    """
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    log_p = jax.nn.log_softmax(_wide(logits))
    p, q = jnp.exp(log_p), jax.nn.softmax(_wide(other_logits))
    unsure = 1e-7 + jnp.sum(jnp.where(is_label, 0, p), axis=-1)
    loss = unsure * jnp.sum(p * (log_p - jnp.log(q + 1e-12)), axis=-1)
    return loss.astype(logits.dtype)


def _wide(logits: jax.Array) -> jax.Array:
    """At least float32: in float16 a guard of 1e-12 is 0."""
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _ratio(logits: jax.Array, margins: jax.Array, spread: jax.Array) -> jax.Array:
    """`margins / (spread + 1e-12)`, with the gradient of a spread that is no rounding error."""
    rounding = jnp.finfo(logits.dtype).eps * jax.lax.stop_gradient(jnp.abs(logits).max(-1))
    bounded = margins / (jnp.maximum(spread, rounding) + 1e-12)
    return bounded + jax.lax.stop_gradient(margins / (spread + 1e-12) - bounded)


def _pick(values: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, labels[:, None], axis=-1)[:, 0]


def _best_other(logits: jax.Array, labels: jax.Array) -> jax.Array:
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    return jnp.max(jnp.where(is_label, -jnp.inf, logits), axis=-1)


def _need_classes(logits: jax.Array, least: int, name: str) -> None:
    if logits.shape[-1] < least:
        raise ValueError(f"{name} needs at least {least} classes, got {logits.shape[-1]}")
