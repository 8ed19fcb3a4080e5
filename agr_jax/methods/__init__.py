"""Training methods: the inner attack, and the clean and the adversarial loss."""

from __future__ import annotations

import warnings
from typing import Any

from agr_jax.config import Config, imported
from agr_jax.errors import ConfigError
from agr_jax.methods._training_attack import (
    divergence_from,
    threat_model,
    training_attack,
    validation_attack,
)
from agr_jax.methods.accumulated import Accumulated
from agr_jax.methods.at import AdversarialTraining
from agr_jax.methods.avmixup import AVmixup
from agr_jax.methods.awp import AdversarialWeightPerturbation
from agr_jax.methods.mart import MART
from agr_jax.methods.method import Batch, Forward, LossOutcome, Method
from agr_jax.methods.standard import StandardTraining
from agr_jax.methods.trades import TRADES

__all__ = [
    "MART",
    "METHODS",
    "TRADES",
    "AVmixup",
    "Accumulated",
    "AdversarialTraining",
    "AdversarialWeightPerturbation",
    "Batch",
    "Forward",
    "LossOutcome",
    "Method",
    "StandardTraining",
    "divergence_from",
    "from_config",
    "threat_model",
    "title",
    "training_attack",
    "validation_attack",
]

METHODS: dict[str, type[Method]] = {
    "standard": StandardTraining,
    "at": AdversarialTraining,
    "trades": TRADES,
    "mart": MART,
    "avmixup": AVmixup,
}
"""The classes by their names in `config.method`."""


def from_config(config: Config, epoch: int | None = None) -> Method:
    """The method that a config names, as it is in an epoch.

    Args:
        config: settings of the run.
        epoch: counted from 0; before `config.awp.start_epoch` the weights are not perturbed. By
            default an epoch after that.

    Raises:
        ConfigError: if `config.method` is neither a known name nor `MODULE:FUNCTION` of your own.
    """
    if imported.is_imported(config.method):
        method = imported.constant("config.method", config.method, config)
        if not isinstance(method, Method):
            raise ConfigError(
                f"config.method: {config.method} must return an agr_jax.methods.Method, "
                f"got {type(method).__name__}"
            )
    elif config.method in METHODS:
        method = METHODS[config.method].from_config(config)
    else:
        raise ConfigError(f"config.method: no such method {config.method!r}")
    if config.accumulate > 1:
        try:
            method = Accumulated(method, config.accumulate)
        except ValueError as error:
            raise ConfigError(f"config.accumulate: {error}") from error
    awp = config.awp
    if awp.enabled and (epoch is None or epoch >= awp.start_epoch):
        try:
            return AdversarialWeightPerturbation(
                method, gamma=awp.gamma, clean_gradient_at=awp.clean_gradient_at
            )
        except ValueError as error:
            raise ConfigError(f"config.awp.enabled: {error}") from error
    return method


def title(name: str) -> str:
    """What tables call a method, by its name in a config; `awp` is AWP on top of any."""
    titles = {"awp": AdversarialWeightPerturbation.title}
    titles |= {known: method.title for known, method in METHODS.items()}
    return titles.get(name, name)


def __getattr__(name: str) -> Any:
    """Names of before."""
    if name == "Outcome":
        warnings.warn(
            "methods.Outcome is methods.LossOutcome now", DeprecationWarning, stacklevel=2
        )
        return LossOutcome
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
