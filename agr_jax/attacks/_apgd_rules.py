"""How APGD moves and corrects its step: with momentum under L-infinity and L2, sparsely under L1.

A rule is static; what it remembers of each image is a state of its own.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from agr_jax.attacks._attack import differing
from agr_jax.order_statistics import kth_smallest
from agr_jax.threat import L1, L2, Linf, expand, flatten

# Values of the published code of APGD (https://arxiv.org/abs/2003.01690) and of its L1 variant
# (https://arxiv.org/abs/2103.01208).
_MOMENTUM_SHARE = 0.75
"""Share of the gradient step in a step; the rest repeats the last step."""
_FIRST_WINDOW = 0.22
"""Share of all steps before the first checkpoint."""
_WINDOW_DECREMENT = 0.03
"""What each window is shorter than the one before, as a share of all steps."""
_LEAST_WINDOW = 0.06
"""Share of all steps between checkpoints at the least."""
_SPARSE_WINDOW = 0.04
"""Under L1, share of all steps between two checkpoints."""
_FIRST_SPARSITY = 0.2
"""Under L1, share of the pixels that a step moves until the first checkpoint."""
_SPARSITY_DIVISOR = 1.5
"""Under L1, a step moves so many times fewer pixels than the best point has changed."""
_SPARSER = 0.95
"""Under L1, a best point counts as sparser if it has changed less than this share of the pixels
that the last one had: the step size then begins again at the radius."""
_SHRINK = 1.5
"""Under L1, the divisor of the step size where the best point is not sparser."""
_LEAST_STEP = 10
"""Under L1, the step size does not fall below the radius over this."""


class Found(NamedTuple):
    """What a run has found so far.

    Attributes:
        points: `[batch, ...]`, misclassified where `fooled`.
        fooled: booleans `[batch]`.
        best_points: `[batch, ...]`, of highest loss.
        best_loss: `[batch]`, theirs.
        best_gradient: `[batch, ...]`, theirs.
    """

    points: jax.Array
    fooled: jax.Array
    best_points: jax.Array
    best_loss: jax.Array
    best_gradient: jax.Array


class _MomentumState(NamedTuple):
    previous: jax.Array  # the point before the last step
    step_size: jax.Array
    last_loss: jax.Array
    increases: jax.Array  # of the loss since the last checkpoint
    checked_loss: jax.Array  # best loss at the last checkpoint
    halved: jax.Array  # at the last checkpoint


class Rule(Protocol):
    """How an attack moves, and how it corrects itself."""

    @property
    def threat(self) -> Linf | L2 | L1:
        """The ball."""
        ...

    def begin(
        self, images: jax.Array, start: jax.Array, loss: jax.Array, last_loss: jax.Array
    ) -> Any:
        """The rule's own state at the start; the first step's loss is compared with `last_loss`."""
        ...

    def move(
        self, state: Any, images: jax.Array, points: jax.Array, gradient: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Any]:
        """The next points."""
        ...

    def check(
        self, state: Any, images: jax.Array, found: Found, loss: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Which images go back to their best point, and the state with new step sizes."""
        ...

    def used(self, state: Any) -> tuple[jax.Array, jax.Array]:
        """Step size and sparsity, for a `Trajectory`."""
        ...


class Momentum(NamedTuple):
    """L-infinity and L2: steepest steps with momentum, and a step size halved at checkpoints.

    At a checkpoint an image's step is halved, and it goes back to its best point, if too few steps
    since the last one raised its loss, or if its best loss and its step size are what they were.
    """

    threat: Linf | L2
    steps: int
    rho: float

    def begin(
        self, images: jax.Array, start: jax.Array, loss: jax.Array, last_loss: jax.Array
    ) -> _MomentumState:
        """The state at the start."""
        return _MomentumState(
            previous=start,
            # As long as the ball is wide: the step size only falls from here.
            step_size=differing(jnp.full_like(loss, 2 * self.threat.epsilon), loss),
            last_loss=last_loss,
            increases=differing(jnp.zeros_like(loss), loss),
            checked_loss=loss,
            halved=differing(jnp.ones_like(loss, bool), loss),
        )

    def move(
        self,
        state: _MomentumState,
        images: jax.Array,
        points: jax.Array,
        gradient: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, _MomentumState]:
        """The next points."""
        # The first step has none before it to repeat.
        share = jnp.where(step > 0, _MOMENTUM_SHARE, 1.0).astype(points.dtype)
        ahead = points + expand(state.step_size, points) * self.threat.ascent(gradient)
        ahead = self.threat.project(ahead, images)
        mixed = points + share * (ahead - points) + (1 - share) * (points - state.previous)
        return self.threat.project(mixed, images), state._replace(previous=points)

    def check(
        self,
        state: _MomentumState,
        images: jax.Array,
        found: Found,
        loss: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, _MomentumState]:
        """What happens at a checkpoint."""
        increases = state.increases + (loss > state.last_loss)
        windows = _checkpoint_windows(self.steps)
        window = jnp.asarray(windows, loss.dtype)[step]
        due = window > 0
        # The loss rose too seldom, or it stands still although the step was not halved last time.
        too_few = increases <= window * self.rho
        stuck = ~state.halved & (state.checked_loss >= found.best_loss)
        halve = due & (too_few | stuck)
        return halve, state._replace(
            step_size=jnp.where(halve, state.step_size / 2, state.step_size),
            last_loss=loss,
            increases=jnp.where(due, 0, increases),
            checked_loss=jnp.where(due, found.best_loss, state.checked_loss),
            halved=jnp.where(due, halve, state.halved),
        )

    def used(self, state: _MomentumState) -> tuple[jax.Array, jax.Array]:
        """Step size and sparsity."""
        return state.step_size, jnp.ones_like(state.step_size)


class _SparseState(NamedTuple):
    step_size: jax.Array
    sparsity: jax.Array  # share of the pixels that a step moves
    support: jax.Array  # pixels that the best point changed, at the last checkpoint


class Sparse(NamedTuple):
    """L1: steps along the sign of the largest gradient entries, as many as the best point needs."""

    threat: L1
    steps: int
    warm: bool

    def begin(
        self, images: jax.Array, start: jax.Array, loss: jax.Array, last_loss: jax.Array
    ) -> _SparseState:
        """The state at the start."""
        pixels = flatten(images).shape[1]
        if self.warm:
            support = _support(start, images)
            sparsity = support / pixels / _SPARSITY_DIVISOR
        else:
            support, sparsity = jnp.full_like(loss, pixels), jnp.full_like(loss, _FIRST_SPARSITY)
        state = _SparseState(jnp.full_like(loss, self.threat.epsilon), sparsity, support)
        return jax.tree.map(lambda part: differing(part, loss), state)

    def move(
        self,
        state: _SparseState,
        images: jax.Array,
        points: jax.Array,
        gradient: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, _SparseState]:
        """The next points."""
        size = jnp.abs(flatten(gradient))
        pixels = size.shape[1]
        rank = jnp.clip((1 - state.sparsity) * pixels, 0, pixels - 1).astype(jnp.int32)
        large = size >= kth_smallest(size, rank)[:, None]
        direction = jnp.where(large, jnp.sign(flatten(gradient)), 0)
        # The direction has entries of -1, 0 and 1: divided by its length in L1 it has length 1.
        length = state.step_size / (jnp.abs(direction).sum(1) + 1e-10)
        moved = points + (length[:, None] * direction).reshape(points.shape)
        return self.threat.project(moved, images), state

    def check(
        self,
        state: _SparseState,
        images: jax.Array,
        found: Found,
        loss: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, _SparseState]:
        """What happens at a checkpoint."""
        epsilon = self.threat.epsilon
        due = (step + 1) % max(int(_SPARSE_WINDOW * self.steps), 1) == 0
        support = _support(found.best_points, images)
        sparser = support < _SPARSER * state.support
        shorter = jnp.clip(state.step_size / _SHRINK, epsilon / _LEAST_STEP, epsilon)
        checked = _SparseState(
            step_size=jnp.where(sparser, epsilon, shorter),
            sparsity=support / flatten(images).shape[1] / _SPARSITY_DIVISOR,
            support=support,
        )
        return due & sparser, jax.tree.map(functools.partial(jnp.where, due), checked, state)

    def used(self, state: _SparseState) -> tuple[jax.Array, jax.Array]:
        """Step size and sparsity."""
        return state.step_size, state.sparsity


def _support(points: jax.Array, images: jax.Array) -> jax.Array:
    """Number of pixels that differ, per image, in the dtype of the images."""
    return (flatten(points) != flatten(images)).sum(1).astype(images.dtype)


def _checkpoint_windows(steps: int) -> np.ndarray:
    """For each step 0 if it ends at no checkpoint, else the number of steps since the last one."""
    windows = np.zeros(steps)
    window = max(int(_FIRST_WINDOW * steps), 1)
    end = window
    while end <= steps:
        windows[end - 1] = window
        window = max(window - max(int(_WINDOW_DECREMENT * steps), 1), int(_LEAST_WINDOW * steps), 1)
        end += window
    return windows
