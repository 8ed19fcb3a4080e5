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

from agr_jax import methods, models, sharding
from agr_jax.agr import MEASURED, GradientPair
from agr_jax.config import imported
from agr_jax.data import Augmentation, to_unit_range
from agr_jax.data.batches import steps_per_epoch
from agr_jax.methods import Batch, LossOutcome, Method
from agr_jax.models import Classifier
from agr_jax.runs import Run
from agr_jax.training import optimizers

PyTree = Any


@flax.struct.dataclass
class TrainState:
    """What a step changes.

    Attributes:
        step: int32 scalar, the number of steps taken.
        params: parameters of the network.
        batch_stats: BatchNorm's running statistics; empty for a network without any.
        opt_state: state of the optax chain.
        average: moving average of `variables`, or `None` where none is kept.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: optax.OptState
    average: PyTree = None

    @property
    def variables(self) -> dict[str, PyTree]:
        """What the network's `apply` takes."""
        statistics = {"batch_stats": self.batch_stats} if self.batch_stats else {}
        return {"params": self.params, **statistics}


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
        batch_stats: `adversarial`, or any other value for clean, then adversarial.
        mesh: devices that share each batch.
        average_decay: share of the moving average that one step keeps; 0 for no average.
    """

    model: nn.Module
    method: Method
    optimizer: optax.GradientTransformationExtraArgs
    augmentation: Augmentation
    batch_size: int
    steps_per_epoch: int
    batch_stats: str
    mesh: Mesh
    average_decay: float = 0.0

    @classmethod
    def from_run(cls, run: Run) -> Trainer:
        """The pure part of a run.

        Raises:
            ConfigError: on fields that do not fit each other or the devices.
        """
        config, data = run.config, run.config.data
        sharding.check_divisible(
            config.batch_size, run.mesh, "config.batch_size", parts=config.accumulate
        )
        examples = len(run.dataset.train.labels)
        per_epoch = steps_per_epoch(examples, config.batch_size, data.last_batch)
        model = run.model(jnp.bfloat16 if config.precision.train == "bfloat16" else jnp.float32)
        if imported.is_imported(config.model.name):
            models.check_trainable(model, run.dataset.num_classes, run.dataset.image_shape)
        return cls(
            model=model,
            method=methods.from_config(config),
            optimizer=optimizers.from_config(config, per_epoch),
            augmentation=Augmentation(
                crop_padding=data.crop_padding,
                flip=data.flip,
                cutout=data.cutout,
                cutout_size=data.cutout_size,
            ),
            batch_size=config.batch_size,
            steps_per_epoch=per_epoch,
            batch_stats=config.batch_stats,
            mesh=run.mesh,
            average_decay=config.averaging.decay,
        )

    def init(self, key: jax.Array, image_shape: tuple[int, ...]) -> TrainState:
        """A fresh state, on all devices."""

        def create(key: jax.Array) -> TrainState:
            variables = dict(self.model.init(key, jnp.zeros([1, *image_shape])))
            return TrainState(
                step=jnp.zeros([], jnp.int32),
                params=variables["params"],
                batch_stats=variables.get("batch_stats", {}),
                opt_state=self.optimizer.init(variables["params"]),
                # A copy: a state that is donated to a step may not share buffers.
                average=jax.tree.map(jnp.copy, variables) if self.average_decay else None,
            )

        return jax.jit(create, out_shardings=sharding.replicated(self.mesh))(key)

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
            permutation: rows of `images` in the order of this epoch, int32.
            key: of the run; every step folds its number in.
            clean_gradient: take the clean gradient too. Static.
            batch_size: of this step; only an epoch's last batch may be shorter. Static.

        Returns:
            The next state, and metrics of this step: scalars, and with the clean gradient also
            `leaf_...`, vectors over the leaves in the order of `agr_jax.leaf_names`.
        """
        start = (state.step % self.steps_per_epoch) * self.batch_size
        rows = jax.lax.dynamic_slice_in_dim(permutation, start, batch_size)
        return self.step_on_batch(
            state, images[rows], labels[rows], key, clean_gradient=clean_gradient
        )

    def step_on_batch(
        self,
        state: TrainState,
        images: jax.Array,
        labels: jax.Array,
        key: jax.Array,
        *,
        clean_gradient: bool,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """The same step on a batch that was chosen elsewhere: images and labels of this step."""
        batch = self.inputs(state, images, labels, key)
        return self.update(state, batch, clean_gradient=clean_gradient)

    def inputs(
        self, state: TrainState, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> Batch:
        """What the losses are taken on: the images augmented, and attacked.

        An image's draws depend on its place in the batch, not on the batch's size.
        """
        step_key = jax.random.fold_in(key, state.step)
        augment_key, attack_key, loss_key = jax.random.split(step_key, 3)
        chosen = jax.lax.with_sharding_constraint(
            (images, labels), sharding.batch_sharding(self.mesh)
        )
        clean = to_unit_range(self.augmentation(augment_key, chosen[0]))
        classifier = Classifier(self.model, state.variables)
        adversarial = self.method.adversarial_images(classifier, clean, chosen[1], attack_key)
        return Batch(clean, adversarial, chosen[1], loss_key)

    def update(
        self, state: TrainState, batch: Batch, *, clean_gradient: bool
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """The part of a step after the attack: gradients, AGR, SGD, the moving average."""
        pair, points, batch_stats, metrics = self.gradients(
            state, batch, clean_gradient=clean_gradient
        )
        updates, opt_state = self.optimizer.update(
            pair.adversarial, state.opt_state, points.adversarial, clean_grads=pair.clean
        )
        if clean_gradient:
            leaves = {name: optax.tree.get(opt_state, name) for name in MEASURED}
            metrics |= {name: values.mean() for name, values in leaves.items()}
            metrics["conflicting"] = (leaves["cosine"] < 0).mean()
            metrics |= {f"leaf_{name}": values for name, values in leaves.items()}
        params = optax.apply_updates(state.params, updates)
        next_state = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        next_state = dataclasses.replace(
            next_state, average=self._averaged(state, next_state.variables)
        )
        return next_state, metrics

    def gradients(
        self, state: TrainState, batch: Batch, *, clean_gradient: bool
    ) -> tuple[GradientPair, GradientPair, PyTree, dict[str, jax.Array]]:
        """Takes the gradients at the parameters that the method chooses.

        Each backward pass ends before the next pass begins, so that accelerators keep the
        activations of one at a time (`benchmarks/compiled_memory.py`). XLA's CPU compiler drops the
        barriers and keeps both.

        Returns:
            The gradients (the clean one `None` unless asked for), the parameters at which they were
            taken, the running statistics, and the metrics.
        """
        batch_stats = state.batch_stats
        points = GradientPair(
            *self.method.gradient_points(self.forward, state.params, batch_stats, batch)
        )
        in_turn = self.batch_stats != "adversarial"
        metrics: dict[str, jax.Array] = {}
        clean_grads = None
        if clean_gradient:
            points, batch = jax.lax.optimization_barrier((points, batch))
            value_and_grad = jax.value_and_grad(self.method.clean_loss, 1, has_aux=True)
            (loss, outcome), clean_grads = value_and_grad(
                self.forward, points.clean, batch_stats, batch
            )
        elif in_turn:
            loss, outcome = self.method.clean_loss(self.forward, points.clean, batch_stats, batch)
        if clean_gradient or in_turn:
            metrics |= self._metrics("clean", loss, outcome, batch.labels)
            batch_stats = outcome.batch_stats if in_turn else batch_stats
        if clean_gradient:
            clean_grads, batch, batch_stats = jax.lax.optimization_barrier(
                (clean_grads, batch, batch_stats)
            )
        value_and_grad = jax.value_and_grad(self.method.adversarial_loss, 1, has_aux=True)
        (loss, outcome), adversarial_grads = value_and_grad(
            self.forward, points.adversarial, batch_stats, batch
        )
        metrics |= self._metrics("adversarial", loss, outcome, batch.labels)
        pair = GradientPair(clean_grads, adversarial_grads)
        return pair, points, outcome.batch_stats, metrics

    @staticmethod
    def _metrics(
        kind: str, loss: jax.Array, outcome: LossOutcome, labels: jax.Array
    ) -> dict[str, jax.Array]:
        accuracy = jnp.mean(jnp.argmax(outcome.logits, axis=-1) == labels)
        terms = outcome.terms or {}
        return {f"{kind}_loss": loss, f"{kind}_accuracy": accuracy, **terms}

    def _averaged(self, state: TrainState, variables: PyTree) -> PyTree:
        """The next moving average.

        The statistics are averaged as the parameters are: to first order in the parameters'
        movement these are the statistics of the averaged network, which the current ones are not.
        """
        if not self.average_decay:
            return None
        decay = jnp.minimum(self.average_decay, (1 + state.step) / (10 + state.step))
        return jax.tree.map(
            lambda old, new: old + (1 - decay).astype(old.dtype) * (new - old),
            state.average,
            variables,
        )

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
        return logits, updated.get("batch_stats", {})
