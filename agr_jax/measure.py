"""What is measured on a checkpoint for the paper's figures, without training.

`boundary`: distances to the decision boundary along random directions (Figure 4). `landscape`:
losses along a random direction of the weights (Figure 5). `mechanism`: what an update along each
way of combining the gradients does to both losses, to first order (`docs/experiments.md`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from agr_jax import (
    agr_transform,
    checkpoints,
    evaluate,
    evaluation_records,
    leaf_names,
    losses,
    mesh,
    methods,
    network,
    run_folder,
    train,
)
from agr_jax.attacks import LogitsFn
from agr_jax.config import Config
from agr_jax.data import Dataset, Split, to_unit_range
from agr_jax.data.dataset import PART_SEED, part_of, representative_order
from agr_jax.data.feed import TrainingImages
from agr_jax.errors import ConfigError
from agr_jax.models import Classifier
from agr_jax.train_step import TrainState

PyTree = Any
# Half the length of the grid: in units of each filter's own norm, and for standard normal draws.
FILTER_NORMALISED_SPAN = 1.0
RAW_SPAN = 0.05


def measure_run(
    folder: Path,
    config: Config,
    name: str,
    *,
    dataset: Dataset | None = None,
    on: Mesh | None = None,
) -> dict[str, Any]:
    """Measures on a run's last checkpoint, and saves `measurements/<name>.json`.

    Args:
        folder: the run folder.
        config: its config.
        name: `boundary`, `landscape` or `mechanism`.
        dataset: already loaded, or `None` to load it.
        on: devices, by default all.

    Returns:
        What the JSON file holds.

    Raises:
        CheckpointError: if the run has no checkpoint, or one of another model or data set.
        ConfigError: on a name that is none.
    """
    measures: dict[str, Callable[..., dict[str, Any]]] = {
        "boundary": boundary,
        "landscape": landscape,
        "mechanism": mechanism,
    }
    if name not in measures:
        raise ConfigError(f"measurement {name!r}: there are {', '.join(measures)}")
    dataset = dataset if dataset is not None else evaluate.dataset_from_config(config)
    on = on if on is not None else mesh.data_mesh()
    classifier, about = network.load_classifier(checkpoints.find(folder), config, dataset, on)
    with jax.default_matmul_precision("float32"):
        found = measures[name](config, classifier, dataset, on)
    record = {
        "measurement": name,
        "step": about["step"],
        "epoch": about["epoch"],
        "data": dataset.describe(),
        "seed": config.seed,
        **found,
        **evaluate.provenance(config, on),
    }
    path = run_folder.measurements_path(folder) / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    if earlier := _earlier(path, record):
        record["earlier"] = earlier
    evaluation_records.write(path, record)
    return record


def _earlier(path: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """What a file has of other measurements, such as of another step: they stay in it."""
    stored = evaluation_records.read(path)
    own = {name: value for name, value in stored.items() if name != "earlier"}
    earlier = evaluation_records.earlier_groups(stored)
    is_other = any(own.get(name) != record[name] for name in ("step", "seed", "data"))
    settings = own.get("config")
    theirs = settings.get("measure") if isinstance(settings, dict) else None
    is_other = is_other or theirs != record["config"]["measure"]
    return [own, *earlier] if own and is_other else earlier


# ---- Figure 4


def boundary(config: Config, classifier: Classifier, dataset: Dataset, on: Mesh) -> dict[str, Any]:
    """Steps of 1/255 until the prediction changes, along random directions, sorted.

    A direction gives every pixel a sign, drawn anew for each direction (the paper does not say
    which directions it takes), and points are clipped to [0, 1]. The images are the first
    `measure.images` test images that are classified correctly, in the order in which the first ones
    stand for the whole test set (`agr_jax.data.dataset.representative_order`).
    """
    settings = config.measure
    order = representative_order(dataset.test)
    images, labels = _as_floats(dataset.test.take(order))
    key = jax.random.fold_in(jax.random.key(config.seed), 4)
    predict = jax.jit(lambda classifier, x: jnp.argmax(classifier(x), axis=1))
    correct: list[int] = []
    for start in range(0, len(labels), 500):
        found = np.asarray(predict(classifier, images[start : start + 500]))
        correct += [start + int(i) for i in np.flatnonzero(found == labels[start : start + 500])]
        if len(correct) >= settings.images:
            break
    rows = np.array(correct[: settings.images], int)
    steps = [
        np.asarray(
            steps_to_boundary(
                classifier,
                images[rows],
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


# ---- Figure 5


def landscape(config: Config, classifier: Classifier, dataset: Dataset, on: Mesh) -> dict[str, Any]:
    """Mean clean and adversarial loss at weights w + alpha d, for a random Gaussian d.

    Two scales of d: as drawn, and filter-normalised (Li et al., 2018): every filter of d has the
    norm of that filter of w, and d is 0 for vectors (biases, BatchNorm). The adversarial images are
    made anew at every point, as in Wu et al., 2020, by PGD on the cross-entropy with the ball and
    the steps of the training attack.
    """
    settings = config.measure
    part = part_of(dataset.test, min(settings.images, len(dataset.test)))
    images, labels = _as_floats(dataset.test.take(part.rows))
    key = jax.random.fold_in(jax.random.key(config.seed), 5)
    attack = methods.validation_attack(config.attack)

    @jax.jit
    def at(classifier: Classifier) -> tuple[jax.Array, jax.Array]:
        adversarial = attack(classifier, images, labels, key)
        return tuple(  # type: ignore[return-value]
            losses.cross_entropy(classifier(x), labels).mean() for x in (images, adversarial)
        )

    params = classifier.variables["params"]
    drawn = gaussian_like(jax.random.fold_in(key, 1), params)
    curves = {}
    for name, direction, span in (
        ("filter_normalised", filter_normalised(drawn, params), FILTER_NORMALISED_SPAN),
        ("raw", drawn, RAW_SPAN),
    ):
        alphas = np.linspace(-span, span, settings.points)
        values = [at(_moved(classifier, direction, alpha)) for alpha in alphas]
        curves[name] = {
            "alpha": alphas.tolist(),
            "clean_loss": [float(clean) for clean, _ in values],
            "adversarial_loss": [float(adversarial) for _, adversarial in values],
        }
    return {"images": len(labels), "selection": str(part), **curves}


def gaussian_like(key: jax.Array, params: PyTree) -> PyTree:
    """A tree of standard normal draws."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.normal(k, p.shape, p.dtype) for k, p in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def filter_normalised(direction: PyTree, params: PyTree) -> PyTree:
    """The direction with each filter, `[..., i]` of a kernel, as long as that of the parameters."""

    def normalise(d: jax.Array, w: jax.Array) -> jax.Array:
        if w.ndim < 2:
            return jnp.zeros_like(w)
        axes = tuple(range(w.ndim - 1))
        length = jnp.sqrt(jnp.sum(d**2, axes, keepdims=True))
        return d * jnp.sqrt(jnp.sum(w**2, axes, keepdims=True)) / length

    return jax.tree.map(normalise, direction, params)


def _moved(classifier: Classifier, direction: PyTree, alpha: float) -> Classifier:
    params = jax.tree.map(
        lambda w, d: w + jnp.asarray(alpha, w.dtype) * d,
        classifier.variables["params"],
        direction,
    )
    return Classifier(classifier.model, {**classifier.variables, "params": params})


# ---- mechanism


def mechanism(config: Config, classifier: Classifier, dataset: Dataset, on: Mesh) -> dict[str, Any]:
    """First-order change of both losses by an update of norm 1 along each combined gradient.

    Over `measure.batches` batches of the training set in an order of its own, each augmented and
    attacked as in training. An update -G / |G| changes the clean loss by -<g_c, G> / |G|, and
    the adversarial one likewise; g_c and g_a are this batch's, G is made of them. Also, for each
    leaf, the mean cosine of g_c and g_a and the share of batches in which AGR projects it.
    """
    trainer = train.create_trainer(config, dataset, on)
    state = trainer.init(jax.random.key(0), dataset.image_shape).replace(  # type: ignore[attr-defined]
        params=classifier.variables["params"],
        batch_stats=classifier.variables.get("batch_stats", {}),
    )
    norm = config.agr.clip_norm
    active = functools.partial(agr_transform, gop_start=0, gics_start=0)
    ways = {
        "clean": None,
        "adversarial": agr_transform(gop_start=None, gics_start=None, clip="none", clip_norm=None),
        "clip": agr_transform(
            gop_start=None, gics_start=None, clip_start=0, clip="all", clip_norm=norm
        ),
        "agr": active(clip="interpolated", clip_norm=norm),
        "agr_no_clip": active(clip="none", clip_norm=None),
        "tau_0.9": active(clip="interpolated", clip_norm=norm, interpolation=0.9),
    }

    @jax.jit
    def changes(
        state: TrainState, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> tuple[dict[str, dict[str, jax.Array]], dict[str, jax.Array]]:
        batch = trainer.inputs(state, images, labels, key)
        pair, _, _, _ = trainer.gradients(state, batch, clean_gradient=True)
        found = {}
        for name, way in ways.items():
            combined = pair.clean
            seen: Any = None
            if way is not None:
                combined, seen = way.update(
                    pair.adversarial, way.init(state.params), state.params, clean_grads=pair.clean
                )
            length = jnp.maximum(optax.tree.norm(combined), jnp.finfo(jnp.float32).tiny)
            found[name] = {
                "clean": -optax.tree.vdot(pair.clean, combined) / length,
                "adversarial": -optax.tree.vdot(pair.adversarial, combined) / length,
                "norm": length,
            }
            if name == "agr":
                leaves = {name: optax.tree.get(seen, name) for name in ("cosine", "projected")}
        return found, leaves

    root = jax.random.fold_in(jax.random.key(config.seed), 6)
    images = TrainingImages(dataset.train)
    sizes = [config.batch_size] * (len(dataset.train) // config.batch_size)
    rows = []
    for epoch in range(-(-config.measure.batches // len(sizes))):
        order = images.order(root, epoch, sizes)
        rows += np.split(order[: sum(sizes)], len(sizes))
    measured = []
    for index, chosen in enumerate(rows[: config.measure.batches]):
        batch = jax.device_put(images.batch(chosen), mesh.batch_sharding(on))
        measured.append(changes(state, *batch, jax.random.fold_in(root, index)))
    table = jax.device_get(measured)
    return {
        "batches": len(table),
        "clip_norm": norm,
        "change": {
            way: {
                quantity: _mean_and_deviation([found[way][quantity] for found, _ in table])
                for quantity in ("clean", "adversarial", "norm")
            }
            for way in ways
        },
        "leaves": {
            name: _mean_and_deviation([leaves[name].mean() for _, leaves in table])
            for name in ("cosine", "projected")
        },
        "by_leaf": {
            "names": list(leaf_names(state.params)),
            **{
                name: np.mean([leaves[name] for _, leaves in table], 0).tolist()
                for name in ("cosine", "projected")
            },
        },
    }


def _mean_and_deviation(values: list[Any]) -> dict[str, float]:
    numbers = np.array(values, float)
    return {"mean": float(numbers.mean()), "std": float(numbers.std(ddof=1))}


def _as_floats(split: Split) -> tuple[jax.Array, jax.Array]:
    """Images as floats in [0, 1], and their labels."""
    return to_unit_range(jnp.asarray(split.images)), jnp.asarray(split.labels)


def _order_of(split: Split) -> str:
    """How `representative_order` orders a split."""
    return f"drawn with seed {PART_SEED}" if split.ordered_by_class else "first"
