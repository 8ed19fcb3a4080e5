"""Training methods: the inner attack, and the clean and the adversarial loss."""

from __future__ import annotations

from agr_jax.attacks import PGD
from agr_jax.config import AttackConfig, Config
from agr_jax.methods.at import AdversarialTraining
from agr_jax.methods.objective import Batch, Forward, Method, Outcome
from agr_jax.methods.standard import StandardTraining
from agr_jax.threat import L1, L2, Linf, ThreatModel

__all__ = [
    "AdversarialTraining",
    "Batch",
    "Forward",
    "Method",
    "Outcome",
    "StandardTraining",
    "from_config",
    "threat_model",
    "training_attack",
]


def from_config(config: Config) -> Method:
    """The method that a config names."""
    if config.method == "standard":
        return StandardTraining()
    return AdversarialTraining(training_attack(config.attack))


def training_attack(config: AttackConfig) -> PGD:
    """The attack inside training."""
    return PGD(
        threat_model(config),
        steps=config.steps,
        step_size=config.step_size,
        random_start=config.random_start,
        box_every_step=config.box_every_step,
    )


def threat_model(config: AttackConfig) -> ThreatModel:
    """The ball in which a run trains and is evaluated."""
    threats: dict[str, type[Linf | L2 | L1]] = {"linf": Linf, "l2": L2, "l1": L1}
    return threats[config.norm](config.epsilon)
