"""MART: AT that leans on the examples which the network gets wrong without an attack."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax

from agr_jax import losses
from agr_jax.attacks import PGD
from agr_jax.methods.at import AdversarialTraining
from agr_jax.methods.method import Batch, Forward, LossOutcome


@dataclasses.dataclass(frozen=True)
class MART(AdversarialTraining):
    """Adversarial loss: boosted cross-entropy at x', plus beta times the weighted divergence.

    Nothing is detached: the gradient flows through the clean prediction, in the divergence and in
    its weight.

    Attributes:
        attack: raises the cross-entropy.
        beta: weight of the divergence.
        published_statistics: let each pass count twice in the running statistics, clean, clean,
            adversarial, adversarial, as AGR's published code does with MART; otherwise once.

    Source: Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified
    Examples", ICLR 2020, equation 11.
    """

    title: ClassVar[str] = "MART"
    attack: PGD
    beta: float = 6.0
    published_statistics: bool = False

    def adversarial_loss(
        self, forward: Forward, params: Any, batch_stats: Any, batch: Batch
    ) -> tuple[jax.Array, LossOutcome]:
        """The whole loss; its parts are reported as `mart_bce` and `mart_kl` (without beta)."""
        clean_logits, after_clean = forward(params, batch_stats, batch.images)
        if self.published_statistics:
            batch_stats = after_clean
        logits, batch_stats = forward(params, batch_stats, batch.adversarial)
        if self.published_statistics:
            _, batch_stats = forward(params, batch_stats, batch.adversarial)
        boosted = losses.boosted_cross_entropy(
            logits, batch.labels, label_smoothing=self.label_smoothing
        ).mean()
        divergence = losses.weighted_kl_divergence(clean_logits, logits, batch.labels).mean()
        terms = {"mart_bce": boosted, "mart_kl": divergence}
        return boosted + self.beta * divergence, LossOutcome(logits, batch_stats, terms)
