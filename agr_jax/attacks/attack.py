"""What all attacks share: how they are called, their loop, and what one unit of them finds.

A call goes through `run`. Outside of `jit` the network is traced (`agr_jax.attacks.tracing`), so
that it is what it computes now, and the attack's program is found by what it computes: the network,
the shapes, and the attack but for its radius, its step size and the arrays of its loss, which are
arguments. Within the caller's own `jit` the attack becomes a part of that program.
"""

from __future__ import annotations

import abc
import copy
import functools
import inspect
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from agr_jax import losses
from agr_jax.attacks import tracing
from agr_jax.threat import L1, L2, Linf, covers_the_box, expand, flatten, image_keys

LogitsFn = Callable[..., jax.Array]
LossFn = Callable[..., jax.Array]
Attack = Callable[[LogitsFn, jax.Array, jax.Array, jax.Array], jax.Array]


class Blind(NamedTuple):
    """Where an attack could not see which way the loss rises, from where it started.

    Attributes:
        zero_gradient: booleans `[batch]`: no entry of the gradient differs from 0.
        nan_gradient: booleans `[batch]`: an entry is NaN.
    """

    zero_gradient: jax.Array
    nan_gradient: jax.Array

    @classmethod
    def of(cls, gradient: jax.Array) -> Blind:
        """Looks at a batch of gradients."""
        flat = flatten(gradient)
        return cls(~jnp.any(flat != 0, axis=1), jnp.any(jnp.isnan(flat), axis=1))

    def or_first(self, index: jax.Array, gradient: jax.Array) -> Blind:
        """That of the gradient if it is the first of a loop, with index 0; else as before."""
        blind: Blind = lax.cond(index == 0, Blind.of, lambda _: self, gradient)
        return blind

    @classmethod
    def nowhere(cls, labels: jax.Array) -> Blind:
        """All false."""
        return cls(jnp.zeros_like(labels, bool), jnp.zeros_like(labels, bool))

    def both(self, other: Blind) -> Blind:
        """Of two runs: no gradient in either, NaN in any."""
        return Blind(
            self.zero_gradient & other.zero_gradient, self.nan_gradient | other.nan_gradient
        )


class Outcome(NamedTuple):
    """What one restart, or one target class, of an attack found.

    Attributes:
        points: `[batch, ...]`, in the ball and the box: misclassified where `fooled`, elsewhere
            the best point that the attack met.
        fooled: booleans `[batch]`.
        blind: where the loss had no gradient, or a NaN one, at the start.
    """

    points: jax.Array
    fooled: jax.Array
    blind: Blind


class EvaluationWarning(UserWarning):
    """Something that makes a robust accuracy unreliable."""


class GradientAttack(abc.ABC):
    """An attack that follows the gradient of a loss, and says where there was none."""

    def __call__(
        self, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> jax.Array:
        """Returns adversarial images, of the shape and dtype of `images`, in the ball and the box.

        Args:
            logits_fn: any callable that maps images `[batch, ...]` to logits `[batch, classes]`, in
                evaluation mode; where the attack has `draws`, it takes a key too. It is traced at
                each call: what it closes over, such as weights, is used as it is now.
            images: float32 or float64 in [0, 1].
            labels: `[batch]` integers, the classes to leave, or, if targeted, to reach.
            key: one JAX key, or one per image; not used by attacks that draw nothing.

        Raises:
            ValueError: if images, labels or key have the wrong dtype, shape or range, or logits or
                losses the wrong shape.

        Warns:
            EvaluationWarning: outside of `jit`: of images whose gradient, or SPSA's estimate of it,
                is zero or NaN at the start, of a network that depends on the batch, of a radius as
                large as the box.
        """
        adversarial, blind = self.look(logits_fn, images, labels, key)
        warn_of_blind(self, blind)
        return adversarial

    @abc.abstractmethod
    def look(
        self, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Blind]:
        """What a call returns, and at which images the attack was blind, without a warning."""


class Step(Protocol):
    """What an attack repeats: a pytree whose leaves have one row for each image.

    Its state is such a pytree too. The network comes apart from both: it has no rows.
    """

    def __call__(self, logits_fn: LogitsFn, state: Any, index: jax.Array) -> Any:
        """The next state, of the same structure."""
        ...


Loop = Callable[..., Any]


def loop_on_device(
    step: Step,
    logits_fn: LogitsFn,
    state: Any,
    count: int,
    finished: Callable[[Any], jax.Array] | None = None,
) -> Any:
    """`state = step(logits_fn, state, index)` for each index below `count`, or until finished.

    One `lax.while_loop`: nothing on the host, also within `jit`.
    """

    def unfinished(carry: tuple[jax.Array, Any]) -> jax.Array:
        index, state = carry
        return (index < count) if finished is None else (index < count) & ~finished(state)

    def one(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        index, state = carry
        return index + 1, step(logits_fn, state, index)

    return lax.while_loop(unfinished, one, (jnp.int32(0), state))[1]


# ---- calling an attack

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


# ---- what is looked at before


def warn(message: str) -> None:
    """Shows a message where the attack or the evaluation was asked for."""
    warnings.warn(message, EvaluationWarning, stacklevel=_outside())


def _outside() -> int:
    """The level of the first frame that is not of this package."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").startswith("agr_jax"):
        frame, level = frame.f_back, level + 1
    return level - 1


def warn_of_radius(threat: Any, images: jax.Array | np.ndarray) -> None:
    """Warns where the ball holds every image."""
    if covers_the_box(threat, math.prod(images.shape[1:])):
        warn(
            f"{type(threat).__name__}.epsilon of {threat.epsilon:g} covers the whole box [0, 1]: "
            f"a radius in pixels is divided by 255, {threat.epsilon:g} / 255"
        )


def warn_of_blind(attack: Any, blind: Blind) -> None:
    """Warns of images at which the attack could not see which way the loss rises."""
    if isinstance(blind.zero_gradient, jax.core.Tracer):
        return
    zero, nan = int(blind.zero_gradient.sum()), int(blind.nan_gradient.sum())
    found = [f"zero for {zero}"] * (zero > 0) + [f"NaN for {nan}"] * (nan > 0)
    if found:
        warn(
            f"{type(attack).__name__}: the gradient of the loss is {' and '.join(found)} of "
            f"{blind.zero_gradient.size} images where it starts: the attack is blind there, which "
            "says nothing of the network's robustness; look for a stopped gradient, quantised or "
            "saturated activations, and compare with `square`"
        )


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
# Distance between normalised logits above which two evaluations count as different.
SAME_LOGITS = 1e-4


def batch_message(difference: float) -> str:
    """What an image's logits that depend on its batch mean."""
    return (
        "the logits of an image depend on the other images of its batch, or on its place among "
        f"them (they move by {difference:.2g} of their norm): pass the network in evaluation mode, "
        "with BatchNorm's running statistics (train=False, use_running_average=True) and without "
        "dropout"
    )


def batch_dependence(network: LogitsFn, images: jax.Array) -> float | None:
    """How far logits move with the rest of the batch or the place in it; `None` if they do not.

    Args:
        network: a pytree callable.
        images: a batch; nothing is found of a single image.
    """
    if images.shape[0] < 2:
        return None
    kept = images.shape[0] // 2
    logits = logits_of(network, images)
    others = jnp.concatenate([images[:kept], 1 - images[kept:]])
    moved = [
        logits_difference(logits[:kept], logits_of(network, others)[:kept]),
        logits_difference(jnp.roll(logits, 1, 0), logits_of(network, jnp.roll(images, 1, 0))),
    ]
    return max(moved) if max(moved) > SAME_LOGITS else None


def logits_difference(logits: jax.Array, others: jax.Array) -> float:
    """Largest distance between an image's two logit vectors, each scaled to length 1."""

    def unit(rows: jax.Array) -> jax.Array:
        return rows / (jnp.linalg.norm(rows, axis=1, keepdims=True) + 1e-10)

    return float(jnp.linalg.norm(unit(logits) - unit(others), axis=1).max())


@jax.jit
def logits_of(network: LogitsFn, images: jax.Array) -> jax.Array:
    """The logits of a pytree callable, compiled."""
    return network(images)


def check_inputs(images: jax.Array, labels: jax.Array) -> None:
    """Refuses images and labels that no attack can mean.

    Values are looked at only outside `jit`, where they are known.

    Args:
        images: see any attack.
        labels: see any attack.

    Raises:
        ValueError: no images, images not float32 or float64 or outside [0, 1], labels not integers
            or not one per image.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images must be floats in [0, 1], got dtype {images.dtype}; divide pixels by 255"
        )
    if jnp.finfo(images.dtype).bits < 32:
        raise ValueError(
            f"images must be float32 or float64, got {images.dtype}, whose rounding leaves the "
            "ball; cast them, images.astype(jnp.float32), and let the network cast what it gets"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels must be integers of shape {images.shape[:1]}, "
            f"got {labels.dtype} of shape {labels.shape}"
        )
    if not labels.size:
        raise ValueError("there are no images to attack")
    if isinstance(images, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():  # images may be constants of a program that is traced
        low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):  # also true of NaN
        raise ValueError(f"images must lie in [0, 1], got values from {low} to {high}")


def check_labels(labels: jax.Array | np.ndarray, num_classes: int) -> None:
    """Refuses labels that are no class, where their values are known.

    Raises:
        ValueError: naming the range found.
    """
    if isinstance(labels, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():
        low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels must lie in [0, {num_classes}), the network's classes, got {low} to {high}"
        )


def as_array(value: Any) -> Any:
    """A list or a NumPy array as JAX's."""
    return value if isinstance(value, jax.Array) else jnp.asarray(value)


def misclassified(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Where the prediction is not the label, `[batch]`; NaN logits are no prediction."""
    return (jnp.argmax(logits, axis=1) != labels) & ~jnp.isnan(logits).any(axis=1)


def surely_misclassified(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Where the prediction is wrong by more than another order of a sum may change, `[batch]`.

    For attacks that seek the boundary itself: another program that computes the same network may
    see a point that is closer on its other side. A tie that is no matter of rounding counts.
    """
    margin = losses.margin(logits, labels)
    rounding = 2 * jnp.finfo(logits.dtype).eps * jnp.abs(logits).max(-1)
    return misclassified(logits, labels) & ((margin == 0) | (margin > rounding))


def climbed(loss: LossFn) -> LossFn:
    """What an attack that is given a loss climbs: for the cross-entropy, its log odds.

    Both rise together and point the same way, but the log odds do not saturate.
    """
    return losses.log_odds if loss is losses.cross_entropy else loss


def mean_over_draws(
    evaluate: Callable[[jax.Array], tuple[jax.Array, Any, jax.Array]],
    keys: jax.Array,
    *,
    of_log_odds: bool,
) -> tuple[Any, jax.Array]:
    """Mean gradient of a randomised network's draws, and the rest of the last one's results.

    Args:
        evaluate: from a key to what was climbed, `[batch]`, anything, and the gradient.
        keys: one for each draw.
        of_log_odds: what was climbed is log odds, but the mean of the cross-entropy is meant, whose
            gradient is `sigmoid(log odds)` times theirs: up to a factor for each image, which keeps
            the sum away from 0.
    """

    def weighted(key: jax.Array) -> tuple[jax.Array, Any, jax.Array]:
        climbed, rest, gradient = evaluate(key)
        weight = jax.nn.log_sigmoid(climbed) if of_log_odds else jnp.zeros_like(climbed)
        return weight, rest, gradient

    def add(carry: Any, key: jax.Array) -> tuple[Any, None]:
        largest, _, summed = carry
        weight, rest, gradient = weighted(key)
        larger = jnp.maximum(largest, weight)
        summed = expand(jnp.exp(largest - larger), summed) * summed
        return (larger, rest, summed + expand(jnp.exp(weight - larger), summed) * gradient), None

    (_, rest, summed), _ = lax.scan(add, weighted(keys[0]), keys[1:])
    return rest, summed / len(keys)


def differing(value: jax.Array, like: jax.Array) -> jax.Array:
    """The value, as one that differs between devices where `like` does; both of one shape.

    Within `shard_map` a loop must begin with what differs where its results do, and constants are
    the same on all devices. The compiler takes the choice between equals away.
    """
    return jnp.where(like == like, value, value)  # noqa: PLR0124


def likeliest_wrong_class(logits: jax.Array, labels: jax.Array, rank: jax.Array | int) -> jax.Array:
    """The class with the `rank`-th largest logit (from 0) beside the label, `[batch]`.

    `rank` is one number, or one for each image.
    """
    num_classes = logits.shape[1]
    is_label = jax.nn.one_hot(labels, num_classes, dtype=bool)
    by_logit = jnp.argsort(jnp.where(is_label, jnp.inf, logits), axis=1)
    position = num_classes - 2 - jnp.broadcast_to(rank, labels.shape)
    # A sum, not an index, which would gather from all devices.
    return jnp.where(jax.nn.one_hot(position, num_classes, dtype=bool), by_logit, 0).sum(1)
