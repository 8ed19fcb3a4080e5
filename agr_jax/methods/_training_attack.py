"""The attack inside training, and the one that scores the held-out split, from a config."""

from __future__ import annotations

import jax

from agr_jax import losses
from agr_jax.attacks import PGD, named
from agr_jax.config import AttackConfig
from agr_jax.errors import ConfigError
from agr_jax.threat import ThreatModel


def divergence_from(logits: jax.Array, clean_logits: jax.Array) -> jax.Array:
    """KL(clean prediction || prediction), which the attack of TRADES raises."""
    return losses.kl_divergence(clean_logits, logits)


def training_attack(config: AttackConfig) -> PGD:
    """The attack inside training.

    Raises:
        ConfigError: if it is to start in two ways.
    """
    if config.random_start and config.start_noise:
        raise ConfigError(
            f"config.attack.start_noise: {config.start_noise} needs config.attack.random_start="
            "False: an attack starts at a random point of the ball, or near the image"
        )
    from_clean = config.objective == "kl"
    return PGD(
        threat_model(config),
        steps=config.steps,
        step_size=config.step_size,
        random_start=config.random_start,
        loss=divergence_from if from_clean else losses.cross_entropy,
        targets="clean_logits" if from_clean else "labels",
        start_noise=config.start_noise,
        box_every_step=config.box_every_step,
    )


def validation_attack(config: AttackConfig) -> PGD:
    """The same ball and steps, on the cross-entropy, from a random start: the same for all methods.

    It selects the best checkpoint, so it must not depend on what a method trains against.
    """
    return PGD(
        threat_model(config),
        steps=config.steps,
        step_size=config.step_size,
        box_every_step=config.box_every_step,
    )


def threat_model(config: AttackConfig) -> ThreatModel:
    """The ball in which a run trains and is evaluated.

    Raises:
        ConfigError: if `config.attack.norm` names a function of your own that makes no threat
            model.
    """
    return named.ball(config.norm, config.epsilon)
