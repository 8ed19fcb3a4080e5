"""Adaptive Gradient Reconstruction (AGR) and adversarial training in JAX.

This module needs only jax and optax; `agr_jax.models` and the trainer need the `train` extra.
"""

from agr_jax.agr import (
    AGRState,
    GradientPair,
    agr_transform,
    clean_and_adversarial_grads,
    from_gradient_pair,
    leaf_names,
)

__all__ = [
    "AGRState",
    "GradientPair",
    "agr_transform",
    "clean_and_adversarial_grads",
    "from_gradient_pair",
    "leaf_names",
]
__version__ = "0.1.0"
