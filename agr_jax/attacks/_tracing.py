"""A callable as what it computes now: a program, found by its content, and the arrays it uses.

`jax.jit` knows a function by its identity and makes constants of the arrays that it closed over.
Attacks would so go on with the weights of their first call, and compile again for every new lambda
that computes the same. Here a callable is traced at each call (30 ms for a few layers, a quarter of
a second for ResNet-18): the arrays that it closed over become arguments, and equal programs are one
object, whatever they came from, so that what `jit` has compiled for one serves all. The program's
own gradient with respect to its first argument is traced too, since custom derivative rules are
functions, which have no content.

On a CPU all its convolutions, and those of the gradient, are put into the form that is fast inside
of loops (see `agr_jax.attacks._convolutions`).
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from agr_jax.attacks import _convolutions as convolutions
from agr_jax.attacks._jaxpr_content import closed as closed_jaxpr
from agr_jax.attacks._jaxpr_content import content

# Calls whose body may stand in their place: what remains of derivative rules is not used.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "eval_jaxpr": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
_PLACEMENT = ("in_shardings", "out_shardings", "in_layouts", "out_layouts")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """A callable as a pytree: its arrays are leaves, its program is constant.

    Called with arguments of the shapes and dtypes that it was traced for. Its first argument alone
    can be differentiated, in reverse mode.

    Attributes:
        arrays: what the callable closed over.
        arrays_backward: what its gradient needs beside that.
        program: what it computes.
    """

    arrays: tuple[Any, ...]
    arrays_backward: tuple[Any, ...]
    program: Program = dataclasses.field(metadata={"static": True})

    def __call__(self, first: jax.Array, *others: Any) -> jax.Array:
        """The callable's value."""
        result: jax.Array = _call(self.program, (self.arrays, self.arrays_backward), first, others)
        return result


class Program:
    """What a callable computes, without its arrays; equal programs are the same object.

    Attributes:
        forward: from arrays and arguments to the value, and what the gradient needs beside the
            arrays.
        backward: from arrays, that, and the value's cotangent to the first argument's; `None` of
            what is not to be differentiated.
        value: shape and dtype of the value.
        rewritten: number of convolutions that were put into another form.
        float32_convolutions: there are convolutions, and all are of float32.
    """

    __slots__ = ("__weakref__", "backward", "float32_convolutions", "forward", "rewritten", "value")

    def __init__(
        self,
        forward: core.ClosedJaxpr,
        backward: core.ClosedJaxpr | None,
        value: jax.ShapeDtypeStruct,
        rewritten: int,
        float32_convolutions: bool,
    ) -> None:
        self.forward, self.backward = forward, backward
        self.value, self.rewritten = value, rewritten
        self.float32_convolutions = float32_convolutions


# By content. A program lives as long as something compiled, or a caller, holds it.
_programs: weakref.WeakValueDictionary[Any, Program] = weakref.WeakValueDictionary()


def trace(
    function: Callable[..., Any],
    *arguments: Any,
    check: Callable[[Any], None] = lambda _: None,
    gradient: bool = True,
) -> Traced:
    """What a callable computes from arguments of these shapes and dtypes.

    Args:
        function: returns one array.
        arguments: arrays, or their shapes and dtypes.
        check: called with what the function returns, abstract arrays; raises if it is wrong.
        gradient: the first argument's is wanted too; a host callback may have none.
    """
    rewriter = _Rewriter(rewrite=jax.default_backend() == "cpu")

    def checked(*arguments: Any) -> Any:
        value = function(*arguments)
        check(value)
        return value

    if gradient:
        closed, value, closed_backward = _with_gradient(checked, arguments)
        backward, arrays_backward = rewriter.with_arguments(closed_backward)
    else:
        closed, value = jax.make_jaxpr(checked, return_shape=True)(*arguments)
        backward, arrays_backward = None, ()
    forward, arrays = rewriter.with_arguments(closed)
    found = content(forward), None if backward is None else content(backward)
    program = _programs.get(found)
    if program is None:
        float32 = rewriter.float32_convolutions
        program = Program(forward, backward, value, rewriter.rewritten, float32)
        _programs[found] = program
    return Traced(arrays, arrays_backward, program)


def _with_gradient(
    function: Callable[..., Any], arguments: Sequence[Any]
) -> tuple[core.ClosedJaxpr, Any, core.ClosedJaxpr]:
    """Jaxprs to the value and what the gradient needs, and from there to the gradient."""

    # A new function each time: JAX remembers what it traced by the identity of the function.
    def differentiated(first: Any, *others: Any) -> Any:
        return jax.vjp(lambda first: function(first, *others), first)

    forward, (value, pull_back) = jax.make_jaxpr(differentiated, return_shape=True)(*arguments)
    residuals, structure = jax.tree.flatten(pull_back)

    def transposed(residuals: Sequence[Any], cotangent: Any) -> Any:
        return jax.tree.unflatten(structure, residuals)(cotangent)[0]

    return forward, value, jax.make_jaxpr(transposed)(residuals, value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _call(program: Program, arrays: Any, first: Any, others: Any) -> Any:
    return _call_forward(program, arrays, first, others)[0]


def _call_forward(program: Program, arrays: Any, first: Any, others: Any) -> Any:
    of_forward, of_backward = arrays
    value, *residuals = _evaluated(program.forward, *of_forward, first, *others)
    return value, (residuals, of_backward)


def _call_backward(program: Program, saved: Any, cotangent: Any) -> Any:
    residuals, arrays = saved
    assert program.backward is not None, "traced without a gradient"
    (gradient,) = _evaluated(program.backward, *arrays, *residuals, cotangent)
    return None, gradient, None


_call.defvjp(_call_forward, _call_backward)


def _evaluated(closed: core.ClosedJaxpr, *arguments: Any) -> list[Any]:
    results: list[Any] = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *arguments)
    return results


class _Rewriter:
    """Evaluates jaxprs, with calls in their place and convolutions in the fast form."""

    def __init__(self, *, rewrite: bool) -> None:
        self.rewrite, self.rewritten = rewrite, 0
        self._dtypes: set[Any] = set()  # of the convolutions' results
        self._arguments: dict[int, Any] = {}

    @property
    def float32_convolutions(self) -> bool:
        """See `Program`."""
        return self._dtypes == {jnp.dtype("float32")}

    def with_arguments(self, closed: core.ClosedJaxpr) -> tuple[core.ClosedJaxpr, tuple[Any, ...]]:
        """The rewritten jaxpr, whose first arguments are the arrays that it uses, and those."""
        found = {id(array): (variable, array) for variable, array in _arrays(closed)}
        shapes = [_placeless(variable.aval) for variable, _ in found.values()]

        def evaluate(arrays: Sequence[Any], *arguments: Any) -> Any:
            self._arguments = dict(zip(found, arrays, strict=True))
            return self._evaluate(closed, arguments)

        rewritten = jax.make_jaxpr(evaluate)(shapes, *map(_placeless, closed.in_avals))
        return rewritten, tuple(array for _, array in found.values())

    def _evaluate(self, closed: core.ClosedJaxpr, arguments: Sequence[Any]) -> list[Any]:
        jaxpr = closed.jaxpr
        constants = [self._arguments.get(id(array), array) for array in closed.consts]
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
        values.update(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else values[atom]

        for equation in _used(jaxpr):
            with equation.ctx.manager:
                results = self._equation(equation, [read(atom) for atom in equation.invars])
            values.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: core.JaxprEqn, operands: list[Any]) -> Sequence[Any]:
        primitive, parameters = equation.primitive, equation.params
        name = primitive.name
        if _is_call(equation):
            return self._evaluate(closed_jaxpr(parameters[_CALLS[name]]), operands)
        if self.rewrite and name == "conv_general_dilated":
            result: Any = equation.outvars[0].aval
            self._dtypes.add(result.dtype)
            if not convolutions.is_fast(operands[1], parameters):
                self.rewritten += 1
                return [convolutions.fast(operands[0], operands[1], parameters)]
        elif self.rewrite:
            parameters = {key: self._inside(value) for key, value in parameters.items()}
        if name != "sharding_constraint":
            parameters = {key: _unplaced(key, value) for key, value in parameters.items()}
        bound = primitive.get_bind_params(parameters)
        # Older versions of JAX return functions apart from the other parameters.
        functions, bound = bound if isinstance(bound, tuple) else ((), bound)
        result = primitive.bind(*functions, *operands, **bound)
        return result if primitive.multiple_results else [result]

    def _inside(self, value: Any) -> Any:
        """A parameter, such as the body of a loop, rewritten if it is one with convolutions."""
        if isinstance(value, tuple | list) and type(value) in (tuple, list):
            return type(value)(map(self._inside, value))
        if not isinstance(value, core.Jaxpr | core.ClosedJaxpr) or not _to_rewrite(value):
            return value
        closed, outside = closed_jaxpr(value), self._arguments

        def evaluate(*arguments: Any) -> Any:
            self._arguments = {}  # a body's arrays stay inside
            return self._evaluate(closed, arguments)

        rewritten = jax.make_jaxpr(evaluate)(*closed.in_avals)
        self._arguments = outside
        if isinstance(value, core.ClosedJaxpr):
            return rewritten
        # An open jaxpr has no place for arrays.
        return value if rewritten.consts else rewritten.jaxpr


def _unplaced(name: str, value: Any) -> Any:
    """A parameter without the mesh of an array, where that does not say how it is split."""
    mesh = getattr(value, "mesh", None)
    if name not in ("sharding", "out_sharding") or mesh is None or mesh.empty:
        return value
    return None if mesh.are_all_axes_auto else value


def _placeless(aval: Any) -> Any:
    """Without the mesh that an array is placed on, unless the caller says how it is split there.

    The same program is evaluated on whole batches and, within `shard_map`, on a device's part.
    """
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    if mesh is None or mesh.empty or not mesh.are_all_axes_auto:
        return aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


def _arrays(closed: core.ClosedJaxpr) -> Iterator[tuple[Any, Any]]:
    """Variables and arrays of a jaxpr and of the calls that are put in their place."""
    yield from zip(closed.jaxpr.constvars, closed.consts, strict=True)
    for equation in closed.jaxpr.eqns:
        if _is_call(equation):
            yield from _arrays(closed_jaxpr(equation.params[_CALLS[equation.primitive.name]]))


def _used(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
    """The equations that something depends on."""
    wanted = {atom for atom in jaxpr.outvars if not isinstance(atom, core.Literal)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not wanted.isdisjoint(equation.outvars):
            kept.append(equation)
            wanted |= {atom for atom in equation.invars if not isinstance(atom, core.Literal)}
    return kept[::-1]


def _is_call(equation: core.JaxprEqn) -> bool:
    """Whether the equation's body may stand in its place."""
    return equation.primitive.name in _CALLS and not any(map(_is_placed, equation.params.items()))


def _is_placed(parameter: tuple[str, Any]) -> bool:
    """Whether a parameter of `jit` says where something is placed, which its body does not."""
    name, value = parameter
    if name not in _PLACEMENT:
        return False
    return any(each is not None and type(each).__name__ != "UnspecifiedValue" for each in value)


def _to_rewrite(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> bool:
    """Whether there is a convolution, anywhere inside, that is to have another form."""
    return any(
        not convolutions.is_fast(equation.invars[1].aval, equation.params)
        if equation.primitive.name == "conv_general_dilated"
        else any(map(_to_rewrite, _bodies(equation.params.values())))
        for equation in closed_jaxpr(jaxpr).jaxpr.eqns
    )


def _bodies(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, core.Jaxpr | core.ClosedJaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _bodies(value)
