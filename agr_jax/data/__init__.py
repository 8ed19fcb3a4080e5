"""Data sets in memory, read from their official files, and on-device augmentation."""

from agr_jax.data.augment import Augmentation, to_unit_range
from agr_jax.data.dataset import Dataset, Split
from agr_jax.data.sources import from_config, load_dataset

__all__ = ["Augmentation", "Dataset", "Split", "from_config", "load_dataset", "to_unit_range"]
