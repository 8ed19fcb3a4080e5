"""Adaptive Gradient Reconstruction: the optax transformation and the rule that it applies."""

from agr_jax.agr._rule import Clip, CombinationRule, Granularity, Interpolation
from agr_jax.agr._transform import (
    MEASURED,
    AGRState,
    GradientPair,
    agr_transform,
    clean_and_adversarial_grads,
    from_gradient_pair,
    leaf_names,
)

__all__ = [
    "MEASURED",
    "AGRState",
    "Clip",
    "CombinationRule",
    "GradientPair",
    "Granularity",
    "Interpolation",
    "agr_transform",
    "clean_and_adversarial_grads",
    "from_gradient_pair",
    "leaf_names",
]
