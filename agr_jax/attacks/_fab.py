"""Fast Adaptive Boundary attack (FAB): the nearest misclassified point, by linearisation."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from agr_jax import losses
from agr_jax.attacks._attack import GradientAttack, LogitsFn, differing, loop_on_device
from agr_jax.attacks._calling import run
from agr_jax.attacks._checks import warn_of_blind
from agr_jax.attacks._hyperplane import step_to_hyperplane
from agr_jax.attacks._outcome import Blind, UnitOutcome
from agr_jax.attacks._predictions import likeliest_wrong_class, misclassified, surely_misclassified
from agr_jax.ranges import Range, check_ranges
from agr_jax.threat import L1, L2, Linf, check_norm_ball, expand, flatten, per_image, scaled

# Least length of a step, as a divisor: both steps are 0 where an iterate lies on the boundary.
_SHORTEST = 1e-8
# Restarts begin at this share of the radius.
_START = 0.5


@dataclasses.dataclass(frozen=True)
class FAB(GradientAttack):
    """Walks along the decision boundary towards the image; targeted, or to the nearest class.

    Called as `attack(logits_fn, images, labels, key)`, under `jit` or not. Returns the nearest
    misclassified point found where that is in the ball, and elsewhere the image itself.

    Attributes:
        threat: `Linf`, `L2` or `L1` ball; the search itself knows no radius.
        targets: number of target classes, the likeliest wrong ones at the clean image first; at
            most the number of classes minus one is used. 0 takes in each step the class whose
            linearised boundary is nearest, which costs one gradient for each class.
        steps: in each run.
        restarts: runs (for each target class): the first one from the image, others from a random
            point at half the radius.
        alpha_max: largest weight of the step from the image against the step from the iterate.
        overshoot: factor of a step to the boundary, above 1 to cross it.
        backward: share of the way from the image that a misclassified iterate keeps.
        stop_when_fooled: keep an image's first point in its ball, and end once every image of the
            batch has one; the verdict is the same, the points are farther away.

    Source: Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary
    attack", ICML 2020, algorithm 1, with the constants of its published code.
    https://arxiv.org/abs/1907.02044

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from agr_jax.attacks import fab
        >>> from agr_jax.threat import L2
        >>> images, labels = jnp.array([[[[0.6, 0.5]]]]), jnp.array([0])
        >>> attack = fab(L2(0.1), targets=1)
        >>> adversarial = attack(lambda x: x.reshape(-1, 2), images, labels, jax.random.key(0))
        >>> adversarial.round(2).tolist()
        [[[[0.550000011920929, 0.550000011920929]]]]
    """

    threat: Linf | L2 | L1
    targets: int = 9
    steps: int = 100
    restarts: int = 1
    alpha_max: float = 0.1
    overshoot: float = 1.05
    backward: float = 0.9
    stop_when_fooled: bool = False

    def __post_init__(self) -> None:
        check_norm_ball("FAB.threat", self.threat)
        check_ranges(self, steps=Range(1), restarts=Range(1), targets=Range(0))

    def look(
        self, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Blind]:
        """What a call returns, and at which images the attack was blind."""
        points, distance, blind = run(_nearest, self, logits_fn, images, labels, key=key)
        near = expand(distance <= self.threat.epsilon, points)
        return jnp.where(near, points, jnp.asarray(images)), blind

    def nearest(
        self, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The nearest misclassified points, in the ball or not, and their distances `[batch]`.

        The distance is 0 where the image itself is misclassified; where nothing was found it is
        infinite, and the point is the image. Every point was looked at once more. Arguments, errors
        and warnings as `__call__`.
        """
        points, distance, blind = run(
            _nearest, self, logits_fn, images, labels, key=key, ball=False
        )
        warn_of_blind(self, blind)
        return points, distance

    @property
    def passes(self) -> int:
        """Forward passes of one unit for one image; a gradient counts as two more."""
        return 4 * self.steps

    @property
    def stages(self) -> tuple[int, ...]:
        """Empty: a unit is one program."""
        return ()

    def units(self, num_classes: int) -> int:
        """Number of runs: restarts, times target classes."""
        return self.restarts * (min(self.targets, num_classes - 1) if self.targets else 1)

    def unit(
        self,
        logits_fn: LogitsFn,
        images: jax.Array,
        labels: jax.Array,
        keys: jax.Array,
        index: jax.Array | int,
    ) -> UnitOutcome:
        """One run of each image; see `APGD.unit`."""
        found, blind = _run(self, logits_fn, images, labels, keys, index)
        return UnitOutcome(
            points=jnp.where(expand(found.in_ball, images), found.points, images),
            fooled=found.in_ball,
            blind=blind,
        )


class _Found(NamedTuple):
    points: jax.Array
    distance: jax.Array
    in_ball: jax.Array


class _State(NamedTuple):
    """What one step leaves for the next: the iterates, and the boundary as seen from there.

    The step reads the gradient many times. As a part of the loop's state it is computed once; XLA's
    CPU compiler would put the last operations of the network's gradient in each place.
    """

    points: jax.Array
    difference: jax.Array
    gradient: jax.Array
    found: _Found


def _nearest(
    attack: FAB, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, keys: jax.Array
) -> tuple[jax.Array, jax.Array, Blind]:
    logits = logits_fn(images)
    wrong = jnp.argmax(logits, axis=1) != labels

    def one(
        index: jax.Array, best: tuple[jax.Array, jax.Array, Blind]
    ) -> tuple[jax.Array, jax.Array, Blind]:
        points, distance, blind = best
        found, also = _run(attack, logits_fn, images, labels, keys, index)
        # A second look, apart from the search's own gradient.
        seen = misclassified(logits_fn(lax.optimization_barrier(found.points)), labels)
        nearer = (found.distance < distance) & seen
        return (
            jnp.where(expand(nearer, images), found.points, points),
            jnp.where(nearer, found.distance, distance),
            blind.both(also),
        )

    distance = jnp.where(wrong, 0, jnp.inf).astype(images.dtype)
    none = differing(jnp.zeros_like(wrong), labels)
    start = images, differing(distance, labels), Blind(~none, none)
    points, distance, blind = lax.fori_loop(0, attack.units(logits.shape[1]), one, start)
    blind = Blind(blind.zero_gradient & ~wrong, blind.nan_gradient & ~wrong)
    return lax.stop_gradient(points), lax.stop_gradient(distance), blind


def _run(
    attack: FAB,
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    keys: jax.Array,
    index: jax.Array | int,
) -> tuple[_Found, Blind]:
    start, step = _prepare(attack, logits_fn, images, labels, keys, index)
    finished = _all_in_ball if attack.stop_when_fooled else None
    state = step.start(logits_fn, differing(start, images), _nothing(images, labels))
    result = loop_on_device(step, logits_fn, state, attack.steps, finished)
    return result.found, Blind.of(state.gradient)


def _prepare(
    attack: FAB,
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    keys: jax.Array,
    index: jax.Array | int,
) -> tuple[jax.Array, _Step]:
    index, targets = jnp.broadcast_to(index, labels.shape), None
    if attack.targets:
        targets = likeliest_wrong_class(logits_fn(images), labels, index // attack.restarts)
    start = images
    if attack.restarts > 1:
        keys = jax.vmap(jax.random.fold_in)(keys, index)
        first = expand(index % attack.restarts == 0, images)
        start = jnp.where(first, images, _random_start(attack.threat, keys, images))
    return start, _Step(attack, images, labels, targets)


def _nothing(images: jax.Array, labels: jax.Array) -> _Found:
    return _Found(
        points=images,
        distance=differing(jnp.full_like(labels, jnp.inf, images.dtype), labels),
        in_ball=differing(jnp.zeros_like(labels, bool), labels),
    )


def _all_in_ball(state: _State) -> jax.Array:
    return state.found.in_ball.all()


@dataclasses.dataclass(frozen=True)
class _Step:
    """One step to the boundary and back."""

    attack: FAB
    images: jax.Array
    labels: jax.Array
    targets: jax.Array | None

    def start(self, logits_fn: LogitsFn, points: jax.Array, found: _Found) -> _State:
        """With the boundary as seen from these points."""
        boundary = _nearest_boundary(
            self.attack.threat, logits_fn, points, self.labels, self.targets
        )
        return _State(points, *boundary, found)

    def __call__(self, logits_fn: LogitsFn, state: _State, index: jax.Array) -> _State:
        points, difference, gradient, found = state
        attack, images, threat = self.attack, self.images, self.attack.threat
        weights, here, flat_images = flatten(gradient), flatten(points), flatten(images)
        # The same hyperplane, seen from the iterate and from the image.
        from_image = difference + (weights * (flat_images - here)).sum(1)
        step_here, step_image = step_to_hyperplane(
            threat,
            jnp.stack([here, flat_images]),
            weights[None],
            jnp.stack([difference, from_image]),
        )
        length_here = jnp.maximum(_norm(threat, step_here), _SHORTEST)
        length_image = jnp.maximum(_norm(threat, step_image), _SHORTEST)
        # The nearer the iterate is to the boundary, the less the image pulls it back.
        alpha = jnp.minimum(length_here / (length_here + length_image), attack.alpha_max)[:, None]
        ahead = (1 - alpha) * (here + attack.overshoot * step_here)
        ahead += alpha * (flat_images + attack.overshoot * step_image)
        moved = jnp.clip(ahead, 0, 1).reshape(images.shape)
        logits = logits_fn(moved)
        wrong = misclassified(logits, self.labels)
        sure = surely_misclassified(logits, self.labels)
        distance = threat.distance(moved, images)
        nearer = sure & (distance < found.distance)
        if attack.stop_when_fooled:
            nearer &= ~found.in_ball
        best = _Found(
            points=jnp.where(expand(nearer, images), moved, found.points),
            distance=jnp.where(nearer, distance, found.distance),
            in_ball=found.in_ball | (sure & (distance <= threat.epsilon)),
        )
        # Behind the boundary: go back towards the image, to look for a nearer point.
        back = images + attack.backward * (moved - images)
        return self.start(logits_fn, jnp.where(expand(wrong, images), back, moved), best)


def _nearest_boundary(
    threat: Linf | L2 | L1,
    logits_fn: LogitsFn,
    points: jax.Array,
    labels: jax.Array,
    targets: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The logit of a class minus the label's, and its gradient: the target's, or the nearest's."""
    if targets is not None:

        def total(points: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = logits_fn(points)
            difference = losses.targeted_margin(logits, labels, targets).astype(points.dtype)
            return difference.sum(), difference

        gradient, difference = jax.grad(total, has_aux=True)(points)
        return difference, gradient

    logits, pull_back = jax.vjp(logits_fn, points)
    num_classes = logits.shape[1]
    is_label = jax.nn.one_hot(labels, num_classes, dtype=logits.dtype)

    def of_class(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        one_hot = jax.nn.one_hot(jnp.broadcast_to(index, labels.shape), num_classes)
        (gradient,) = pull_back(one_hot.astype(logits.dtype) - is_label)
        classes = jnp.full_like(labels, index)
        return losses.targeted_margin(logits, labels, classes).astype(points.dtype), gradient

    def nearest(best: Any, index: jax.Array) -> tuple[Any, None]:
        difference, gradient = of_class(index)
        length = _dual_norm(threat, flatten(gradient))
        distance = jnp.abs(difference) / jnp.maximum(length, jnp.finfo(length.dtype).tiny)
        distance = jnp.where(index == labels, jnp.inf, distance)
        nearer = distance < best[0]
        chosen = (
            jnp.where(nearer, distance, best[0]),
            jnp.where(nearer, difference, best[1]),
            jnp.where(expand(nearer, points), gradient, best[2]),
        )
        return chosen, None

    infinite = differing(jnp.full(labels.shape, jnp.inf, points.dtype), labels)
    none = differing(jnp.zeros_like(points), points)
    start = infinite, differing(jnp.zeros_like(infinite), labels), none
    (_, difference, gradient), _ = lax.scan(nearest, start, jnp.arange(num_classes))
    return difference, gradient


def _norm(threat: Linf | L2 | L1, rows: jax.Array) -> jax.Array:
    return threat.distance(rows, jnp.zeros_like(rows))


def _dual_norm(threat: Linf | L2 | L1, rows: jax.Array) -> jax.Array:
    dual = {Linf: L1, L2: L2, L1: Linf}[type(threat)]
    # Of the entries over the largest one: their squares do not round to 0.
    return jnp.abs(rows).max(1) * _norm(dual(0.0), scaled(rows))


def _random_start(threat: Linf | L2 | L1, keys: jax.Array, images: jax.Array) -> jax.Array:
    """At half the radius in a random direction, cut by the box."""

    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if isinstance(threat, Linf):
            return jax.random.uniform(key, shape, images.dtype, -1, 1)
        return jax.random.normal(key, shape, images.dtype)

    direction = per_image(keys, images, draw)
    length = _norm(threat, flatten(direction))
    factor = expand(_START * threat.epsilon / length, images)
    return jnp.clip(images + factor * direction, 0, 1)
