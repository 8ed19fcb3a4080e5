"""What a jaxpr computes, as a value: equal for two that compute the same in the same way."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core


def closed(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> core.ClosedJaxpr:
    """A jaxpr without constants of its own, as one with an empty list of them."""
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def content(program: core.ClosedJaxpr) -> Hashable:
    """A hashable value of a jaxpr: its equations, with numbers for names, and its constants."""
    jaxpr = program.jaxpr
    numbers: dict[Any, int] = {}

    def new(variables: Sequence[Any]) -> Any:
        for variable in variables:
            numbers[variable] = len(numbers)
        return tuple(variable.aval for variable in variables)

    def atom(value: Any) -> Any:
        if isinstance(value, core.Literal):
            return _of_value(value.val), value.aval
        return numbers[value]

    arguments = new(jaxpr.constvars), new(jaxpr.invars)
    equations = tuple(
        (
            equation.primitive,
            tuple(map(atom, equation.invars)),
            tuple((name, _of_value(value)) for name, value in sorted(equation.params.items())),
            new(equation.outvars),
        )
        for equation in jaxpr.eqns
    )
    results = tuple(map(atom, jaxpr.outvars))
    return arguments, equations, results, _of_value(tuple(program.consts))


def _of_value(value: Any) -> Any:
    """Of a parameter of an equation; of what has no content, its identity."""
    found: Any = type(value), value
    if isinstance(value, core.Jaxpr | core.ClosedJaxpr):
        found = content(closed(value))
    elif isinstance(value, np.ndarray | np.generic | jax.Array):
        found = _of_array(value)
    elif type(value) in (tuple, list):
        found = type(value), tuple(map(_of_value, value))
    elif isinstance(value, dict):
        found = dict, tuple((key, _of_value(value[key])) for key in sorted(value))
    elif callable(value) and not isinstance(value, type):
        found = _of_function(value)
    elif not isinstance(value, Hashable):
        found = _Identity(value)
    return found


def _of_function(function: Any) -> Any:
    """Its identity: an object may call itself equal to one that computes something else."""
    if dataclasses.is_dataclass(function):  # JAX's wrapper of a host callback
        values = [getattr(function, field.name) for field in dataclasses.fields(function)]
        return type(function), tuple(map(_of_value, values))
    if isinstance(function, functools.partial):
        return _of_value((function.func, function.args, function.keywords))
    return _Identity(function)


def _of_array(value: Any) -> Any:
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return str(value.dtype), _of_array(jax.random.key_data(value))
    if isinstance(value, jax.core.Tracer):
        return _Identity(value)
    array = np.asarray(value)
    return array.dtype, array.shape, array.tobytes()


class _Identity:
    """Equal only to itself; holds its object, so that no other takes its place in memory."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)
