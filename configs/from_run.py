"""The config of an existing run: `--config=configs/from_run.py:RUN`, or just `--workdir=RUN`."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from agr_jax.config import to_dict
from agr_jax.runs.folder import read_config


def get_config(folder: str = "") -> ConfigDict:
    """Reads and checks `config.json` in the run folder."""
    values = to_dict(read_config(Path(folder)))
    return ConfigDict(json.loads(json.dumps(values), object_hook=_lists_to_tuples))


def _lists_to_tuples(values: dict[str, object]) -> dict[str, object]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
