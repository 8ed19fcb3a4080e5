"""One value for a run: its settings, its folder, its data set and its devices."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from agr_jax import config as config_module
from agr_jax import data, distributed, models, sharding
from agr_jax.config import Config
from agr_jax.data import Dataset, Split
from agr_jax.data.dataset import Part, part_of
from agr_jax.errors import ConfigError
from agr_jax.models import Classifier
from agr_jax.runs import checkpoints, provenance


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What training, evaluation and measurements share.

    Attributes:
        config: its settings.
        folder: where it keeps what it makes; see `agr_jax.runs.folder`.
        dataset: its images.
        mesh: devices that share each batch.
    """

    config: Config
    folder: Path
    dataset: Dataset
    mesh: Mesh

    @classmethod
    def from_config(cls, config: Config, folder: Path) -> Run:
        """The run with a config's data set, on all devices.

        Raises:
            DataError: if the data set is not found, or not what it should be.
            ConfigError: if several processes work together, and their images differ.
        """
        dataset = data.from_config(config)
        distributed.check_same(
            {f"digest of the {name} images": digest for name, digest in dataset.digests.items()},
            "give all the same images",
        )
        return cls(config, folder, dataset, sharding.data_mesh())

    def with_eval(self, **fields: Any) -> Run:
        """The same run with other fields of `config.eval`."""
        settings = dataclasses.replace(self.config.eval, **fields)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, eval=settings))

    def model(self, dtype: Any = jnp.float32) -> nn.Module:
        """The network that the config names.

        Raises:
            ConfigError: on an unknown name.
        """
        return models.from_config(self.config, self.dataset.num_classes, dtype)

    def description(self) -> dict[str, dict[str, Any]]:
        """The model and the data set, as a checkpoint's `about` holds them."""
        model, images = self.config.model, self.config.data
        drawn = images.train_examples or images.validation_examples
        return {
            "model": {
                "name": model.name,
                "width": model.width,
                "mean": list(model.mean),
                "std": list(model.std),
                "num_classes": self.dataset.num_classes,
                "image_shape": list(self.dataset.image_shape),
            },
            "data set": {
                "name": self.dataset.name,
                "complete": self.dataset.complete,
                "train_examples": images.train_examples,
                "validation_examples": images.validation_examples,
                # Another split would hold out what a base was trained on.
                "split_seed": self.config.seed if drawn else None,
            },
        }

    def load_classifier(
        self, checkpoint: Path, item: str = "variables"
    ) -> tuple[Classifier, dict[str, Any]]:
        """Reads a checkpoint's network; `item` is `variables`, or `average` for the averaged one.

        Returns:
            The classifier, and the checkpoint's `about`.

        Raises:
            CheckpointError: if it is a checkpoint of another model or data set.
        """
        about = checkpoints.read_about(checkpoint)
        checkpoints.check_same(about, self.description(), checkpoint)
        model = self.model()
        image = jnp.zeros([1, *self.dataset.image_shape])
        shapes = jax.eval_shape(lambda: dict(model.init(jax.random.key(0), image)))
        everywhere = sharding.replicated(self.mesh)
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), shapes
        )
        return Classifier(model, checkpoints.restore(checkpoint, item, like)), about

    @functools.cached_property
    def test_part(self) -> Part:
        """Which test images an evaluation takes: all for 0, or else as many as are asked for.

        The first ones, or, where the test set is ordered by class, some drawn with a seed that all
        runs share; see `agr_jax.data.dataset.part_of`.

        Raises:
            ConfigError: if the test set has fewer.
        """
        examples = self.config.eval.examples or len(self.dataset.test)
        if examples > len(self.dataset.test):
            raise ConfigError(
                f"config.eval.examples: {examples} asked for, the test set has "
                f"{len(self.dataset.test)}"
            )
        return part_of(self.dataset.test, examples)

    def test_split(self) -> Split:
        """These test images; see `test_part`."""
        part = self.test_part
        return self.dataset.test.take(part.rows) if part.suffix else self.dataset.test

    def provenance(self) -> dict[str, Any]:
        """What a record needs to be repeated: versions, commit, devices, and the whole config."""
        return {
            "environment": provenance.environment(self.mesh),
            "config": config_module.to_dict(self.config),
        }
