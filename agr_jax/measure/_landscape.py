"""Losses along a random direction of the weights (Figure 5)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agr_jax import losses, methods
from agr_jax.data.dataset import part_of
from agr_jax.measure._test_images import as_floats, shared
from agr_jax.models import Classifier
from agr_jax.runs import Run

PyTree = Any
# Half the length of the grid: in units of each filter's own norm, and for standard normal draws.
FILTER_NORMALISED_SPAN = 1.0
RAW_SPAN = 0.05


def landscape(run: Run, classifier: Classifier) -> dict[str, Any]:
    """Mean clean and adversarial loss at weights w + alpha d, for a random Gaussian d.

    Two scales of d: as drawn, and filter-normalised (Li et al., 2018): every filter of d has the
    norm of that filter of w, and d is 0 for vectors (biases, BatchNorm). The adversarial images are
    made again at every point, as in Wu et al., 2020, by PGD on the cross-entropy with the ball and
    the steps of the training attack.
    """
    config, dataset = run.config, run.dataset
    settings = config.measure
    part = part_of(dataset.test, min(settings.images, len(dataset.test)))
    batch = shared(as_floats(dataset.test.take(part.rows)), run.mesh)
    key = jax.random.fold_in(jax.random.key(config.seed), 5)
    attack = methods.validation_attack(config.attack)

    @jax.jit
    def at(
        classifier: Classifier, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
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
        values = [at(_moved(classifier, direction, alpha), *batch) for alpha in alphas]
        curves[name] = {
            "alpha": alphas.tolist(),
            "clean_loss": [float(clean) for clean, _ in values],
            "adversarial_loss": [float(adversarial) for _, adversarial in values],
        }
    return {"images": len(part.rows), "selection": str(part), **curves}


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
