"""Any method on a batch in parts: as much memory as one part takes, the gradients of the whole."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from agr_jax.attacks import LogitsFn
from agr_jax.methods.method import Batch, Forward, LossOutcome, Method
from agr_jax.ranges import Range, check_ranges
from agr_jax.threat import image_keys

Loss = Callable[[Forward, Any, Any, Batch], tuple[jax.Array, LossOutcome]]


@dataclasses.dataclass(frozen=True)
class Accumulated(Method):
    """Any method, its batch attacked and differentiated in parts, one after the other.

    Each loss is the mean over the parts, and so is its gradient: AGR sees the two gradients of the
    whole batch. Without BatchNorm they are those of one pass. BatchNorm normalises each part by
    itself, and its running statistics are updated once a part. A method that draws at random in its
    loss (AVmixup) draws for each part anew.

    The k-th part has the images k, k + parts, ...: every device has its share of each, and the
    parts are the same on any number of devices.

    Attributes:
        method: supplies the attack and the two losses.
        parts: in how many parts; the batch is a multiple of it.
    """

    method: Method
    parts: int

    def __post_init__(self) -> None:
        check_ranges(self, parts=Range(1))
        if type(self.method).gradient_points is not Method.gradient_points:
            raise ValueError(
                f"{type(self.method).__name__} says itself where its gradients are taken "
                "(gradient_points), from the whole batch: it cannot be accumulated"
            )

    @property
    def is_adversarial(self) -> bool:
        """Whether the method is."""
        return self.method.is_adversarial

    def adversarial_images(
        self, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> jax.Array:
        """The method's own, part by part; an image's draws are those of the whole batch."""
        keys = image_keys(key, len(labels))
        parts = self._parts((images, labels, keys))
        return self._whole(
            jax.lax.map(lambda part: self.method.adversarial_images(logits_fn, *part), parts)
        )

    def adversarial_loss(
        self, forward: Forward, params: Any, batch_stats: Any, batch: Batch
    ) -> tuple[jax.Array, LossOutcome]:
        """The mean of the method's own over the parts."""
        return self._mean(self.method.adversarial_loss, forward, params, batch_stats, batch)

    def clean_loss(
        self, forward: Forward, params: Any, batch_stats: Any, batch: Batch
    ) -> tuple[jax.Array, LossOutcome]:
        """The mean of the method's own over the parts."""
        return self._mean(self.method.clean_loss, forward, params, batch_stats, batch)

    def _mean(
        self, loss: Loss, forward: Forward, params: Any, batch_stats: Any, batch: Batch
    ) -> tuple[jax.Array, LossOutcome]:
        """The loss of the batch, which carries its own gradient: a part's activations are gone."""
        of_part = jax.value_and_grad(functools.partial(loss, forward), has_aux=True)
        fixed = jax.lax.stop_gradient(params)

        def add(carry: tuple[Any, Any], part: tuple[Batch, jax.Array]) -> tuple[Any, Any]:
            total, batch_stats = carry
            inputs, index = part
            if batch.key is not None:
                inputs = inputs._replace(key=jax.random.fold_in(batch.key, index))
            (value, outcome), gradient = of_part(fixed, batch_stats, inputs)
            total = jax.tree.map(jnp.add, total, gradient)
            return (total, outcome.batch_stats), (value, outcome.logits, outcome.terms)

        parts = self._parts(batch._replace(key=None)), jnp.arange(self.parts)
        start = jax.tree.map(jnp.zeros_like, fixed), batch_stats
        (total, batch_stats), (values, logits, terms) = jax.lax.scan(add, start, parts)
        gradient = jax.tree.map(lambda g: g / self.parts, total)
        outcome = LossOutcome(
            self._whole(logits), batch_stats, jax.tree.map(lambda term: term.mean(0), terms)
        )
        return _with_gradient(values.mean(), params, gradient), outcome

    def _parts(self, tree: Any) -> Any:
        """`[batch, ...]` as `[parts, batch / parts, ...]`."""

        def split(array: jax.Array) -> jax.Array:
            if len(array) % self.parts:
                raise ValueError(f"{len(array)} images cannot be split into {self.parts} parts")
            return array.reshape(-1, self.parts, *array.shape[1:]).swapaxes(0, 1)

        return jax.tree.map(split, tree)

    @staticmethod
    def _whole(array: jax.Array) -> jax.Array:
        """The reverse."""
        return array.swapaxes(0, 1).reshape(-1, *array.shape[2:])


@jax.custom_vjp
def _with_gradient(loss: jax.Array, params: Any, gradient: Any) -> jax.Array:
    """The loss, whose gradient with respect to the parameters is given."""
    return loss


def _forward(loss: jax.Array, params: Any, gradient: Any) -> tuple[jax.Array, Any]:
    return loss, gradient


def _backward(gradient: Any, cotangent: jax.Array) -> tuple[jax.Array, Any, Any]:
    scaled = jax.tree.map(lambda g: cotangent.astype(g.dtype) * g, gradient)
    return jnp.zeros_like(cotangent), scaled, jax.tree.map(jnp.zeros_like, gradient)


_with_gradient.defvjp(_forward, _backward)
