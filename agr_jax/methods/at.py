"""Adversarial training as Madry et al. do it: cross-entropy on PGD's images."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax

from agr_jax.attacks import PGD, LogitsFn
from agr_jax.methods.method import Batch, Forward, LossOutcome, Method


@dataclasses.dataclass(frozen=True)
class AdversarialTraining(Method):
    """Clean loss: cross-entropy at x; adversarial loss: cross-entropy at the attack's x'.

    Attributes:
        attack: raises the cross-entropy of the network in evaluation mode.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks",
    ICLR 2018.
    https://arxiv.org/abs/1706.06083
    """

    title: ClassVar[str] = "AT"
    attack: PGD

    def adversarial_images(
        self, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> jax.Array:
        """Images in the attack's ball."""
        return self.attack(logits_fn, images, labels, key)

    def adversarial_loss(
        self, forward: Forward, params: Any, batch_stats: Any, batch: Batch
    ) -> tuple[jax.Array, LossOutcome]:
        """Cross-entropy of the adversarial images."""
        return self.mean_cross_entropy(
            forward, params, batch_stats, batch.adversarial, batch.labels
        )
