"""Standard training: no attack. The baseline that shows what adversarial training buys."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax

from agr_jax.attacks import LogitsFn
from agr_jax.methods.method import Batch, Forward, LossOutcome, Method


@dataclasses.dataclass(frozen=True)
class StandardTraining(Method):
    """Both losses are the cross-entropy of the clean images."""

    title: ClassVar[str] = "standard"

    @property
    def is_adversarial(self) -> bool:
        """It is not: it never sees an attack."""
        return False

    def adversarial_images(
        self, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> jax.Array:
        """The images themselves."""
        return images

    def adversarial_loss(
        self, forward: Forward, params: Any, batch_stats: Any, batch: Batch
    ) -> tuple[jax.Array, LossOutcome]:
        """Cross-entropy of the clean images."""
        return self.clean_loss(forward, params, batch_stats, batch)
