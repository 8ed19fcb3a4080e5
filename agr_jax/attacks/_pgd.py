"""FGSM and projected gradient descent (PGD) under any threat model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from agr_jax import losses
from agr_jax.attacks._attack import GradientAttack, LogitsFn, LossFn, differing
from agr_jax.attacks._calling import run
from agr_jax.attacks._checks import as_array, check_inputs, warn_of_blind
from agr_jax.attacks._objective import climbed, mean_over_draws
from agr_jax.attacks._outcome import Blind
from agr_jax.attacks._predictions import misclassified
from agr_jax.ranges import Range, check_ranges
from agr_jax.threat import L1, ThreatModel, check_threat, expand, gaussian_noise


@dataclasses.dataclass(frozen=True)
class PGD(GradientAttack):
    """Projected gradient ascent on a loss, for a fixed number of steps; returns the last iterate.

    With restarts it returns, image by image, the first restart's that is misclassified, or else the
    one of highest loss; if targeted, the first that is classified as asked, or the one of lowest.
    Where the network's gradient is NaN, so is the image, unless a restart fools the network: a
    failure is not taken for robustness.

    Called as `attack(logits_fn, images, labels, key)`; the iterations are one `lax.fori_loop` under
    `jit`. Any callable is attacked as what it computes now, and another one that computes the same
    with other weights compiles nothing.

    Attributes:
        threat: ball to stay in, such as `Linf(8 / 255)`.
        steps: number of gradient steps, at least 1.
        step_size: length of one step in the threat's norm; by default `2.5 * epsilon / steps`.
        random_start: start at a random point of the ball.
        loss: `loss(logits, targets) -> [batch]`, to be raised. For the cross-entropy its log odds
            are raised, which rise with it and do not saturate (`losses.log_odds`).
        targets: what the loss gets beside the logits: the `labels`, or the `clean_logits`, as when
            TRADES raises the divergence from the clean prediction.
        start_noise: without `random_start`, standard deviation of the Gaussian noise that is added
            to the image, whose own gradient may be zero; 0 starts at the image itself.
        box_every_step: clip to [0, 1] after every step. The published AGR code clips only the start
            and the result (`False`), so that its gradients are taken outside the box too.
        restarts: number of starts.
        momentum: share of the sum of earlier gradients, each over its L1 norm, that a step keeps;
            0 steps along the last gradient alone.
        targeted: the labels are the classes to reach, not to leave: the loss is lowered, and a
            restart succeeds where the prediction is the label.
        draws: 0 for a network `logits_fn(images)`. Otherwise it is randomised,
            `logits_fn(images, key)`, and the gradient is the mean of this many draws, the same for
            all images of the batch ("expectation over transformation"), so that the result depends
            on the batch; one more draw says whether a restart succeeded.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks",
    ICLR 2018; for `draws` Athalye et al., "Synthesizing Robust Adversarial Examples", ICML 2018.
    https://arxiv.org/abs/1706.06083, https://arxiv.org/abs/1707.07397

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from agr_jax.attacks import pgd
        >>> from agr_jax.threat import Linf
        >>> images, labels = jnp.full([1, 1, 1, 2], 0.5), jnp.array([0])
        >>> attack = pgd(Linf(0.1), steps=10)
        >>> attack(lambda x: x.reshape(-1, 2), images, labels, jax.random.key(0)).round(3).tolist()
        [[[[0.4000000059604645, 0.6000000238418579]]]]
    """

    threat: ThreatModel
    steps: int = 10
    step_size: float | None = None
    random_start: bool = True
    loss: LossFn = losses.cross_entropy
    targets: Literal["labels", "clean_logits"] = "labels"
    start_noise: float = 0.0
    box_every_step: bool = True
    restarts: int = 1
    momentum: float = 0.0
    targeted: bool = False
    draws: int = 0

    def __post_init__(self) -> None:
        check_threat("PGD.threat", self.threat)
        check_ranges(self, steps=Range(1), restarts=Range(1), draws=Range(0))
        check_ranges(self, momentum=Range(0), start_noise=Range(0))
        if self.step_size is not None:
            check_ranges(self, step_size=Range(0, above=True))
        if self.restarts > 1 and not (self.random_start or self.start_noise):
            raise ValueError(
                f"PGD.restarts is {self.restarts}, but without random_start or start_noise every "
                "restart is the same"
            )
        if self.targets not in ("labels", "clean_logits"):
            raise ValueError(
                f"PGD.targets must be 'labels' or 'clean_logits', got {self.targets!r}"
            )
        if self.targeted and self.targets != "labels":
            raise ValueError(
                f"PGD.targeted needs targets='labels', the classes to reach, got {self.targets!r}"
            )
        if self.random_start and self.start_noise:
            raise ValueError(
                "PGD.start_noise needs random_start=False: an attack starts at a random point of "
                f"the ball or near the image, got both (start_noise {self.start_noise})"
            )

    def look(
        self, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Blind]:
        """What a call returns, and at which images the attack was blind."""
        return _run(_run_pgd, self, logits_fn, images, labels, key=key)

    def from_start(
        self, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, start: jax.Array
    ) -> jax.Array:
        """The same, from given points `start` instead of a random one; without `draws`."""
        if self.draws:
            raise ValueError(f"PGD.from_start takes no key and so no draws, got {self.draws}")
        adversarial, blind = _run(_ascend, self, logits_fn, images, labels, as_array(start))
        warn_of_blind(self, blind)
        return adversarial


def _run(
    function: Callable[..., Any],
    attack: PGD,
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    *start: jax.Array,
    **key: Any,
) -> tuple[jax.Array, Blind]:
    if attack.step_size is None:
        attack = dataclasses.replace(attack, step_size=2.5 * attack.threat.epsilon / attack.steps)
    takes = ("labels" if attack.targets == "labels" else "logits",)
    result: tuple[jax.Array, Blind] = run(
        function, attack, logits_fn, images, labels, *start, loss_takes=takes, **key
    )
    return result


def too_short(attack: PGD) -> str | None:
    """A message where all steps together are shorter than the ball's radius."""
    steps, radius = attack.steps, attack.threat.epsilon
    if attack.step_size is None or steps * attack.step_size >= 0.999 * radius:
        return None
    return (
        f"{steps} steps of {attack.step_size:.4g} go {steps * attack.step_size:.4g} from where "
        f"they start, in a ball of radius {radius:.4g}: a weak attack; steps of 2.5 times the "
        f"radius over their number, {2.5 * radius / steps:.4g}, are usual"
    )


@dataclasses.dataclass(frozen=True)
class FGSM(GradientAttack):
    """One step of the full radius from the image itself.

    Attributes:
        threat: ball to stay in.
        loss: `loss(logits, labels) -> [batch]`, to be raised.

    Source: Goodfellow et al., "Explaining and Harnessing Adversarial Examples", ICLR 2015.
    https://arxiv.org/abs/1412.6572
    """

    threat: ThreatModel
    loss: LossFn = losses.cross_entropy

    def __post_init__(self) -> None:
        check_threat("FGSM.threat", self.threat)

    def look(
        self, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Blind]:
        """What a call returns, and at which images the attack was blind."""
        epsilon = self.threat.epsilon
        if not isinstance(epsilon, jax.core.Tracer) and epsilon == 0:
            images, labels = as_array(images), as_array(labels)
            check_inputs(images, labels)
            return images, Blind.nowhere(labels)
        step = PGD(self.threat, 1, epsilon, random_start=False, loss=self.loss)
        return step.look(logits_fn, images, labels, key)


def ifgsm(threat: ThreatModel, steps: int = 10) -> PGD:
    """Iterative FGSM: `steps` steps of `epsilon / steps` from the image itself.

    Source: Kurakin et al., "Adversarial examples in the physical world", ICLR workshop 2017.
    https://arxiv.org/abs/1607.02533
    """
    return mim(threat, steps, momentum=0.0)


def mim(
    threat: ThreatModel, steps: int = 10, step_size: float | None = None, momentum: float = 1.0
) -> PGD:
    """Momentum iterative method: from the image, by default `steps` steps of `epsilon / steps`.

    Source: Dong et al., "Boosting Adversarial Attacks with Momentum", CVPR 2018, algorithm 1.
    https://arxiv.org/abs/1710.06081
    """
    check_threat("PGD.threat", threat)
    if step_size is None and steps >= 1:
        step_size = threat.epsilon / steps
        if not isinstance(step_size, jax.core.Tracer):
            step_size = step_size or None
    return PGD(threat, steps=steps, step_size=step_size, random_start=False, momentum=momentum)


def cw_inf(threat: ThreatModel, steps: int = 20, step_size: float | None = None) -> PGD:
    """PGD on the margin: the "CW-inf" of adversarial training papers, without their kappa.

    Source: the loss is that of Carlini and Wagner, "Towards Evaluating the Robustness of Neural
    Networks", IEEE S&P 2017.
    https://arxiv.org/abs/1608.04644
    """
    return PGD(threat, steps=steps, step_size=step_size, loss=losses.margin)


def _run_pgd(
    attack: PGD, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, keys: jax.Array
) -> tuple[jax.Array, Blind]:
    if attack.restarts == 1:
        return _from_random_start(attack, logits_fn, images, labels, keys)
    targets = labels
    if attack.targets == "clean_logits":
        targets = _logits(attack, logits_fn, images, _network_key(attack, keys))

    def restart(
        index: jax.Array, best: tuple[jax.Array, jax.Array, jax.Array, Blind]
    ) -> tuple[jax.Array, jax.Array, jax.Array, Blind]:
        points, fooled, loss, blind = best
        own = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
        new_points, also = _from_random_start(attack, logits_fn, images, labels, own)
        logits = _logits(attack, logits_fn, new_points, _network_key(attack, own))
        wrong = _succeeded(attack, logits, labels)
        new_loss = _objective(attack, logits, targets).astype(images.dtype)
        better = ~fooled & (wrong | (new_loss > loss) | jnp.isnan(new_loss))
        return (
            jnp.where(expand(better, images), new_points, points),
            fooled | wrong,
            jnp.where(better, new_loss, loss),
            blind.both(also),
        )

    none = differing(jnp.zeros_like(labels, bool), labels)
    loss = differing(jnp.full_like(labels, -jnp.inf, images.dtype), labels)
    start = images, none, loss, Blind(~none, none)
    points, _, _, blind = jax.lax.fori_loop(0, attack.restarts, restart, start)
    return points, blind


def _logits(
    attack: PGD, logits_fn: LogitsFn, images: jax.Array, key: jax.Array | None
) -> jax.Array:
    """Of a randomised network those of one draw, which is none of the steps'."""
    if key is None:
        return logits_fn(images)
    return logits_fn(images, jax.random.fold_in(key, attack.steps))


def _network_key(attack: PGD, keys: jax.Array) -> jax.Array | None:
    """The key that a randomised network's draws come from."""
    return keys[0] if attack.draws else None


def _objective(attack: PGD, logits: jax.Array, targets: jax.Array) -> jax.Array:
    """What the attack climbs, `[batch]`."""
    height = climbed(attack.loss)(logits, targets)
    return -height if attack.targeted else height


def _succeeded(attack: PGD, logits: jax.Array, labels: jax.Array) -> jax.Array:
    if attack.targeted:
        return (jnp.argmax(logits, axis=1) == labels) & ~jnp.isnan(logits).any(axis=1)
    return misclassified(logits, labels)


def _from_random_start(
    attack: PGD, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, keys: jax.Array
) -> tuple[jax.Array, Blind]:
    start = images
    if attack.random_start:
        start = attack.threat.random_start(keys, images)
    elif attack.start_noise:
        start = images + attack.start_noise * gaussian_noise(keys, images)
    network_key = _network_key(attack, keys)
    return _ascend(attack, logits_fn, images, labels, start, network_key)


def _ascend(
    attack: PGD,
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    start: jax.Array,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Blind]:
    threat, step_size = attack.threat, attack.step_size
    assert step_size is not None  # see `_run`
    targets = labels
    if attack.targets == "clean_logits":
        targets = _logits(attack, logits_fn, images, key)

    def of_draw(candidates: jax.Array, *draw: jax.Array) -> tuple[jax.Array, None, jax.Array]:
        def total(candidates: jax.Array) -> tuple[jax.Array, jax.Array]:
            height = _objective(attack, logits_fn(candidates, *draw), targets)
            return height.sum(), height

        gradient, height = jax.grad(total, has_aux=True)(candidates)
        return -height if attack.targeted else height, None, gradient

    def gradient(candidates: jax.Array, index: jax.Array) -> jax.Array:
        if key is None:
            return of_draw(candidates)[2]
        keys = jax.random.split(jax.random.fold_in(key, index), attack.draws)
        of_log_odds = climbed(attack.loss) is losses.log_odds
        return mean_over_draws(
            functools.partial(of_draw, candidates), keys, of_log_odds=of_log_odds
        )[1]

    def step(
        index: jax.Array, carry: tuple[jax.Array, jax.Array | None, Blind]
    ) -> tuple[jax.Array, jax.Array | None, Blind]:
        candidates, total, blind = carry
        direction = gradient(candidates, index)
        blind = blind.or_first(index, direction)
        if total is not None:
            unit = L1(1.0, sparsity=None).ascent(direction)
            total = direction = attack.momentum * total + unit
        moved = candidates + step_size * threat.ascent(direction)
        return threat.project(moved, images, box=attack.box_every_step), total, blind

    total = differing(jnp.zeros_like(start), start) if attack.momentum else None
    none = differing(jnp.zeros_like(labels, bool), labels)
    carry = differing(start, images), total, Blind(none, none)
    adversarial, _, blind = jax.lax.fori_loop(0, attack.steps, step, carry)
    return jax.lax.stop_gradient(jnp.clip(adversarial, 0, 1)), blind
