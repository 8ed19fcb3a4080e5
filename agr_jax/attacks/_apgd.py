"""Auto-PGD (APGD): projected gradient ascent that chooses its own step size, image by image."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from agr_jax import losses
from agr_jax.attacks._apgd_rules import Found, Momentum, Rule, Sparse
from agr_jax.attacks._attack import (
    GradientAttack,
    LogitsFn,
    Loop,
    LossFn,
    differing,
    loop_on_device,
)
from agr_jax.attacks._calling import run
from agr_jax.attacks._checks import as_array
from agr_jax.attacks._objective import climbed, mean_over_draws
from agr_jax.attacks._outcome import Blind, UnitOutcome
from agr_jax.attacks._predictions import likeliest_wrong_class, misclassified
from agr_jax.ranges import Range, check_ranges
from agr_jax.threat import L1, L2, Linf, check_norm_ball, expand, gaussian_noise, per_image

# Under L1, multiples of the radius that the search passes through, and the shares of the steps that
# it spends at the larger ones, as in the published code.
_LARGE_RADII = (3.0, 2.0, 1.0)
_SHARE_OF_STEPS = (0.3, 0.3)  # the last radius has the rest


@dataclasses.dataclass(frozen=True)
class APGD(GradientAttack):
    """Auto-PGD under L-infinity, L2 or L1, untargeted or against the likeliest wrong classes.

    Called as `attack(logits_fn, images, labels, key)`, under `jit` or not. An image that is
    misclassified without an attack is returned as it is; one that is fooled, as the latest iterate
    that was misclassified (the first one with `stop_when_fooled`); any other, as the iterate of
    highest loss of the last run.

    Attributes:
        threat: `Linf`, `L2` or `L1` ball.
        loss: `loss(logits, labels) -> [batch]`, to be raised, by default the cross-entropy (whose
            log odds are climbed, which do not saturate: `losses.log_odds`); with
            `targets` it is `loss(logits, labels, target_classes)`, by default `targeted_dlr`.
        targets: number of target classes, the likeliest wrong ones at the clean image first; at
            most the number of classes minus one is used. 0 for an untargeted attack.
        steps: gradient steps in each run.
        restarts: runs from a random start each (for each target class).
        rho: share of steps that must raise the loss for the step size to stay.
        draws: 0 for a network `logits_fn(images)`. Otherwise it is randomised,
            `logits_fn(images, key)`, and the gradient is the mean of this many draws.
        large_radii: search at three and two times epsilon first; for L1 only.
        stop_when_fooled: leave an image at its first misclassified iterate. The verdict is the
            same, and a batch of fooled images ends early.

    Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of
    diverse parameter-free attacks", ICML 2020, algorithm 1; for L1 "Mind the box: l1-APGD for
    sparse adversarial attacks on image classifiers", ICML 2021, algorithm 1; and their published
    code where it says more.
    https://arxiv.org/abs/2103.01208, https://arxiv.org/abs/2003.01690

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from agr_jax.attacks import apgd
        >>> from agr_jax.threat import L2
        >>> images, labels = jnp.full([1, 1, 1, 2], 0.5), jnp.array([0])
        >>> attack = apgd(L2(0.1), steps=20)
        >>> adversarial = attack(lambda x: x.reshape(-1, 2), images, labels, jax.random.key(0))
        >>> [f"{pixel:.2f}" for pixel in adversarial.ravel().tolist()]
        ['0.43', '0.57']
    """

    threat: Linf | L2 | L1
    loss: LossFn | None = None
    targets: int = 0
    steps: int = 100
    restarts: int = 1
    rho: float = 0.75
    draws: int = 0
    large_radii: bool = False
    stop_when_fooled: bool = False

    def __post_init__(self) -> None:
        check_norm_ball("APGD.threat", self.threat)
        check_ranges(self, steps=Range(1), restarts=Range(1), targets=Range(0), draws=Range(0))
        if not 0 <= self.rho <= 1:
            raise ValueError(f"APGD.rho must lie in [0, 1], got {self.rho}")
        if self.large_radii and not isinstance(self.threat, L1):
            raise ValueError(f"APGD.large_radii is for L1 alone, got it with {self.threat!r}")
        if min(self._steps_of_stages()) < 1:
            raise ValueError(
                f"APGD.steps must be enough for the three radii of large_radii, got {self.steps}"
            )

    def look(
        self, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Blind]:
        """What a call returns, and at which images the attack was blind."""
        result: tuple[jax.Array, Blind] = run(
            _run_all, self, logits_fn, images, labels, key=key, loss_takes=self._loss_takes()
        )
        return result

    def _loss_takes(self) -> tuple[str, ...]:
        return ("labels", "labels") if self.targets else ("labels",)

    @property
    def passes(self) -> int:
        """Forward passes of one unit for one image; a gradient counts as two more."""
        return 3 * self.steps * max(self.draws, 1)

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
        loop: Loop = loop_on_device,
    ) -> UnitOutcome:
        """One run of each image, from a random start.

        Args:
            logits_fn: see `__call__`; a pytree.
            images: floats in [0, 1], classified correctly.
            labels: `[batch]` integers.
            keys: one per image.
            index: which run, in `[0, units)`, one number or one for each image, may be traced:
                restarts of the likeliest target come first.
            loop: how steps are repeated, see `agr_jax.attacks._attack`.
        """
        radii = _LARGE_RADII if self.large_radii else (1.0,)
        stages = [
            dataclasses.replace(
                self,
                threat=dataclasses.replace(self.threat, epsilon=radius * self.threat.epsilon),
                steps=count,
                # Beyond the radius nothing counts: only the last stage may stop an image.
                stop_when_fooled=self.stop_when_fooled and radius == radii[-1],
            )
            for radius, count in zip(radii, self._steps_of_stages(), strict=True)
        ]
        start, objective = _prepare(stages[0], logits_fn, images, labels, keys, index)
        for stage in stages:
            result = _search(
                stage, objective, logits_fn, images, start, warm=self.large_radii, loop=loop
            )
            start = result.best_points
        return UnitOutcome(result.points, result.fooled, result.blind)

    def _steps_of_stages(self) -> list[int]:
        if not self.large_radii:
            return [self.steps]
        wide = [math.ceil(share * self.steps) for share in _SHARE_OF_STEPS]
        return [*wide, self.steps - sum(wide)]

    def trajectory(
        self,
        logits_fn: LogitsFn,
        images: jax.Array,
        labels: jax.Array,
        start: jax.Array,
        *,
        target_classes: jax.Array | None = None,
        warm: bool = False,
    ) -> Trajectory:
        """One run from a given start, with what it did in each step; for study and for tests.

        Args:
            logits_fn: of a network that is not randomised; see `PGD.__call__`.
            images: floats in [0, 1].
            labels: `[batch]` integers.
            start: points in the ball and the box.
            target_classes: `[batch]` integers, which a targeted loss gets.
            warm: under L1, take the first sparsity from the start, as after another radius.
        """
        if target_classes is not None:
            target_classes = as_array(target_classes)
        takes = ("labels",) if target_classes is None else ("labels", "labels")
        function = _warm_trajectory if warm else _trajectory
        result: Trajectory = run(
            function,
            self,
            logits_fn,
            images,
            labels,
            as_array(start),
            target_classes,
            loss_takes=takes,
        )
        return result


class Trajectory(NamedTuple):
    """A run of APGD, step by step.

    Attributes:
        best_points: `[batch, ...]`, of highest loss.
        best_loss: `[batch]`.
        points: `[batch, ...]`, see `UnitOutcome`.
        loss: `[steps, batch]`, after each step.
        fooled: booleans `[steps, batch]`: at the start or at an iterate so far.
        step_size: `[steps, batch]`, used in each step.
        sparsity: `[steps, batch]`, share of the pixels that each step moved; 1 but for L1.
    """

    best_points: jax.Array
    best_loss: jax.Array
    points: jax.Array
    loss: jax.Array
    fooled: jax.Array
    step_size: jax.Array
    sparsity: jax.Array


@dataclasses.dataclass(frozen=True)
class _Objective:
    """Height, prediction and gradient at a batch of points; the height is what is climbed."""

    attack: APGD
    labels: jax.Array
    target_classes: jax.Array | None
    keys: jax.Array | None

    @property
    def loss(self) -> LossFn:
        """The loss that the attack is to raise."""
        default = losses.cross_entropy if self.target_classes is None else losses.targeted_dlr
        return self.attack.loss or default

    @property
    def saturates(self) -> bool:
        """Whether the loss is the cross-entropy, in whose place its log odds are climbed."""
        return self.loss is losses.cross_entropy

    def reported(self, height: jax.Array) -> jax.Array:
        """The loss at a height."""
        return jax.nn.softplus(height) if self.saturates else height

    def at(
        self, logits_fn: LogitsFn, points: jax.Array, step: jax.Array | int
    ) -> tuple[Any, Any, Any]:
        """Per-image height, whether it is misclassified, and the gradient of the height."""

        def total(points: jax.Array, *key: jax.Array) -> tuple[jax.Array, Any]:
            logits = logits_fn(points, *key)
            height = self.height(logits).astype(points.dtype)
            return height.sum(), (height, misclassified(logits, self.labels))

        evaluate = jax.value_and_grad(total, has_aux=True)
        if not self.attack.draws:
            (_, (height, wrong)), gradient = evaluate(points)
            return height, wrong, gradient
        assert self.keys is not None
        keys = jax.random.split(jax.random.fold_in(self.keys[0], step), self.attack.draws)

        def of_draw(key: jax.Array) -> tuple[jax.Array, Any, jax.Array]:
            (_, (height, wrong)), gradient = evaluate(points, key)
            return height, (height, wrong), gradient

        (height, wrong), gradient = mean_over_draws(of_draw, keys, of_log_odds=self.saturates)
        return height, wrong, gradient

    def height(self, logits: jax.Array) -> jax.Array:
        classes = () if self.target_classes is None else (self.target_classes,)
        return climbed(self.loss)(logits, self.labels, *classes)


def _run_all(
    attack: APGD, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, keys: jax.Array
) -> tuple[jax.Array, Blind]:
    logits = logits_fn(images, keys[0]) if attack.draws else logits_fn(images)

    def one(
        index: jax.Array, best: tuple[jax.Array, jax.Array, Blind]
    ) -> tuple[jax.Array, jax.Array, Blind]:
        points, fooled, blind = best
        outcome = attack.unit(logits_fn, images, labels, keys, index)
        points = jnp.where(expand(fooled, images), points, outcome.points)
        return points, fooled | outcome.fooled, blind.both(outcome.blind)

    wrong = jnp.argmax(logits, axis=1) != labels
    none = differing(jnp.zeros_like(wrong), labels)
    start = images, wrong, Blind(~none, none)
    points, _, blind = lax.fori_loop(0, attack.units(logits.shape[1]), one, start)
    # What is misclassified without an attack needs no gradient.
    blind = Blind(blind.zero_gradient & ~wrong, blind.nan_gradient & ~wrong)
    return lax.stop_gradient(points), blind


class _Result(NamedTuple):
    points: jax.Array
    fooled: jax.Array
    blind: Blind
    best_points: jax.Array
    best_loss: jax.Array


class _State(NamedTuple):
    """Of the search: the current point, its gradient, what was found, and the step rule's own."""

    points: jax.Array
    gradient: jax.Array
    found: Found
    rule: Any


def _prepare(
    attack: APGD,
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    keys: jax.Array,
    index: jax.Array | int,
) -> tuple[jax.Array, _Objective]:
    """The random start, and the loss with its target classes."""
    index = jnp.broadcast_to(index, labels.shape)
    keys = jax.vmap(jax.random.fold_in)(keys, index)
    start = _random_start(attack.threat, keys, images)
    classes = None
    if attack.targets:
        logits = logits_fn(images, keys[0]) if attack.draws else logits_fn(images)
        classes = likeliest_wrong_class(logits, labels, index // attack.restarts)
    return start, _Objective(attack, labels, classes, keys)


def _search(
    attack: APGD,
    objective: _Objective,
    logits_fn: LogitsFn,
    images: jax.Array,
    start: jax.Array,
    *,
    warm: bool,
    loop: Loop,
) -> _Result:
    rule: Rule
    if isinstance(attack.threat, L1):
        rule = Sparse(attack.threat, attack.steps, warm)
    else:
        rule = Momentum(attack.threat, attack.steps, attack.rho)
    step = _Step(rule, attack.stop_when_fooled, objective, images)
    state, blind = _begin(step, logits_fn, start)
    finished = _all_fooled if attack.stop_when_fooled else None
    state = loop(step, logits_fn, state, attack.steps, finished)
    found = state.found
    points = jnp.where(expand(found.fooled, images), found.points, found.best_points)
    return _Result(points, found.fooled, blind, found.best_points, found.best_loss)


def _trajectory(
    attack: APGD,
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    start: jax.Array,
    target_classes: jax.Array | None,
    *,
    warm: bool = False,
) -> Trajectory:
    objective = _Objective(attack, labels, target_classes, None)
    records = []

    def recorded(
        step: _Step, logits_fn: LogitsFn, state: _State, count: int, finished: Any
    ) -> _State:
        one = functools.partial(step.recorded, logits_fn)
        state, record = lax.scan(one, state, jnp.arange(count))
        records.extend(record)
        return state

    result = _search(attack, objective, logits_fn, images, start, warm=warm, loop=recorded)
    heights, *others = records
    return Trajectory(
        result.best_points,
        objective.reported(result.best_loss),
        result.points,
        objective.reported(heights),
        *others,
    )


_warm_trajectory = functools.partial(_trajectory, warm=True)


def _all_fooled(state: _State) -> jax.Array:
    return state.found.fooled.all()


@dataclasses.dataclass(frozen=True)
class _Step:
    """One gradient step."""

    rule: Rule
    stop_when_fooled: bool
    objective: _Objective
    images: jax.Array

    def __call__(self, logits_fn: LogitsFn, state: _State, index: jax.Array) -> _State:
        return self.recorded(logits_fn, state, index)[0]

    def recorded(self, logits_fn: LogitsFn, state: _State, index: jax.Array) -> tuple[_State, Any]:
        """The next state, and what a `Trajectory` keeps of the step."""
        points, moved = self.rule.move(state.rule, self.images, state.points, state.gradient, index)
        loss, wrong, gradient = self.objective.at(logits_fn, points, index + 1)
        found = _update(self.stop_when_fooled, state.found, points, loss, wrong, gradient)
        restart, checked = self.rule.check(moved, self.images, found, loss, index)
        back = expand(restart, self.images)
        next_state = _State(
            points=jnp.where(back, found.best_points, points),
            gradient=jnp.where(back, found.best_gradient, gradient),
            found=found,
            rule=checked,
        )
        return next_state, (loss, found.fooled, *self.rule.used(state.rule))


def _begin(step: _Step, logits_fn: LogitsFn, start: jax.Array) -> tuple[_State, Blind]:
    """The state at the start, and where the loss has no gradient there, or a NaN one."""
    # Under L1 a start from a larger radius is pulled in; elsewhere it lies in the ball already.
    start = step.rule.threat.project(start, step.images)
    loss, wrong, gradient = step.objective.at(logits_fn, start, 0)
    found = Found(start, wrong, start, loss, gradient)
    # The published code compares the first loss with 0: a cross-entropy is above it.
    last = jnp.full_like(loss, -jnp.inf if step.objective.saturates else 0)
    rule = step.rule.begin(step.images, start, loss, differing(last, loss))
    return _State(start, gradient, found, rule), Blind.of(gradient)


def _update(
    stop_when_fooled: bool,
    found: Found,
    points: jax.Array,
    loss: jax.Array,
    wrong: jax.Array,
    gradient: jax.Array,
) -> Found:
    taken = wrong & ~found.fooled if stop_when_fooled else wrong
    better = loss > found.best_loss
    best = expand(better, points)
    return Found(
        points=jnp.where(expand(taken, points), points, found.points),
        fooled=found.fooled | wrong,
        best_points=jnp.where(best, points, found.best_points),
        best_loss=jnp.where(better, loss, found.best_loss),
        best_gradient=jnp.where(best, gradient, found.best_gradient),
    )


def _random_start(threat: Linf | L2 | L1, keys: jax.Array, images: jax.Array) -> jax.Array:
    """On the surface of the ball, before the box cuts it; under L1, noise projected into both."""
    if isinstance(threat, L1):
        return threat.project(images + gaussian_noise(keys, images), images)

    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if isinstance(threat, Linf):
            noise = jax.random.uniform(key, shape, images.dtype, -1, 1)
            return noise / jnp.abs(noise).max()
        noise = jax.random.normal(key, shape, images.dtype)
        return noise / jnp.sqrt(jnp.sum(noise**2))

    return jnp.clip(images + threat.epsilon * per_image(keys, images, draw), 0, 1)
