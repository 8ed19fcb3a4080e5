"""What an update along each way of combining the gradients does to both losses, to first order."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agr_jax import agr_transform, leaf_names, sharding
from agr_jax.config import AGRConfig
from agr_jax.data.feed import TrainingImages
from agr_jax.models import Classifier
from agr_jax.runs import Run
from agr_jax.training import Trainer, TrainState

_OF_LEAVES = ("cosine", "projected")
_SMALLEST = jnp.finfo(jnp.float32).tiny


def mechanism(run: Run, classifier: Classifier) -> dict[str, Any]:
    """First-order change of both losses by an update of norm 1 along each combined gradient.

    Over `measure.batches` batches of the training set in an order of its own, each augmented and
    attacked as in training. An update -G / |G| changes the clean loss by -<g_c, G> / |G|, and
    the adversarial one likewise; g_c and g_a are this batch's, G is made of them. Also, for each
    leaf, the mean cosine of g_c and g_a and the share of batches in which AGR projects it.
    """
    trainer, ways = Trainer.from_run(run), _combinations(run.config.agr)
    state = trainer.init(jax.random.key(0), run.dataset.image_shape).replace(  # type: ignore[attr-defined]
        params=classifier.variables["params"],
        batch_stats=classifier.variables.get("batch_stats", {}),
    )
    changes = jax.jit(functools.partial(_changes, trainer, ways))
    key = jax.random.fold_in(jax.random.key(run.config.seed), 6)
    measured = [
        changes(state, *batch, jax.random.fold_in(key, index))
        for index, batch in enumerate(_batches(run, key))
    ]
    table = jax.device_get(measured)
    return {
        "batches": len(table),
        "clip_norm": run.config.agr.clip_norm,
        "change": {
            way: {
                quantity: _mean_and_deviation([found[way][quantity] for found, _ in table])
                for quantity in ("clean", "adversarial", "norm")
            }
            for way in ways
        },
        "leaves": {
            name: _mean_and_deviation([leaves[name].mean() for _, leaves in table])
            for name in _OF_LEAVES
        },
        "by_leaf": {
            "names": list(leaf_names(state.params)),
            **{
                name: np.mean([leaves[name] for _, leaves in table], 0).tolist()
                for name in _OF_LEAVES
            },
        },
    }


def _combinations(config: AGRConfig) -> dict[str, optax.GradientTransformationExtraArgs | None]:
    """The ways of combining both gradients; `None` is the clean gradient alone."""
    norm = config.clip_norm
    active = functools.partial(agr_transform, gop_start=0, gics_start=0)
    inactive = functools.partial(agr_transform, gop_start=None, gics_start=None)
    return {
        "clean": None,
        "adversarial": inactive(clip="none", clip_norm=None),
        "clip": inactive(clip_start=0, clip="all", clip_norm=norm),
        "agr": active(clip="interpolated", clip_norm=norm),
        "agr_no_clip": active(clip="none", clip_norm=None),
        "tau_0.9": active(clip="interpolated", clip_norm=norm, interpolation=0.9),
    }


def _changes(
    trainer: Trainer,
    ways: Mapping[str, optax.GradientTransformationExtraArgs | None],
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
) -> tuple[dict[str, dict[str, jax.Array]], dict[str, jax.Array]]:
    """One batch: both losses' changes along each way, and what AGR measures on each leaf."""
    batch = trainer.inputs(state, images, labels, key)
    pair, _, _, _ = trainer.gradients(state, batch, clean_gradient=True)
    found, leaves = {}, {}
    for name, way in ways.items():
        combined = pair.clean
        if way is not None:
            combined, seen = way.update(
                pair.adversarial, way.init(state.params), state.params, clean_grads=pair.clean
            )
            if name == "agr":
                leaves = {field: optax.tree.get(seen, field) for field in _OF_LEAVES}
        length = jnp.maximum(optax.tree.norm(combined), _SMALLEST)
        found[name] = {
            "clean": -optax.tree.vdot(pair.clean, combined) / length,
            "adversarial": -optax.tree.vdot(pair.adversarial, combined) / length,
            "norm": length,
        }
    return found, leaves


def _part_of_batch(
    images: TrainingImages, rows: np.ndarray, part: slice
) -> tuple[np.ndarray, np.ndarray]:
    return images.batch(rows[part])


def _batches(run: Run, key: jax.Array) -> Iterator[list[jax.Array]]:
    """Batches of the training set on the devices, `measure.batches` of them."""
    images, count = TrainingImages(run.dataset.train), run.config.measure.batches
    sizes = [run.config.batch_size] * (len(run.dataset.train) // run.config.batch_size)
    rows: list[np.ndarray] = []
    for epoch in range(-(-count // len(sizes))):
        order = images.order(key, epoch, sizes)
        rows += np.split(order[: sum(sizes)], len(sizes))
    for chosen in rows[:count]:
        yield sharding.put_rows(
            functools.partial(_part_of_batch, images, chosen), len(chosen), run.mesh
        )


def _mean_and_deviation(values: list[Any]) -> dict[str, float]:
    numbers = np.array(values, float)
    return {"mean": float(numbers.mean()), "std": float(numbers.std(ddof=1))}
