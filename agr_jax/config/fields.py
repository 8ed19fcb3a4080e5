"""Typed fields: frozen dataclasses made from nested values, with errors that name the field."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from agr_jax.errors import ConfigError

T = TypeVar("T")


class OneOf(NamedTuple):
    """A text that is one of the names, or of the form `MODULE:FUNCTION`."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}, or MODULE:FUNCTION of your own"

    def holds(self, value: str) -> bool:
        """Whether a value is allowed."""
        module, _, function = value.partition(":")
        names_a_function = function.isidentifier() and all(
            part.isidentifier() for part in module.split(".")
        )
        return value in self.names or names_a_function


def build(cls: type[T], values: Mapping[str, Any], prefix: str) -> T:
    """Makes a dataclass, and those within it, from nested mappings.

    Args:
        cls: a dataclass whose fields are typed with numbers, strings, tuples, `Literal`,
            `Annotated` with a `Range` or `OneOf`, or further dataclasses.
        values: one entry for each field; one with a default may be missing, which is how fields
            that are younger than a run's config.json are read.
        prefix: what messages put before a field's name.

    Raises:
        ConfigError: on an unknown or missing field, a wrong type, or a value out of range.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    for name in values:
        if name not in hints:
            raise ConfigError(f"{prefix}.{name}: no such field{suggestion(name, hints)}")
    required = {
        field.name
        for field in dataclasses.fields(typing.cast(Any, cls))
        if field.default is dataclasses.MISSING
    }
    for name in hints:
        if name in required and name not in values:
            raise ConfigError(f"{prefix}.{name}: the field is missing")
    return cls(
        **{
            name: _convert(values[name], hint, f"{prefix}.{name}")
            for name, hint in hints.items()
            if name in values
        }
    )


def _convert(value: Any, hint: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not hasattr(value, "items"):
            raise ConfigError(f"{name}: must be a group of fields, got {value!r}")
        return build(typing.cast(type, hint), dict(value.items()), name)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise ConfigError(f"{name}: must be a tuple of values, got {value!r}")
        return tuple(_convert(v, arguments[0], f"{name}[{i}]") for i, v in enumerate(value))
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(
                f"{name}: must be one of {', '.join(arguments)}, got {value!r}"
                + _close_match(str(value), arguments)
            )
        return value
    if origin is Annotated:
        converted, allowed = _convert(value, arguments[0], name), arguments[1]
        if not allowed.holds(converted):
            known = allowed.names if isinstance(allowed, OneOf) else ()
            raise ConfigError(
                f"{name}: must be {allowed}, got {converted!r}"
                + _close_match(str(converted), known)
            )
        return converted
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{name}: must be {hint.__name__}, got {type(value).__name__} {value!r}")
    return value


def suggestion(name: str, known: Iterable[str]) -> str:
    """What to say after "no such field"."""
    known = list(known)
    everything = f"; there are {', '.join(known)}" if known else ""
    return _close_match(name, known) or everything


def _close_match(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
