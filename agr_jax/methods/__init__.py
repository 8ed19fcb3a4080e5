"""Training methods: the inner attack, and the clean and the adversarial loss."""

from __future__ import annotations

import functools

from agr_jax import losses, own_code
from agr_jax.attacks import PGD
from agr_jax.config import AttackConfig, Config
from agr_jax.errors import ConfigError
from agr_jax.methods.at import AdversarialTraining
from agr_jax.methods.avmixup import AVmixup
from agr_jax.methods.awp import AdversarialWeightPerturbation
from agr_jax.methods.mart import MART
from agr_jax.methods.objective import Batch, Forward, Method, Outcome
from agr_jax.methods.standard import StandardTraining
from agr_jax.methods.trades import TRADES, divergence_from
from agr_jax.threat import L1, L2, Linf, ThreatModel

__all__ = [
    "MART",
    "TRADES",
    "AVmixup",
    "AdversarialTraining",
    "AdversarialWeightPerturbation",
    "Batch",
    "Forward",
    "Method",
    "Outcome",
    "StandardTraining",
    "from_config",
    "threat_model",
    "training_attack",
    "validation_attack",
]


def from_config(config: Config, epoch: int | None = None) -> Method:
    """The method that a config names, as it is in an epoch.

    Args:
        config: settings of the run.
        epoch: counted from 0; before `config.awp.start_epoch` the weights are not perturbed. By
            default an epoch after that.

    Raises:
        ConfigError: if `config.method` is neither a known name nor `MODULE:FUNCTION` of your own.
    """
    method = _without_perturbation(config)
    awp = config.awp
    if awp.enabled and (epoch is None or epoch >= awp.start_epoch):
        try:
            return AdversarialWeightPerturbation(
                method, gamma=awp.gamma, clean_gradient_at=awp.clean_gradient_at
            )
        except ValueError as error:
            raise ConfigError(f"config.awp.enabled: {error}") from error
    return method


def _without_perturbation(config: Config) -> Method:
    attack = training_attack(config.attack)
    smoothing = config.label_smoothing
    published = config.batch_stats == "published"
    if ":" in config.method:
        return _imported(config)
    if config.method == "standard":
        return StandardTraining(label_smoothing=smoothing)
    if config.method == "at":
        return AdversarialTraining(attack, label_smoothing=smoothing)
    if config.method == "trades":
        return TRADES(attack, beta=config.trades.beta, label_smoothing=smoothing)
    if config.method == "mart":
        return MART(
            attack,
            beta=config.mart.beta,
            published_statistics=published,
            label_smoothing=smoothing,
        )
    if config.method == "avmixup":
        return AVmixup(
            attack,
            gamma=config.avmixup.gamma,
            clean_label=config.avmixup.clean_label,
            vertex_label=config.avmixup.vertex_label,
            hard_labels=config.avmixup.hard_labels,
            published_statistics=published,
            label_smoothing=smoothing,
        )
    raise ConfigError(f"config.method: no such method {config.method!r}")


@functools.lru_cache(maxsize=8)
def _imported(config: Config) -> Method:
    """Made once for a config: those of two calls need not be equal, and each would be compiled."""
    method = own_code.call("config.method", config.method, config)
    if not isinstance(method, Method):
        raise ConfigError(
            f"config.method: {config.method} must return an agr_jax.methods.Method, "
            f"got {type(method).__name__}"
        )
    return method


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
    """The ball in which a run trains and is evaluated."""
    threats: dict[str, type[Linf | L2 | L1]] = {"linf": Linf, "l2": L2, "l1": L1}
    return threats[config.norm](config.epsilon)
