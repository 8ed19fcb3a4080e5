"""A training method of your own, in one file: adversarial logit pairing, trained with AGR.

The method: cross-entropy at the adversarial images, plus the squared distance between the logits of
an image and of its adversarial example (Kannan et al., "Adversarial Logit Pairing", 2018). It is
here for its shortness; its robustness did not survive stronger attacks (Engstrom et al., 2018).

Command: python launch.py --config=examples/logit_pairing.py
         python launch.py --config=examples/logit_pairing.py --config.agr.enabled=False
Cost: about half a minute on two CPU cores.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from agr_jax import losses
from agr_jax.attacks import PGD, LogitsFn
from agr_jax.config import Config
from agr_jax.methods import Batch, Forward, LossOutcome, Method, training_attack
from configs import base


@dataclasses.dataclass(frozen=True)
class LogitPairing(Method):
    """Cross-entropy at x', plus `weight` times the mean squared distance of the logits.

    `clean_loss`, whose gradient AGR sets against this one's, is inherited: cross-entropy at x.
    """

    attack: PGD
    weight: float = 0.5

    def adversarial_images(
        self, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> jax.Array:
        """The inner attack, on the network in evaluation mode."""
        return self.attack(logits_fn, images, labels, key)

    def adversarial_loss(
        self, forward: Forward, params: Any, batch_stats: Any, batch: Batch
    ) -> tuple[jax.Array, LossOutcome]:
        """The loss whose gradient is g_a."""
        # The clean pass counts in BatchNorm's statistics through `clean_loss` already.
        clean_logits, _ = forward(params, batch_stats, batch.images)
        logits, batch_stats = forward(params, batch_stats, batch.adversarial)
        distance = jnp.mean((logits - clean_logits) ** 2)
        cross_entropy = losses.cross_entropy(
            logits, batch.labels, label_smoothing=self.label_smoothing
        )
        loss = cross_entropy.mean() + self.weight * distance
        return loss, LossOutcome(logits, batch_stats, {"logit_distance": distance})


def create(config: Config) -> LogitPairing:
    """What `config.method` names: a function from the run's config to the method."""
    attack = training_attack(config.attack)
    return LogitPairing(attack, label_smoothing=config.label_smoothing)


def get_config(profile: str = "paper") -> ConfigDict:
    """The recipe on digits, with this method."""
    config = base.recipe("digits", "at", profile)
    config.name = "digits_logit_pairing"
    config.method = "examples.logit_pairing:create"
    return config
