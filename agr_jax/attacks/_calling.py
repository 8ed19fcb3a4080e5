"""How an attack is called: the network is traced, and programs are found by what they compute.

Outside of `jit` the network is traced at each call (`agr_jax.attacks._tracing`), so that it is what
it computes now. The attack's program is found by the network, the shapes, and the attack but for
its radius, its step size and the arrays of its loss, which are arguments. Within the caller's own
`jit` the attack becomes a part of that program.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from agr_jax import losses
from agr_jax.attacks import _tracing as tracing
from agr_jax.attacks._checks import (
    LogitsFn,
    as_array,
    batch_dependence,
    batch_message,
    check_inputs,
    check_labels,
    logits_of,
    warn,
    warn_of_radius,
)
from agr_jax.threat import L1, L2, Linf, image_keys

_NO_KEY = object()  # `None` may be what a caller takes for one


def run(
    function: Callable[..., Any],
    attack: Any,
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    *arguments: Any,
    key: Any = _NO_KEY,
    loss_takes: tuple[str, ...] = ("labels",),
    gradient: bool = True,
    ball: bool = True,
) -> Any:
    """`function(attack, logits_fn, images, labels, *arguments)`, checked, traced and compiled.

    Args:
        function: of a module; calls the network with batches of the shape of `images`.
        attack: a frozen dataclass with a `threat`. Where it has `draws`, the network takes a key
            too; where it has a `loss` of the caller's own, that is traced as well.
        logits_fn: see any attack.
        images: see any attack.
        labels: see any attack.
        arguments: arrays.
        key: see any attack; the function gets one for each image, before the other arguments.
        loss_takes: what a loss gets beside the logits, each `"labels"` (or other classes) or
            `"logits"`.
        gradient: the function differentiates the network.
        ball: the attack's radius matters to the result.

    Returns:
        What the function returns.

    Raises:
        ValueError: as any attack.

    Warns:
        EvaluationWarning: outside of `jit`, if the ball holds every image, or the logits of an
            image depend on its batch.
    """
    images, labels = as_array(images), as_array(labels)
    check_inputs(images, labels)
    if key is not _NO_KEY:
        arguments = (image_keys(key, len(labels)), *arguments)
    if ball:
        warn_of_radius(attack.threat, images)
    draws = getattr(attack, "draws", 0)
    keys = (jax.random.key(0),) if draws else ()
    traced = traced_network(logits_fn, images, *keys, gradient=gradient)
    logits, network = traced.program.value, cast(LogitsFn, traced)
    check_labels(labels, logits.shape[1])
    loss = getattr(attack, "loss", None)
    if callable(loss) and not _is_ours(loss):
        others = [{"labels": labels, "logits": logits}[name] for name in loss_takes]
        loss = _traced_loss(attack, logits, others, gradient)
    fixed, varying = taken_apart(attack, loss)
    compiled: Callable[..., Any]
    if _is_tracing():  # within the caller's `jit`
        compiled = _directly
        if not traced.program.rewritten:  # best left as the caller wrote it
            network = logits_fn
    elif any(
        isinstance(leaf, jax.core.Tracer)
        for leaf in jax.tree.leaves((images, labels, arguments, traced, varying))
    ):
        compiled = _nested  # under `vmap` or `grad`, where a compiler's options are refused
    else:
        compiled = compiled_for(traced.program)(_directly, ("function", "fixed"))
        if not draws:
            _warn_of_batch(traced, images)
    return compiled(function, fixed, varying, network, images, labels, *arguments)


def traced_network(
    logits_fn: LogitsFn,
    images: jax.Array | jax.ShapeDtypeStruct,
    *keys: jax.Array,
    gradient: bool = True,
) -> tracing.Traced:
    """The network as what it computes now.

    Args:
        logits_fn: see any attack.
        images: a batch, or its shape and dtype.
        keys: a key, for a randomised network.
        gradient: it is to be differentiated.

    Raises:
        ValueError: if it does not return logits `[batch, classes]` of two or more classes.
    """
    check = functools.partial(_check_logits, images.shape[0])
    try:
        return tracing.trace(logits_fn, images, *keys, check=check, gradient=gradient)
    except Exception as error:
        if type(error).__name__ != "TraceContextError":  # Flax's, which is not imported here
            raise
        raise ValueError(
            "logits_fn writes to the Variables of an NNX module, which Flax refuses within another "
            "program: it is in training mode, or calls nnx.jit with the module; pass the module in "
            "evaluation mode itself, or lambda x: model(x)"
        ) from error


def _check_logits(examples: int, logits: Any) -> None:
    wanted = "logits_fn must return logits [batch, classes], floats for two or more classes"
    if not isinstance(logits, jax.Array):
        kind = type(logits).__name__
        raise ValueError(f"{wanted}; got a {kind}: pass a function that returns the logits alone")
    if logits.shape in ((examples,), (examples, 1)):
        join = "stack" if logits.ndim == 1 else "concatenate"
        raise ValueError(
            f"{wanted}; got one for each image, shape {logits.shape}: for a sigmoid network return "
            f"the two logits [0, z], jnp.{join}([jnp.zeros_like(z), z], axis=1)"
        )
    if logits.ndim != 2 or logits.shape[0] != examples:
        raise ValueError(f"{wanted}; got shape {logits.shape} for {examples} images")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"{wanted}; got dtype {logits.dtype}")


def _is_ours(loss: Callable[..., Any]) -> bool:
    """Whether a loss is a function of `agr_jax.losses`, which closes over nothing."""
    return getattr(losses, getattr(loss, "__name__", ""), None) is loss


def _traced_loss(
    attack: Any, logits: jax.ShapeDtypeStruct, others: list[Any], gradient: bool
) -> tracing.Traced:
    shape = logits.shape[:1]

    def check(values: Any) -> None:
        if isinstance(values, jax.Array) and values.shape == shape:
            return
        got = values.shape if isinstance(values, jax.Array) else type(values).__name__
        hint = ": leave out its mean or sum" if got == () else ""
        raise ValueError(
            f"{type(attack).__name__}.loss must return one value for each image, shape {shape}, "
            f"got {got}{hint}"
        )

    return tracing.trace(attack.loss, logits, *others, check=check, gradient=gradient)


def _is_tracing() -> bool:
    """Whether this is part of a program that is being traced by `jit` or the like."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)


def taken_apart(attack: Any, loss: Any = None) -> tuple[Any, dict[str, Any]]:
    """What an attack's program is made for, and what it takes as arguments.

    The radius and the step size of `PGD` are arguments, so that another one compiles nothing.
    """
    fixed, varying = copy.copy(attack), {}
    if type(attack.threat) in (Linf, L2, L1):
        varying["epsilon"] = attack.threat.epsilon
        _set(fixed, "threat", _with(attack.threat, epsilon=0.0))
    if getattr(attack, "step_size", None) is not None:
        varying["step_size"] = attack.step_size
        _set(fixed, "step_size", 0.0)
    if isinstance(loss, tracing.Traced):
        varying["loss"] = loss
        _set(fixed, "loss", None)
    return fixed, varying


def put_together(fixed: Any, varying: dict[str, Any]) -> Any:
    """The attack that was taken apart."""
    attack, rest = copy.copy(fixed), dict(varying)
    if "epsilon" in rest:
        _set(attack, "threat", _with(fixed.threat, epsilon=rest.pop("epsilon")))
    return _with(attack, **rest)


def _with(settings: Any, **values: Any) -> Any:
    """A copy with other values, which are not checked: they may be arguments of a program."""
    changed = copy.copy(settings)
    for name, value in values.items():
        _set(changed, name, value)
    return changed


def _set(settings: Any, name: str, value: Any) -> None:
    object.__setattr__(settings, name, value)  # of a frozen dataclass


def _directly(
    function: Callable[..., Any], fixed: Any, varying: dict[str, Any], *arguments: Any
) -> Any:
    return function(put_together(fixed, varying), *arguments)


_nested = jax.jit(_directly, static_argnames=("function", "fixed"))


def compiled_for(program: tracing.Program) -> Callable[..., Callable[..., Any]]:
    """How programs with this network are compiled: makes them from a function and its constants.

    On a CPU, convolutions of float32 in the fast form are faster without XLA's default library for
    them (jax 0.10 to 0.12); those of float64 are slower.
    """
    return functools.partial(_jit, leave_out_library=program.float32_convolutions)


@functools.cache
def _jit(
    function: Callable[..., Any], constants: tuple[str, ...], *, leave_out_library: bool
) -> Callable[..., Any]:
    options = _without_library() if leave_out_library else None
    return jax.jit(function, static_argnames=constants, compiler_options=options)


@functools.cache
def _without_library() -> dict[str, str] | None:
    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:  # another version, without this option
        return None
    return options


def _warn_of_batch(network: tracing.Traced, images: jax.Array) -> None:
    """Warns of a network in training mode; looked at once for each program."""
    program = network.program
    if program not in _batch_messages:
        difference = batch_dependence(network, images)
        if difference is None:
            logits = logits_of(network, images)
            if bool((logits != logits[:1]).any()):  # else, as before training, nothing can be seen
                _batch_messages[program] = ""
            return
        _batch_messages[program] = batch_message(difference)
    if _batch_messages[program]:
        warn(_batch_messages[program])


# Empty for those that do not depend on the batch.
_batch_messages: weakref.WeakKeyDictionary[tracing.Program, str] = weakref.WeakKeyDictionary()
