"""Adversarial weight perturbation (AWP): the gradient is taken where the weights are attacked too.

Nothing is mutated: the perturbed parameters are a second tree, and the update is applied to the
first.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from agr_jax.attacks import LogitsFn
from agr_jax.methods.method import Batch, Forward, LossOutcome, Method

CleanGradientAt = Literal["unperturbed", "perturbed"]


@dataclasses.dataclass(frozen=True)
class AdversarialWeightPerturbation(Method):
    """Any method, with its adversarial gradient at `w + gamma v`.

    v is the step that raises the method's adversarial loss most, scaled kernel by kernel to the
    length of the kernel: `v = |w| g / (|g| + 1e-20)`. Kernels of convolutions and linear layers
    are perturbed; biases and BatchNorm's parameters are not. Weight decay, too, sees `w + gamma v`,
    as in the published codes.

    Attributes:
        method: supplies the attack and the two losses.
        gamma: length of the perturbation relative to the kernel's norm.
        clean_gradient_at: where g_c is taken, at the `unperturbed` w or at the `perturbed`
            w + gamma v. (AGR's published code mixes the two within one backward pass.)

    Source: Wu et al., "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS 2020,
    section 4.
    https://arxiv.org/abs/2004.05884
    """

    title: ClassVar[str] = "AWP"
    method: Method
    gamma: float = 0.01
    clean_gradient_at: CleanGradientAt = "unperturbed"

    def __post_init__(self) -> None:
        if type(self.method).gradient_points is not Method.gradient_points:
            raise ValueError(
                f"{type(self.method).__name__} says itself where its gradients are taken "
                "(gradient_points): AWP would not respect it"
            )
        if self.label_smoothing:
            raise ValueError(
                f"label_smoothing ({self.label_smoothing}) belongs to the method that AWP perturbs"
            )

    @property
    def is_adversarial(self) -> bool:
        """Whether the method that is perturbed is."""
        return self.method.is_adversarial

    def adversarial_images(
        self, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> jax.Array:
        """The method's own, at the unperturbed weights."""
        return self.method.adversarial_images(logits_fn, images, labels, key)

    def clean_loss(
        self, forward: Forward, params: Any, batch_stats: Any, batch: Batch
    ) -> tuple[jax.Array, LossOutcome]:
        """The method's own."""
        return self.method.clean_loss(forward, params, batch_stats, batch)

    def adversarial_loss(
        self, forward: Forward, params: Any, batch_stats: Any, batch: Batch
    ) -> tuple[jax.Array, LossOutcome]:
        """The method's own."""
        return self.method.adversarial_loss(forward, params, batch_stats, batch)

    def gradient_points(
        self, forward: Forward, params: Any, batch_stats: Any, batch: Batch
    ) -> tuple[Any, Any]:
        """`w` (or `w + gamma v`, as `clean_gradient_at` says) and `w + gamma v`.

        The statistics of the pass that finds v are discarded.
        """

        def loss(params: Any) -> jax.Array:
            return self.adversarial_loss(forward, params, batch_stats, batch)[0]

        perturbation = weight_perturbation(params, jax.grad(loss)(params))
        perturbed = jax.tree.map(lambda w, v: w + self.gamma * v, params, perturbation)
        return perturbed if self.clean_gradient_at == "perturbed" else params, perturbed


def weight_perturbation(params: Any, gradient: Any) -> Any:
    """The direction v: for each kernel the gradient scaled to the kernel's norm, elsewhere 0.

    Args:
        params: tree of parameters; leaves of two or more axes are kernels.
        gradient: of the loss to be raised, the same structure.
    """

    def scaled(weight: jax.Array, gradient: jax.Array) -> jax.Array:
        if weight.ndim < 2:
            return jnp.zeros_like(weight)
        wide = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
        # Squares of a tiny gradient would underflow; divided by its largest entry it has a norm of
        # at least 1, or is zero.
        unit = wide / jnp.maximum(jnp.max(jnp.abs(wide)), jnp.finfo(wide.dtype).tiny)
        length = jnp.linalg.norm(weight.astype(wide.dtype).ravel())
        factor = length / jnp.maximum(jnp.linalg.norm(unit.ravel()), 1)
        return (factor * unit).astype(weight.dtype)

    return jax.tree.map(scaled, params, gradient)
