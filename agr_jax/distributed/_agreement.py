"""What processes tell each other: the first one's decisions, and whether they are all alike.

These are collective: every process calls them, in the same order, from its main thread.
"""

from __future__ import annotations

import functools
import json
import secrets
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from jax.experimental import multihost_utils

from agr_jax import errors
from agr_jax.distributed._processes import current, is_first
from agr_jax.errors import ConfigError, RunFolderError, UserError

Value = TypeVar("Value")
Parameters = ParamSpec("Parameters")
# Of the first process: the others wait for what it decides.
_deciding: ContextVar[bool] = ContextVar("deciding", default=False)
# Messages are filled up to a power of two, this one at the least: few sizes, few programs.
_LEAST_BYTES = 1024
# A network file system may show a new file to other hosts a little later.
_SECONDS_TO_SEE_A_FILE = 20.0


def broadcast(content: bytes) -> bytes:
    """The first process's content, in all processes."""
    if current().count == 1:
        return content
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(content), np.int32)))
    filled = np.zeros(_filled_size(size), np.uint8)
    if is_first():
        filled[:size] = np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(filled))[:size].tobytes()


def gather(content: bytes) -> list[bytes]:
    """Every process's content, by process."""
    if current().count == 1:
        return [content]
    sizes = multihost_utils.process_allgather(np.asarray(len(content), np.int32))
    filled = np.zeros(_filled_size(int(sizes.max())), np.uint8)
    filled[: len(content)] = np.frombuffer(content, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(filled))
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def from_first(function: Callable[[], Value]) -> Value:
    """What a function gives in the first process, or the error that it raises there, in all.

    For what depends on files or on this machine, so that all processes go the same way. Within
    such a function another one is only called: the others are not there to be told.

    Args:
        function: called in the first process alone; gives a JSON value.

    Raises:
        UserError: that of the first process, of the same class.
    """
    if current().count == 1 or _deciding.get():
        return function()
    told: dict[str, Any] = {}
    if is_first():
        before = _deciding.set(True)
        try:
            told = {"value": function()}
        except UserError as error:
            told = {"error": type(error).__name__, "message": str(error)}
        finally:
            _deciding.reset(before)
    told = json.loads(broadcast(json.dumps(told).encode()))
    if "error" in told:
        raise getattr(errors, told["error"], UserError)(told["message"])
    value: Value = told["value"]
    return value


def decided_by_first(function: Callable[Parameters, Value]) -> Callable[Parameters, Value]:
    """The same function, called in the first process alone; see `from_first`."""

    @functools.wraps(function)
    def decided(*arguments: Parameters.args, **named: Parameters.kwargs) -> Value:
        return from_first(lambda: function(*arguments, **named))

    return decided


def check_same(facts: Mapping[str, Any], advice: str) -> None:
    """Refuses processes that differ.

    Args:
        facts: JSON values by what they are, such as a config field.
        advice: how to mend it, for the message.

    Raises:
        ConfigError: in every process, naming what differs and how.
    """
    if current().count == 1:
        return
    gathered = [json.loads(each) for each in gather(json.dumps(dict(facts)).encode())]
    differing = []
    for name in sorted({name for each in gathered for name in each}):
        values = [json.dumps(each.get(name)) for each in gathered]
        others = [index for index, value in enumerate(values) if value != values[0]]
        if others:
            differing.append(
                f"{name}: {values[0]} in process 0, {values[others[0]]} in process {others[0]}"
            )
    if differing:
        raise ConfigError(f"the processes differ ({'; '.join(differing)}): {advice}")


def check_shared_folder(folder: Path) -> None:
    """Refuses a folder that is not the same one in all processes.

    The first process writes a token, and all others look for it.

    Raises:
        RunFolderError: in every process, naming the processes that do not see it.
    """
    if current().count == 1:
        return
    name = from_first(lambda: _write_token(folder))
    sees = bool(_appears(folder / name))
    blind = [index for index, each in enumerate(gather(bytes([sees]))) if each != b"\x01"]
    if is_first():
        (folder / name).unlink(missing_ok=True)
    if blind:
        listed = ", ".join(map(str, blind))
        raise RunFolderError(
            f"run folder {folder}: what process 0 writes there is not seen by process {listed}: "
            "all processes need one folder on a shared file system"
        )


def _write_token(folder: Path) -> str:
    name = f".token-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    except OSError as error:
        raise RunFolderError(f"run folder {folder}: cannot be written: {error}") from error
    return name


def _appears(path: Path) -> bool:
    until = time.monotonic() + _SECONDS_TO_SEE_A_FILE
    while not path.is_file():
        if time.monotonic() > until or not path.parent.is_dir():
            return path.is_file()
        time.sleep(0.2)
    return True


def _filled_size(size: int) -> int:
    return max(_LEAST_BYTES, 1 << max(size - 1, 0).bit_length())
