"""Distances to the decision boundary along random directions (Figure 4)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from agr_jax import sharding
from agr_jax.attacks import LogitsFn
from agr_jax.data import Split
from agr_jax.data.dataset import PART_SEED, representative_order
from agr_jax.measure._test_images import as_floats, shared
from agr_jax.models import Classifier
from agr_jax.runs import Run


def boundary(run: Run, classifier: Classifier) -> dict[str, Any]:
    """Steps of 1/255 until the prediction changes, along random directions, sorted.

    A direction gives every pixel a sign, drawn for each direction (the paper does not say
    which directions it takes), and points are clipped to [0, 1]. The images are the first
    `measure.images` test images that are classified correctly, in the order in which the first ones
    stand for the whole test set (`agr_jax.data.dataset.representative_order`).
    """
    config, dataset = run.config, run.dataset
    settings = config.measure
    order = representative_order(dataset.test)
    images, labels = as_floats(dataset.test.take(order))
    key = jax.random.fold_in(jax.random.key(config.seed), 4)
    predict = jax.jit(lambda classifier, x: jnp.argmax(classifier(x), axis=1))
    correct: list[int] = []
    for start in range(0, len(labels), 500):
        part = shared(images[start : start + 500], run.mesh)
        found = sharding.get(predict(classifier, part))
        correct += [start + int(i) for i in np.flatnonzero(found == labels[start : start + 500])]
        if len(correct) >= settings.images:
            break
    rows = np.array(correct[: settings.images], int)
    chosen = shared(images[rows], run.mesh) if len(rows) else images[rows]
    steps = [
        sharding.get(
            steps_to_boundary(
                classifier,
                chosen,
                jax.random.fold_in(key, direction),
                most=settings.most_steps,
            )
        )
        for direction in range(settings.directions)
    ]
    counted = np.sort(np.concatenate(steps)) if len(rows) else np.zeros(0, int)
    return {
        "images": len(rows),
        "selection": f"of those classified correctly, {_order_of(dataset.test)}",
        "directions": settings.directions,
        "step_length": 1 / 255,
        "most_steps": settings.most_steps,
        "steps": counted.tolist(),
    }


@functools.partial(jax.jit, static_argnames="most")
def steps_to_boundary(
    logits_fn: LogitsFn, images: jax.Array, key: jax.Array, *, most: int
) -> jax.Array:
    """Number of steps of 1/255 after which each image's prediction has changed, int32 `[batch]`.

    Args:
        logits_fn: the network.
        images: in [0, 1].
        key: of the directions, a random sign for each pixel of each image.
        most: steps that are tried; the result where the prediction never changes.
    """
    signs = jax.random.rademacher(key, images.shape, images.dtype)
    first = jnp.argmax(logits_fn(images), axis=1)

    def unfinished(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        step, _, changed = carry
        return (step < most) & ~jnp.all(changed)

    def one(
        carry: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        step, found, changed = carry
        points = jnp.clip(images + ((step + 1) / 255).astype(images.dtype) * signs, 0, 1)
        now = jnp.argmax(logits_fn(points), axis=1) != first
        found = jnp.where(now & ~changed, step + 1, found)
        return step + 1, found, changed | now

    start = jnp.int32(0), jnp.full(len(images), most, jnp.int32), jnp.zeros(len(images), bool)
    return lax.while_loop(unfinished, one, start)[1]


def _order_of(split: Split) -> str:
    """How `representative_order` orders a split."""
    return f"drawn with seed {PART_SEED}" if split.ordered_by_class else "first"
