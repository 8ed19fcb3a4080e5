"""Functions of your own that a config names, `MODULE:FUNCTION`."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agr_jax.errors import ConfigError


def is_imported(name: str) -> bool:
    """Whether a name is of the form `MODULE:FUNCTION`."""
    return ":" in name


def function(field: str, name: str) -> Callable[..., Any]:
    """The function that a field names.

    Args:
        field: full name of the config's field, for messages.
        name: `MODULE:FUNCTION`. The module may be in the folder where the program was started.

    Raises:
        ConfigError: if it cannot be imported, or is no function.
    """
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{field}: cannot import {name!r}: {error}") from error
    if not callable(found):
        raise ConfigError(f"{field}: {name} is no function, but a {type(found).__name__}")
    function: Callable[..., Any] = found
    return function


@functools.lru_cache(maxsize=32)
def constant(field: str, name: str, *arguments: Any) -> Any:
    """What the function that a field names returns, as a constant of compiled programs.

    It is made once for the same arguments: objects of two calls need not be equal, and for each of
    them the programs would be compiled again.

    Args:
        field: full name of the config's field, for messages.
        name: `MODULE:FUNCTION`.
        arguments: of the function; they can be hashed.

    Raises:
        ConfigError: if it cannot be imported, or its result cannot be hashed.
    """
    made = function(field, name)(*arguments)
    try:
        hash(made)
    except TypeError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{field}: what {name} returns cannot be hashed ({reason}): it is a constant of "
            "compiled programs, so let its fields be numbers, strings and tuples"
        ) from error
    return made
