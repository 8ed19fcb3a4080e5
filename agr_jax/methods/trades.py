"""TRADES: cross-entropy on clean images, and how far the prediction moves under attack."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax

from agr_jax import losses
from agr_jax.attacks import PGD
from agr_jax.methods.at import AdversarialTraining
from agr_jax.methods.method import Batch, Forward, LossOutcome


@dataclasses.dataclass(frozen=True)
class TRADES(AdversarialTraining):
    """Adversarial loss: `CE(z(x), y) + beta KL(softmax z(x) || softmax z(x'))`.

    The gradient flows through both arguments of the divergence. Of the two passes only that of x'
    counts in the running statistics; the one of x counts through the clean loss.

    Attributes:
        attack: raises the divergence in the paper (`PGD(..., loss=divergence_from,
            targets="clean_logits", random_start=False, start_noise=0.001)`), the cross-entropy in
            AGR's published code.
        beta: 1 / lambda.

    Source: Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy",
    ICML 2019, equation 5.
    https://arxiv.org/abs/1901.08573
    """

    title: ClassVar[str] = "TRADES"
    attack: PGD
    beta: float = 6.0

    def adversarial_loss(
        self, forward: Forward, params: Any, batch_stats: Any, batch: Batch
    ) -> tuple[jax.Array, LossOutcome]:
        """The whole loss; its parts are reported as `trades_cross_entropy` and `trades_kl`."""
        clean_logits, _ = forward(params, batch_stats, batch.images)
        logits, batch_stats = forward(params, batch_stats, batch.adversarial)
        cross_entropy = losses.cross_entropy(
            clean_logits, batch.labels, label_smoothing=self.label_smoothing
        ).mean()
        divergence = losses.kl_divergence(clean_logits, logits).mean()
        terms = {"trades_cross_entropy": cross_entropy, "trades_kl": divergence}
        return cross_entropy + self.beta * divergence, LossOutcome(logits, batch_stats, terms)
