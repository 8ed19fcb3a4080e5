"""Functions of your own that a config names, `MODULE:FUNCTION`."""

from __future__ import annotations

import importlib
from typing import Any

from agr_jax.errors import ConfigError


def call(field: str, name: str, *arguments: Any) -> Any:
    """Imports the function that a field names and calls it.

    Args:
        field: full name of the config's field, for messages.
        name: `MODULE:FUNCTION`, importable from where the program was started.
        arguments: of the function.

    Returns:
        What it returns, which can be hashed: it becomes a constant of compiled programs.

    Raises:
        ConfigError: if it cannot be imported, or its result cannot be hashed.
    """
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{field}: cannot import {name!r}: {error}") from error
    if not callable(function):
        raise ConfigError(f"{field}: {name} is no function, but a {type(function).__name__}")
    made = function(*arguments)
    try:
        hash(made)
    except TypeError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{field}: what {name} returns cannot be hashed ({reason}): it is a constant of "
            "compiled programs, so let its fields be numbers, strings and tuples"
        ) from error
    return made
