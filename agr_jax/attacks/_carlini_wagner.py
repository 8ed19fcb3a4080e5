"""The L2 attack of Carlini and Wagner: a small misclassified perturbation, by Adam."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from agr_jax import losses
from agr_jax.attacks._attack import GradientAttack, LogitsFn, differing
from agr_jax.attacks._calling import run
from agr_jax.attacks._checks import warn_of_blind
from agr_jax.attacks._outcome import Blind
from agr_jax.attacks._predictions import misclassified, surely_misclassified
from agr_jax.ranges import Range, check_ranges
from agr_jax.threat import L2, expand

# Pixels keep this share of the way from the middle to the border, where tanh has no inverse.
_INSIDE = 0.999999


@dataclasses.dataclass(frozen=True)
class CarliniWagnerL2(GradientAttack):
    """Lowers `|x' - x|^2 + weight * max(confidence - margin, 0)`, with a search for the weight.

    Called as `attack(logits_fn, images, labels, key)`, under `jit` or not; nothing is drawn.
    Returns the nearest misclassified point found where that is in the ball, and elsewhere the image
    itself.

    Attributes:
        threat: `L2` ball; the search itself knows no radius.
        steps: of Adam, for each weight. All are taken: unlike in the published code an image does
            not depend on how the others of its batch are doing.
        learning_rate: of Adam, on the inverse hyperbolic tangent of the pixels.
        searches: weights tried for each image: ten times larger until one succeeds, then halving
            the interval.
        initial_weight: the first one.
        confidence: least margin, in logits, of what counts as misclassified.

    Source: Carlini and Wagner, "Towards Evaluating the Robustness of Neural Networks", IEEE S&P
    2017, section VI.A, with the constants of its published code but for 1,000 steps of its 10,000.
    https://arxiv.org/abs/1608.04644

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from agr_jax.attacks import cw_l2
        >>> from agr_jax.threat import L2
        >>> images, labels = jnp.array([[[[0.6, 0.5]]]]), jnp.array([0])
        >>> attack = cw_l2(L2(0.1), steps=300)
        >>> adversarial = attack(lambda x: x.reshape(-1, 2), images, labels, jax.random.key(0))
        >>> adversarial.round(2).tolist()
        [[[[0.550000011920929, 0.550000011920929]]]]
    """

    threat: L2
    steps: int = 1000
    learning_rate: float = 0.01
    searches: int = 9
    initial_weight: float = 1e-3
    confidence: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.threat, L2):
            raise ValueError(f"CarliniWagnerL2.threat must be L2, got {self.threat!r}")
        above = Range(0, above=True)
        check_ranges(self, steps=Range(1), searches=Range(1), confidence=Range(0))
        check_ranges(self, learning_rate=above, initial_weight=above)

    def look(
        self, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Blind]:
        """What a call returns, and at which images the attack was blind."""
        points, distance, blind = run(_nearest, self, logits_fn, images, labels)
        near = expand(distance <= self.threat.epsilon, points)
        return jnp.where(near, points, jnp.asarray(images)), blind

    def nearest(
        self, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The nearest misclassified points, in the ball or not, and their distances `[batch]`.

        The distance is 0 where the image itself is misclassified; where nothing was found it is
        infinite, and the point is the image. Every point was looked at once more. Arguments, errors
        and warnings as `__call__`.
        """
        points, distance, blind = run(_nearest, self, logits_fn, images, labels, ball=False)
        warn_of_blind(self, blind)
        return points, distance


class _Found(NamedTuple):
    points: jax.Array
    distance: jax.Array


class _Interval(NamedTuple):
    """Weights of each image: the next one, the largest that failed, the least that did not."""

    weight: jax.Array
    failed: jax.Array
    succeeded: jax.Array

    def narrowed(self, success: jax.Array) -> _Interval:
        failed = jnp.where(success, self.failed, jnp.maximum(self.failed, self.weight))
        succeeded = jnp.where(success, jnp.minimum(self.succeeded, self.weight), self.succeeded)
        middle = (failed + succeeded) / 2
        return _Interval(
            jnp.where(succeeded < jnp.inf, middle, 10 * self.weight), failed, succeeded
        )


def _nearest(
    attack: CarliniWagnerL2, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array, Blind]:
    dtype = jnp.promote_types(images.dtype, jnp.float32)
    start = jnp.arctanh(_INSIDE * (2 * images.astype(dtype) - 1))
    adam = optax.adam(attack.learning_rate)

    def objective(variables: jax.Array, weight: jax.Array) -> tuple[jax.Array, Any]:
        points = ((jnp.tanh(variables) + 1) / 2).astype(images.dtype)
        squared = jnp.square((points - images).astype(dtype)).sum(tuple(range(1, images.ndim)))
        logits = logits_fn(points)
        margin = losses.margin(logits, labels).astype(dtype)
        hinge = jnp.maximum(attack.confidence - margin, 0)
        return (squared + weight * hinge).sum(), (points, squared, margin, logits)

    def search(_: int, carry: tuple[_Interval, _Found]) -> tuple[_Interval, _Found]:
        interval, found = carry

        def step(_: int, state: Any) -> Any:
            variables, moments, found, success = state
            gradient, (points, squared, margin, logits) = jax.grad(objective, has_aux=True)(
                variables, interval.weight
            )
            fooled = misclassified(logits, labels) & (margin >= attack.confidence)
            distance = jnp.sqrt(squared)
            counts = fooled & surely_misclassified(logits, labels)
            nearer = counts & (distance < found.distance)
            found = _Found(
                jnp.where(expand(nearer, images), points, found.points),
                jnp.where(nearer, distance, found.distance),
            )
            updates, moments = adam.update(gradient, moments)
            return variables + updates, moments, found, success | fooled

        begin = start, _moments(adam, start), found, none
        *_, found, success = lax.fori_loop(0, attack.steps, step, begin)
        return interval.narrowed(success), found

    def margins(points: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = logits_fn(points)
        return losses.margin(logits, labels).sum(), misclassified(logits, labels)

    gradient, wrong = jax.grad(margins, has_aux=True)(images)
    none = differing(jnp.zeros_like(wrong), labels)
    distance = differing(jnp.where(wrong, 0, jnp.inf).astype(dtype), labels)
    weight = differing(jnp.full_like(distance, attack.initial_weight), distance)
    limits = (differing(jnp.full_like(weight, limit), weight) for limit in (0, jnp.inf))
    interval = _Interval(weight, *limits)
    begin = interval, _Found(images, distance)
    _, found = lax.fori_loop(0, attack.searches, search, begin)
    # A second look, apart from the search's own gradient.
    seen = misclassified(logits_fn(lax.optimization_barrier(found.points)), labels)
    kept = seen | wrong
    points = jnp.where(expand(kept, images), found.points, images)
    distance = jnp.where(kept, found.distance, jnp.inf)
    blind = Blind.of(gradient)
    blind = Blind(blind.zero_gradient & ~wrong, blind.nan_gradient & ~wrong)
    return lax.stop_gradient(points), lax.stop_gradient(distance), blind


def _moments(adam: optax.GradientTransformation, variables: jax.Array) -> Any:
    """Adam's state at the start, which is not the same on all devices."""
    return jax.tree.map(
        lambda leaf: differing(leaf, variables) if leaf.shape == variables.shape else leaf,
        adam.init(variables),
    )
