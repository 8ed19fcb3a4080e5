"""AVmixup: soft-labelled points between an image and a vertex beyond its adversarial example."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from agr_jax import losses
from agr_jax.attacks import PGD
from agr_jax.methods.at import AdversarialTraining
from agr_jax.methods.method import Batch, Forward, LossOutcome


@dataclasses.dataclass(frozen=True)
class AVmixup(AdversarialTraining):
    """Adversarial loss: cross-entropy at a random point between x and the adversarial vertex.

    The vertex is `x_v = clip(x + gamma (x' - x), 0, 1)`. With u uniform in [0, 1], one per example,
    the image is `u x + (1 - u) x_v`, and the target `u` times the labels smoothed to `clean_label`
    plus `1 - u` times those smoothed to `vertex_label`.

    Attributes:
        attack: raises the cross-entropy.
        gamma: length of the vertex in units of the perturbation.
        clean_label: weight of the true class at the image, lambda_1.
        vertex_label: weight of the true class at the vertex, lambda_2.
        hard_labels: ignore both weights and use the labels as they are, as AGR's published code
            does in effect.
        published_statistics: let the adversarial images count in the running statistics too,
            before the mixed ones, as AGR's published code does; otherwise the mixed ones alone.

    Source: Lee et al., "Adversarial Vertex Mixup: Toward Better Adversarially Robust
    Generalization", CVPR 2020, section 4.
    https://arxiv.org/abs/2003.02484
    """

    title: ClassVar[str] = "AVmixup"
    attack: PGD
    gamma: float = 2.0
    clean_label: float = 1.0
    vertex_label: float = 0.1
    hard_labels: bool = False
    published_statistics: bool = False

    def adversarial_loss(
        self, forward: Forward, params: Any, batch_stats: Any, batch: Batch
    ) -> tuple[jax.Array, LossOutcome]:
        """Mean cross-entropy at the mixed points.

        Soft targets have an entropy, below which it cannot fall; what is above that is reported as
        `avmixup_kl`.
        """
        images = self.mixed_images(batch)
        if self.published_statistics:
            _, batch_stats = forward(params, batch_stats, batch.adversarial)
        logits, batch_stats = forward(params, batch_stats, images)
        if self.hard_labels:
            loss = losses.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
            return loss.mean(), LossOutcome(logits, batch_stats)
        targets = self.mixed_labels(batch, logits.shape[-1])
        loss = losses.soft_cross_entropy(logits, targets)
        divergence = loss - jax.scipy.special.entr(targets).sum(-1)
        return loss.mean(), LossOutcome(logits, batch_stats, {"avmixup_kl": divergence.mean()})

    def clean_share(self, batch: Batch) -> jax.Array:
        """u, `[batch]`: the share of the image itself in the mixture, Beta(1, 1) = U(0, 1).

        Raises:
            ValueError: if the batch has no key.
        """
        if batch.key is None:
            raise ValueError("AVmixup draws at random: Batch.key must be a key, got None")
        return jax.random.uniform(batch.key, batch.labels.shape, batch.images.dtype)

    def mixed_images(self, batch: Batch) -> jax.Array:
        """`u x + (1 - u) x_v`."""
        vertex = jnp.clip(batch.images + self.gamma * (batch.adversarial - batch.images), 0, 1)
        share = self.clean_share(batch).reshape(-1, *(1 for _ in batch.images.shape[1:]))
        return share * batch.images + (1 - share) * vertex

    def mixed_labels(self, batch: Batch, num_classes: int) -> jax.Array:
        """The soft targets, `[batch, classes]`; rows sum to 1."""
        share = self.clean_share(batch)
        # Both smoothings keep the same form, so the mixture is one smoothing to the mixed weight.
        on_label = share * self.clean_label + (1 - share) * self.vertex_label
        on_others = (1 - on_label) / (num_classes - 1)
        is_label = jax.nn.one_hot(batch.labels, num_classes, dtype=bool)
        targets = jnp.where(is_label, on_label[:, None], on_others[:, None])
        return (1 - self.label_smoothing) * targets + self.label_smoothing / num_classes
