"""One run: its settings, its folder, its data set and its devices."""

from agr_jax.runs.run import Run

__all__ = ["Run"]
