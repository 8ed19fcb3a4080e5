"""How APGD moves and corrects its step: with momentum under L-infinity and L2, sparsely under L1.

A rule is static; what it remembers of each image is a state of its own.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from agr_jax.attacks.attack import differing
from agr_jax.selection import kth_smallest
from agr_jax.threat import L1, L2, Linf, expand, flatten


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
        share = jnp.where(step > 0, 0.75, 1.0).astype(points.dtype)
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
            sparsity = support / pixels / 1.5
        else:
            support, sparsity = jnp.full_like(loss, pixels), jnp.full_like(loss, 0.2)
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
        due = (step + 1) % max(int(0.04 * self.steps), 1) == 0
        support = _support(found.best_points, images)
        sparser = support < 0.95 * state.support
        shorter = jnp.clip(state.step_size / 1.5, epsilon / 10, epsilon)
        checked = _SparseState(
            step_size=jnp.where(sparser, epsilon, shorter),
            sparsity=support / flatten(images).shape[1] / 1.5,
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
    window = max(int(0.22 * steps), 1)
    end = window
    while end <= steps:
        windows[end - 1] = window
        window = max(window - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
        end += window
    return windows
