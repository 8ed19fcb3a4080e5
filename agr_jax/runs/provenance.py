"""What says how a record was made: versions, the commit, the devices."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import agr_jax


def environment(mesh: Mesh) -> dict[str, Any]:
    """Versions, commit and devices, as JSON values."""
    device = mesh.devices.flat[0]
    return {
        "agr_jax": agr_jax.__version__,
        "commit": _commit(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{mesh.size} x {device.device_kind} ({device.platform})",
        **({"processes": jax.process_count()} if jax.process_count() > 1 else {}),
    }


def _commit() -> str | None:
    """Commit of the checkout that this package is part of, if it is part of one."""
    git = Path(__file__).resolve().parents[2] / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        if (git / name).exists():
            return (git / name).read_text().strip()
        packed = (git / "packed-refs").read_text().splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)
    except OSError:
        return None
