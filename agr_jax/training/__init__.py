"""Training of a run: its loop, its step, its optimiser, and what it says on the way."""

from agr_jax.training.loop import train_run
from agr_jax.training.step import Trainer, TrainState

__all__ = ["TrainState", "Trainer", "train_run"]
