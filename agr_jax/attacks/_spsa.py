"""SPSA: gradient descent on an estimate of the gradient from logits alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from agr_jax import losses
from agr_jax.attacks._attack import GradientAttack, LogitsFn, LossFn, differing
from agr_jax.attacks._calling import run
from agr_jax.attacks._objective import climbed
from agr_jax.attacks._outcome import Blind
from agr_jax.ranges import Range, check_ranges
from agr_jax.threat import ThreatModel, check_threat


@dataclasses.dataclass(frozen=True)
class SPSA(GradientAttack):
    """Simultaneous perturbation stochastic approximation, with Adam; returns the last iterate.

    Called as `attack(logits_fn, images, labels, key)`, under `jit` or not. The gradient at a point
    is estimated as the mean over random directions v of +-1 of
    `(loss(x + delta v) - loss(x - delta v)) / (2 delta) * v`. The directions are drawn for each
    image apart.

    Attributes:
        threat: ball to stay in.
        steps: of Adam.
        samples: queries for each estimate, two for each direction; even.
        delta: length of a query along each pixel.
        learning_rate: of Adam.
        loss: `loss(logits, labels) -> [batch]`, to be raised.
        directions_at_once: how many directions of the whole batch are evaluated together; bounds
            the memory, and does not change the result but for the order of a sum.

    Source: Uesato et al., "Adversarial Risk and the Dangers of Evaluating Against Weak Attacks",
    ICML 2018. AGR's paper gives no parameters; these defaults are ours.
    https://arxiv.org/abs/1802.05666

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from agr_jax.attacks import spsa
        >>> from agr_jax.threat import Linf
        >>> images, labels = jnp.full([1, 1, 1, 2], 0.5), jnp.array([0])
        >>> attack = spsa(Linf(0.1), steps=20, samples=8)
        >>> attack(lambda x: x.reshape(-1, 2), images, labels, jax.random.key(0)).round(3).tolist()
        [[[[0.4000000059604645, 0.6000000238418579]]]]
    """

    threat: ThreatModel
    steps: int = 100
    samples: int = 256
    delta: float = 0.01
    learning_rate: float = 0.01
    loss: LossFn = losses.margin
    directions_at_once: int = 16

    def __post_init__(self) -> None:
        check_threat("SPSA.threat", self.threat)
        above = Range(0, above=True)
        check_ranges(self, steps=Range(1), directions_at_once=Range(1))
        check_ranges(self, delta=above, learning_rate=above)
        if self.samples < 2 or self.samples % 2:
            raise ValueError(
                f"SPSA.samples must be even and at least 2 (two for each direction), "
                f"got {self.samples}"
            )

    def look(
        self, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Blind]:
        """What a call returns, and at which images the attack was blind."""
        result: tuple[jax.Array, Blind] = run(
            _run, self, logits_fn, images, labels, key=key, gradient=False
        )
        return result


def _run(
    attack: SPSA, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, keys: jax.Array
) -> tuple[jax.Array, Blind]:
    adam = optax.adam(attack.learning_rate)
    directions = attack.samples // 2
    at_once = min(attack.directions_at_once, directions)
    # The last group is filled up with directions of weight 0.
    groups = jnp.arange(-(-directions // at_once) * at_once).reshape(-1, at_once)

    def step(index: jax.Array, carry: tuple[jax.Array, Any, Blind]) -> tuple[jax.Array, Any, Blind]:
        points, state, blind = carry
        step_keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)

        def along(direction: jax.Array) -> jax.Array:
            """This direction's share of the sum."""
            signs = jax.vmap(
                lambda key: jax.random.rademacher(
                    jax.random.fold_in(key, direction), images.shape[1:], images.dtype
                )
            )(step_keys)
            difference = loss(points + attack.delta * signs) - loss(points - attack.delta * signs)
            weight = jnp.where(direction < directions, difference / (2 * attack.delta), 0)
            weight = weight.astype(images.dtype)
            return weight.reshape(-1, *(1 for _ in images.shape[1:])) * signs

        def loss(queries: jax.Array) -> jax.Array:
            return climbed(attack.loss)(logits_fn(queries), labels)

        def add(total: jax.Array, group: jax.Array) -> tuple[jax.Array, None]:
            return total + jax.vmap(along)(group).sum(0), None

        total, _ = lax.scan(add, differing(jnp.zeros_like(images), images), groups)
        blind = blind.or_first(index, total)
        updates, state = adam.update(-total / directions, state)
        return attack.threat.project(points + updates, images), state, blind

    none = differing(jnp.zeros_like(labels, bool), labels)
    moments = jax.tree.map(
        lambda leaf: differing(leaf, images) if leaf.shape == images.shape else leaf,
        adam.init(images),
    )
    points, _, blind = lax.fori_loop(0, attack.steps, step, (images, moments, Blind(none, none)))
    return lax.stop_gradient(points), blind
