"""One training step: a pure function from state and data to the next state and metrics.

uint8 images on the device -> slice of the epoch's permutation -> augmentation -> attack -> clean
and adversarial loss -> two gradients -> AGR and SGD. Nothing on the host in between.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from agr_jax import mesh
from agr_jax.agr import GradientPair
from agr_jax.data import Augmentation, to_unit_range
from agr_jax.methods import Batch, Method
from agr_jax.models import Classifier

PyTree = Any


@flax.struct.dataclass
class TrainState:
    """What a step changes.

    Attributes:
        step: int32 scalar, the number of steps taken.
        params: parameters of the network.
        batch_stats: BatchNorm's running statistics.
        opt_state: state of the optax chain.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: optax.OptState

    @property
    def variables(self) -> dict[str, PyTree]:
        """What the network's `apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What stays the same from step to step.

    Attributes:
        model: Linen module, `model.apply(variables, images, train=...)`.
        method: supplies the attack and the two losses.
        optimizer: a chain with `agr_transform` first.
        augmentation: applied to the uint8 images.
        batch_size: images per step, over all devices.
        steps_per_epoch: length of an epoch; the last step may have fewer images.
        batch_stats: `clean_then_adversarial` or `adversarial`.
        on: devices that share each batch.
    """

    model: nn.Module
    method: Method
    optimizer: optax.GradientTransformationExtraArgs
    augmentation: Augmentation
    batch_size: int
    steps_per_epoch: int
    batch_stats: str
    on: Mesh

    def init(self, key: jax.Array, image_shape: tuple[int, ...]) -> TrainState:
        """A fresh state, on all devices."""

        def create(key: jax.Array) -> TrainState:
            variables = self.model.init(key, jnp.zeros([1, *image_shape]))
            return TrainState(
                step=jnp.zeros([], jnp.int32),
                params=variables["params"],
                batch_stats=variables["batch_stats"],
                opt_state=self.optimizer.init(variables["params"]),
            )

        return jax.jit(create, out_shardings=mesh.replicated(self.on))(key)

    def step(
        self,
        state: TrainState,
        images: jax.Array,
        labels: jax.Array,
        permutation: jax.Array,
        key: jax.Array,
        *,
        clean_gradient: bool,
        batch_size: int,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step on the batch that `state.step` points to.

        Args:
            state: of the run.
            images: the whole training set, uint8 `[examples, height, width, channels]`.
            labels: int32 `[examples]`.
            permutation: order of the examples in this epoch, int32 `[examples]`.
            key: of the run; every step folds its number in.
            clean_gradient: take the clean gradient too. Static.
            batch_size: of this step; only an epoch's last batch may be shorter. Static.

        Returns:
            The next state, and scalar metrics of this step.
        """
        augment_key, attack_key = jax.random.split(jax.random.fold_in(key, state.step))
        start = (state.step % self.steps_per_epoch) * self.batch_size
        rows = jax.lax.dynamic_slice_in_dim(permutation, start, batch_size)
        chosen = jax.lax.with_sharding_constraint(
            (images[rows], labels[rows]), mesh.batch_sharding(self.on)
        )
        clean = to_unit_range(self.augmentation(augment_key, chosen[0]))
        classifier = Classifier(self.model, state.variables)
        adversarial = self.method.adversarial_images(classifier, clean, chosen[1], attack_key)
        batch = Batch(clean, adversarial, chosen[1])
        return self.update(state, batch, clean_gradient=clean_gradient)

    def update(
        self, state: TrainState, batch: Batch, *, clean_gradient: bool
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """The part of a step after the attack: gradients, AGR, SGD."""
        pair, batch_stats, metrics = self.gradients(state, batch, clean_gradient=clean_gradient)
        updates, opt_state = self.optimizer.update(
            pair.adversarial, state.opt_state, state.params, clean_grads=pair.clean
        )
        if clean_gradient:
            cosine = optax.tree.get(opt_state, "cosine")
            metrics |= {
                "cosine": cosine.mean(),
                "conflicting": (cosine < 0).mean(),
                "projected": optax.tree.get(opt_state, "projected").mean(),
                "clean_norm": optax.tree.get(opt_state, "clean_norm").mean(),
                "adversarial_norm": optax.tree.get(opt_state, "adversarial_norm").mean(),
            }
        next_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        return next_state, metrics

    def gradients(
        self, state: TrainState, batch: Batch, *, clean_gradient: bool
    ) -> tuple[GradientPair, PyTree, dict[str, jax.Array]]:
        """The pair (its clean half `None` unless asked for), the statistics, and the metrics.

        The clean backward pass ends before the adversarial pass begins, so that accelerators keep
        one set of activations at a time (`benchmarks/compiled_memory.py`). XLA's CPU compiler drops
        the barrier and keeps both.
        """
        params, batch_stats = state.params, state.batch_stats
        in_turn = self.batch_stats == "clean_then_adversarial"
        metrics = {}
        clean_grads = None
        if clean_gradient or in_turn:
            if clean_gradient:
                value_and_grad = jax.value_and_grad(self.method.clean_loss, 1, has_aux=True)
                (loss, outcome), clean_grads = value_and_grad(
                    self.forward, params, batch_stats, batch
                )
            else:
                loss, outcome = self.method.clean_loss(self.forward, params, batch_stats, batch)
            metrics["clean_loss"] = loss
            metrics["clean_accuracy"] = _accuracy(outcome.logits, batch.labels)
            if in_turn:
                batch_stats = outcome.batch_stats
            clean_grads, batch, batch_stats = jax.lax.optimization_barrier(
                (clean_grads, batch, batch_stats)
            )
        value_and_grad = jax.value_and_grad(self.method.adversarial_loss, 1, has_aux=True)
        (loss, outcome), adversarial_grads = value_and_grad(
            self.forward, params, batch_stats, batch
        )
        metrics["adversarial_loss"] = loss
        metrics["adversarial_accuracy"] = _accuracy(outcome.logits, batch.labels)
        return GradientPair(clean_grads, adversarial_grads), outcome.batch_stats, metrics

    def forward(
        self, params: PyTree, batch_stats: PyTree, images: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        """Training-mode pass: logits, and the updated running statistics."""
        logits, updated = self.model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        assert isinstance(logits, jax.Array)
        return logits, updated["batch_stats"]


def _accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)
