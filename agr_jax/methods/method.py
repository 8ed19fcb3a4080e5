"""What a training method gives the trainer: adversarial images, and two losses."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import jax

from agr_jax import losses
from agr_jax.attacks import LogitsFn
from agr_jax.config import Config
from agr_jax.methods._training_attack import training_attack

PyTree = Any
Forward = Callable[[PyTree, PyTree, jax.Array], tuple[jax.Array, PyTree]]
"""`forward(params, batch_stats, images) -> (logits, batch_stats)`, in training mode."""


class Batch(NamedTuple):
    """One batch of a training step.

    Attributes:
        images: `[batch, height, width, channels]`, augmented, in [0, 1].
        adversarial: the same shape, from the method's attack.
        labels: `[batch]` integers.
        key: of this step, for what a loss draws itself.
    """

    images: jax.Array
    adversarial: jax.Array
    labels: jax.Array
    key: jax.Array | None = None


class LossOutcome(NamedTuple):
    """What a loss found on the way.

    Attributes:
        logits: `[batch, classes]` of the pass whose accuracy is reported.
        batch_stats: running statistics after the passes that are to count in them.
        terms: named parts of the loss, scalars, reported as metrics.
    """

    logits: jax.Array
    batch_stats: PyTree
    terms: dict[str, jax.Array] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """A training method: a frozen object, without state.

    The trainer takes the gradients of `clean_loss` and `adversarial_loss` with respect to the
    parameters, and AGR combines them, whichever method it is. A method of your own is a subclass
    with the two abstract methods; `examples/` has one.

    Attributes:
        label_smoothing: share of every cross-entropy's target spread evenly over all classes.
    """

    label_smoothing: float = 0.0

    title: ClassVar[str] = ""
    """What tables call it; empty for a method of your own, which is called as in the config."""

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """The method with a config's values.

        A field of the method is filled from the field of that name in the config's own group of
        settings, `config.<method>`, from `config.label_smoothing`, `published_statistics` from
        `config.batch_stats`, and `attack` from `config.attack`; others keep their defaults.

        Raises:
            ConfigError: if the attack's fields contradict each other.
        """
        group = getattr(config, config.method, None)
        values = {
            "label_smoothing": config.label_smoothing,
            "published_statistics": config.batch_stats == "published",
            "attack": training_attack(config.attack),
            **({} if group is None else vars(group)),
        }
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})

    @abc.abstractmethod
    def adversarial_images(
        self, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> jax.Array:
        """The inner attack; `logits_fn` is the network in evaluation mode."""

    @abc.abstractmethod
    def adversarial_loss(
        self, forward: Forward, params: PyTree, batch_stats: PyTree, batch: Batch
    ) -> tuple[jax.Array, LossOutcome]:
        """The method's own loss, whose gradient is g_a, a mean over the batch."""

    def clean_loss(
        self, forward: Forward, params: PyTree, batch_stats: PyTree, batch: Batch
    ) -> tuple[jax.Array, LossOutcome]:
        """The loss whose gradient is g_c, a mean over the batch: cross-entropy at the images."""
        return self.mean_cross_entropy(forward, params, batch_stats, batch.images, batch.labels)

    def gradient_points(
        self, forward: Forward, params: PyTree, batch_stats: PyTree, batch: Batch
    ) -> tuple[PyTree, PyTree]:
        """The parameters at which the clean and the adversarial gradient are taken."""
        return params, params

    @property
    def is_adversarial(self) -> bool:
        """Whether it trains against an attack.

        If not, its best checkpoint is the one that is best on clean images.
        """
        return True

    def mean_cross_entropy(
        self,
        forward: Forward,
        params: PyTree,
        batch_stats: PyTree,
        images: jax.Array,
        labels: jax.Array,
    ) -> tuple[jax.Array, LossOutcome]:
        """Mean cross-entropy of one training-mode pass."""
        logits, batch_stats = forward(params, batch_stats, images)
        loss = losses.cross_entropy(logits, labels, label_smoothing=self.label_smoothing).mean()
        return loss, LossOutcome(logits, batch_stats)
