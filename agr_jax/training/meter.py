"""Means of the metrics of an epoch's steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from agr_jax.errors import NonFiniteLossError


class EpochMeter:
    """Sums of an epoch's metrics, weighted by batch size, and the last ones read."""

    def __init__(self) -> None:
        self.images = 0
        self.seconds = 0.0
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._last: dict[str, float] = {}

    def read(
        self, step: int, images: int, metrics: Mapping[str, jax.Array]
    ) -> dict[str, np.ndarray]:
        """Waits for one step's metrics, adds the scalars among them, and returns them all.

        Raises:
            NonFiniteLossError: naming the metric and the step.
        """
        read = jax.device_get(dict(metrics))
        self._last = {name: float(value) for name, value in read.items() if value.ndim == 0}
        for name, value in self._last.items():
            if "loss" in name and not math.isfinite(value):
                raise NonFiniteLossError(
                    f"{name} is {value} at step {step}: training diverged; the last checkpoint "
                    "is kept. Try a smaller config.optimizer.learning_rate"
                )
            self._sums[name] = self._sums.get(name, 0.0) + images * value
            self._counts[name] = self._counts.get(name, 0) + images
        self.images += images
        return read

    def means(self) -> dict[str, float]:
        """The epoch's means."""
        return {name: value / self._counts[name] for name, value in self._sums.items()}

    def note(self) -> str:
        """For the progress bar."""
        loss, accuracy = (self._last.get(f"adversarial_{n}") for n in ("loss", "accuracy"))
        return "" if loss is None else f"loss {loss:.3f}, robust {accuracy:.0%}"

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint within an epoch."""
        return {
            "images": self.images,
            "seconds": self.seconds,
            "sums": dict(self._sums),
            "counts": dict(self._counts),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EpochMeter:
        """Back from a checkpoint."""
        meter = cls()
        meter.images, meter.seconds = values["images"], values["seconds"]
        meter._sums, meter._counts = dict(values["sums"]), dict(values["counts"])
        return meter
