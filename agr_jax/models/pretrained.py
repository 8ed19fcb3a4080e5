"""Small networks to try at once, trained with this library, with the evaluation of each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from agr_jax.models._create import create
from agr_jax.models.classifier import Classifier
from agr_jax.models.convolution import Implementation

_FOLDER = "weights"


def pretrained_names() -> list[str]:
    """The names that `load_pretrained` knows."""
    files = resources.files("agr_jax.models") / _FOLDER
    return sorted(f.name.removesuffix(".npz") for f in files.iterdir() if f.name.endswith(".npz"))


def read_pretrained(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The variables of a network, and its record: how to make the model, and its evaluation.

    Raises:
        ValueError: on an unknown name.
    """
    if name not in pretrained_names():
        raise ValueError(f"unknown network {name!r}: there are {', '.join(pretrained_names())}")
    files = resources.files("agr_jax.models") / _FOLDER
    record = json.loads((files / f"{name}.json").read_text(encoding="utf-8"))
    with (
        resources.as_file(files / f"{name}.npz") as path,
        np.load(path, allow_pickle=False) as file,
    ):
        flat = {key: jnp.asarray(file[key]) for key in file.files}
    return traverse_util.unflatten_dict(flat, sep="/"), record


def load_pretrained(name: str, *, conv: Implementation | None = None) -> Classifier:
    """A small trained network that comes with this package; see `docs/experiments.md`.

    Args:
        name: one of `pretrained_names()`: `"cifar10-width16-at"`, `"cifar10-width16-agr"` and
            `"cifar10-width16-best"`, PreAct-ResNet-18 of width 16 trained on 10,000 images, whose
            evaluations are stored beside the weights.
        conv: as `create`.

    Returns:
        A classifier of images in [0, 1], `[batch, 32, 32, 3]`, with the normalisation inside.

    Raises:
        ValueError: on an unknown name.

    Example:
        >>> import jax.numpy as jnp
        >>> from agr_jax import models
        >>> classifier = models.load_pretrained("cifar10-width16-at")
        >>> classifier(jnp.zeros([2, 32, 32, 3])).shape
        (2, 10)
    """
    variables, record = read_pretrained(name)
    settings = record["model"]
    model = create(
        settings["name"],
        settings["num_classes"],
        width=settings["width"],
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        conv=conv,
    )
    return Classifier(model, variables)


def save_pretrained(
    folder: Path, name: str, model: nn.Module, variables: Mapping[str, Any], record: dict[str, Any]
) -> None:
    """Writes what `read_pretrained` reads: float32 variables, and the record as JSON.

    Args:
        folder: where to.
        name: of the two files.
        model: whose variables these are; its shapes are checked.
        variables: `{"params": ..., "batch_stats": ...}`.
        record: `{"model": arguments of agr_jax.models.create, "evaluations": [...]}`.

    Raises:
        ValueError: if the variables are not the model's.
    """
    side = record.get("image_shape", [32, 32, 3])
    expected = jax.eval_shape(lambda: dict(model.init(jax.random.key(0), jnp.zeros([1, *side]))))
    shapes = jax.tree.map(lambda leaf: leaf.shape, dict(variables))
    if shapes != jax.tree.map(lambda leaf: leaf.shape, expected):
        raise ValueError("the variables are not those of the model")
    flat = traverse_util.flatten_dict(dict(variables), sep="/")
    arrays: dict[str, Any] = {key: np.asarray(leaf, np.float32) for key, leaf in flat.items()}
    np.savez(folder / f"{name}.npz", **arrays)
    text = json.dumps(record, indent=2) + "\n"
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
