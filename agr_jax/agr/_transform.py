"""Adaptive Gradient Reconstruction (AGR) as an optax gradient transformation.

Adversarial training has two gradients for every parameter leaf: the clean one, `g_c`, and the
adversarial one, `g_a`. AGR combines them by their cosine. Where they conflict (cosine < 0) it
removes from `g_a` the part along `g_c` (gradient orthogonal projection, GOP); where they agree it
interpolates between them by the cosine itself (GICS); then it clips what it changed.

Example:
    >>> import jax.numpy as jnp
    >>> from agr_jax import agr_transform
    >>> transform = agr_transform(clip="none")
    >>> params = {"w": jnp.zeros(2)}
    >>> clean, adversarial = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([-1.0, 1.0])}
    >>> updates, _ = transform.update(
    ...     adversarial, transform.init(params), params, clean_grads=clean
    ... )
    >>> updates["w"].tolist()  # the part of g_a that opposes g_c is gone
    [0.0, 1.0]

Source: "Balancing Generalization and Robustness in Adversarial Training via Steering through Clean
and Adversarial Gradient Directions", ACM MM 2024, section 3.4 and algorithm 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agr_jax.agr._rule import Clip, CombinationRule, Granularity, Interpolation

PyTree = Any


class GradientPair(NamedTuple):
    """A clean and an adversarial gradient tree of the same structure.

    Attributes:
        clean: gradient of the clean loss, a tree with the structure of the parameters.
        adversarial: gradient of the adversarial loss, the same structure.
    """

    clean: PyTree
    adversarial: PyTree


class AGRState(NamedTuple):
    """State of `agr_transform`: the step, and what the last update measured.

    The diagnostics are float32 vectors with one entry per leaf, in the order of `leaf_names`
    (with `granularity="global"` every entry is that of the whole tree), and NaN where no clean
    gradient was given (infinity under `jax_debug_nans`, which lets no NaN out of `jit`). Read one
    from a whole optimiser state with `optax.tree.get(opt_state, "cosine")`.

    Attributes:
        step: int32 scalar, the number of updates made.
        cosine: cosine between the clean and the adversarial gradient; 0 if either is zero.
        projected: 1 where GOP acted, else 0.
        clean_norm: Euclidean norm of the clean gradient.
        adversarial_norm: Euclidean norm of the adversarial gradient.
    """

    step: jax.Array
    cosine: jax.Array
    projected: jax.Array
    clean_norm: jax.Array
    adversarial_norm: jax.Array


MEASURED = tuple(name for name in AGRState._fields if name != "step")
"""Fields of `AGRState` that hold one number for each leaf."""


def agr_transform(
    *,
    gop_start: int | None = 0,
    gics_start: int | None = 0,
    interpolation: Interpolation = "cosine",
    interpolate_negative: bool = False,
    clip_norm: float | None = 0.1,
    clip: Clip = "changed",
    clip_start: int | None = None,
    granularity: Granularity = "leaf",
) -> optax.GradientTransformationExtraArgs:
    """Combines a clean and an adversarial gradient, leaf by leaf, as AGR does.

    Put it first in an `optax.chain`; weight decay and momentum act on its result. The update takes
    both gradients in one of two forms, and returns plain updates with the structure of `params`:
    `update(GradientPair(clean=..., adversarial=...), state, params)`, or
    `update(adversarial, state, params, clean_grads=clean)`.

    What happens to a leaf:

    ============  =================  ==========================================  ============
    cosine        active part        result before the clip                      branch
    ============  =================  ==========================================  ============
    < 0           GOP                g_a - (<g_a,g_c> / <g_c,g_c>) g_c           projected
    < 0           not GOP            g_a (interpolated with a mean or a tau if   plain /
                                     `interpolate_negative`)                     interpolated
    >= 0          interpolation      w g_c + (1 - w) g_a                         interpolated
    >= 0          not interpolation  g_a                                         plain
    ============  =================  ==========================================  ============

    Edge cases, per leaf, with both parts active and before the clip:

    =====================================  ====================================================
    leaf                                   result
    =====================================  ====================================================
    g_c = 0                                g_a with GICS (the cosine counts as 0; no NaN);
                                           tau g_a with a fixed tau
    g_a = 0                                0 with GICS; (1 - tau) g_c with a fixed tau
    both 0                                 0
    parallel, g_a = k g_c, k > 0           g_c with GICS (the cosine is 1)
    anti-parallel, g_a = -k g_c            0, up to the rounding of g_a
    scalar, signs differ                   0; equal signs: g_c with GICS
    empty                                  empty; cosine 0
    NaN or infinity in either gradient     NaN in the whole leaf, so that a later
                                           `optax.apply_if_finite` sees it
    the same, neither part active          g_a as it is
    norms with a product near 1e-20        as with a cosine towards 0: the published code's guard,
                                           |g_c| |g_a| + 1e-20, is part of the cosine
    =====================================  ====================================================

    With both parts active, and before momentum and weight decay, every leaf of the result `G`
    satisfies `<G, g_c> >= 0` and `<G, g_a> >= 0` up to rounding: to first order one step raises
    neither loss (Theorem 4.1).

    Reductions are float32 (float64 for float64 gradients) and scaled against under- and overflow.
    Under `pmap`, and `shard_map` with `check_vma=False`, average *both* gradients over the devices
    first: the combination is not linear. By default `shard_map` has summed the gradients of
    replicated parameters already: there, average the loss inside `loss_fn`.

    .. warning::
        `optax.MultiSteps` and `optax.apply_if_finite` around a chain that takes `clean_grads=`
        see only the adversarial gradient: the first would use the clean gradient of the last
        micro-batch, the second would let a NaN in the clean gradient through. Wrap the chain with
        `from_gradient_pair` for `MultiSteps`, and put `apply_if_finite` after AGR, as also
        `optax.contrib.mechanize`, which around AGR would tune itself on the adversarial gradient.

    With `clean_grads=`, `optax.masked` and `optax.partition` need
    `mask_compatible_extra_args=True`; without it they raise an error. A keyword that AGR does not
    know, such as a misspelt `clean_grads`, is ignored, as optax wants it: the diagnostics are NaN.

    The numbers among the arguments may be schedules inside
    `optax.inject_hyperparams(agr_transform)(clip_norm=schedule)`. A clip norm that becomes negative
    there makes the clipped leaves NaN. Complex parameters need
    `optax.contrib.split_real_and_imaginary` and a `GradientPair`.

    Args:
        gop_start: step (counted from 0) from which GOP acts; `None` for never.
        gics_start: step from which the interpolation acts; `None` for never.
        interpolation: `"cosine"` (w is the cosine), `"mean"` (w = 1/2), or tau in [0, 1], the share
            of the adversarial gradient (w = 1 - tau).
        interpolate_negative: with a mean or a tau, interpolate also leaves of negative cosine while
            GOP does not act on them.
        clip_norm: C, the largest Euclidean norm of a clipped leaf; positive. `None` only with
            `clip="none"`.
        clip: which leaves are clipped: `"changed"` (projected and interpolated ones),
            `"interpolated"`, `"all"` or `"none"`.
        clip_start: step from which leaves are clipped; by default the earlier of the two starts.
        granularity: `"leaf"`, or `"global"` to treat the whole tree as one leaf.

    Returns:
        A transformation. With `clean_grads=None` it leaves the adversarial gradient as it is (but
        for `clip="all"`), advances the step and records NaN diagnostics.

    Raises:
        ValueError: if an argument is out of range or a schedule, or the two gradients differ in
            structure.
        TypeError: from `init` and `update`, if a leaf is complex.
    """
    rule = CombinationRule(
        gop_start=gop_start,
        gics_start=gics_start,
        interpolation=interpolation,
        interpolate_negative=interpolate_negative,
        clip_norm=clip_norm,
        clip=clip,
        clip_start=clip_start,
        granularity=granularity,
    )

    def init(params: PyTree) -> AGRState:
        if isinstance(params, GradientPair):
            params = params.adversarial
        _check_real(params)
        return AGRState(jnp.zeros([], jnp.int32), *_unknown(len(jax.tree.leaves(params))))

    def update(
        updates: PyTree,
        state: AGRState,
        params: PyTree | None = None,
        *,
        clean_grads: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, AGRState]:
        del params, extra_args
        if isinstance(updates, GradientPair):
            if clean_grads is not None:
                raise ValueError(
                    "agr_transform got a GradientPair and clean_grads: give the clean gradient once"
                )
            clean_grads, updates = updates
        _check_real(updates)
        adversarial, structure = jax.tree.flatten(updates)
        next_step = optax.safe_increment(state.step)

        if clean_grads is None:
            flat = rule.clip_only(adversarial, state.step)
            next_state = AGRState(next_step, *_unknown(len(adversarial)))
        else:
            _check_pair(updates, clean_grads)
            _check_real(clean_grads)
            flat, measured = rule.combine(adversarial, jax.tree.leaves(clean_grads), state.step)
            # One entry for each leaf of a group, so that both granularities share one state.
            vectors = (jnp.broadcast_to(m.astype(jnp.float32), len(adversarial)) for m in measured)
            next_state = AGRState(next_step, *vectors)
        return jax.tree.unflatten(structure, flat), next_state

    return optax.GradientTransformationExtraArgs(init, update)


def from_gradient_pair(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Wraps a chain that contains AGR so that a `GradientPair` is what flows in.

    Wrappers that know nothing of extra arguments then handle both gradients:
    `flax.training.train_state.TrainState`, `optax.lookahead`, and `optax.MultiSteps`, which
    averages both over the micro-batches:

        optimizer = optax.MultiSteps(from_gradient_pair(optax.chain(agr_transform(), ...)), 4)
        state = optimizer.init(GradientPair(params, params))
        updates, state = optimizer.update(GradientPair(clean, adversarial), state, params)
        params = optax.apply_updates(params, updates)

    Args:
        transformation: a whole chain, with `agr_transform` (or a wrapper that forwards
            `clean_grads` to one) in it.

    Returns:
        A transformation whose `update` takes a `GradientPair`, and whose `init` takes the
        parameters or, as `MultiSteps` wants it, a pair of them.

    Raises:
        TypeError: if the update of the transformation takes no `clean_grads`, so that the clean
            gradient would be lost; and from `update`, if what flows in is not a `GradientPair`.
    """
    inner = transformation
    if not isinstance(inner, optax.GradientTransformationExtraArgs):
        raise TypeError(
            f"{type(inner).__name__} takes no clean gradient and would drop it: {_INSIDE}"
        )
    if not _takes_clean_grads(inner.update):
        name = getattr(inner.update, "__qualname__", repr(inner.update)).partition(".")[0]
        raise TypeError(f"{name} takes no clean gradient, its update no clean_grads: {_INSIDE}")

    def init(params: PyTree) -> optax.OptState:
        return inner.init(params.adversarial if isinstance(params, GradientPair) else params)

    def update(
        updates: PyTree, state: optax.OptState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, optax.OptState]:
        if not isinstance(updates, GradientPair):
            raise TypeError(
                "from_gradient_pair takes a GradientPair(clean=..., adversarial=...), got "
                f"{type(updates).__name__}"
            )
        if isinstance(params, GradientPair):
            params = params.adversarial
        return inner.update(
            updates.adversarial, state, params, clean_grads=updates.clean, **extra_args
        )

    return optax.GradientTransformationExtraArgs(init, update)


def clean_and_adversarial_grads(
    loss_fn: Callable[..., Any],
    params: PyTree,
    clean: PyTree,
    adversarial: PyTree,
    *,
    aux: PyTree | None = None,
) -> Any:
    """Takes the gradient of one loss at clean and at adversarial inputs.

    The clean backward pass ends before the adversarial pass begins, so that accelerators keep one
    set of activations at a time.

    Args:
        loss_fn: `loss_fn(params, batch) -> loss`; with `aux` given,
            `loss_fn(params, batch, aux) -> (loss, next aux)`.
        params: tree of parameters.
        clean: what `loss_fn` takes as the clean batch.
        adversarial: what it takes as the adversarial batch.
        aux: state such as BatchNorm statistics, threaded through the clean pass first and then,
            as that left it, through the adversarial pass.

    Returns:
        `(pair, (clean loss, adversarial loss))`, and with `aux` also the final aux.

    Example:
        >>> import jax.numpy as jnp
        >>> pair, losses = clean_and_adversarial_grads(
        ...     lambda w, x: jnp.sum(w * x), jnp.ones(2), jnp.array([1.0, 2.0]), jnp.zeros(2)
        ... )
        >>> pair.clean.tolist(), pair.adversarial.tolist()
        ([1.0, 2.0], [0.0, 0.0])
    """
    if aux is None:
        loss_and_grad = jax.value_and_grad(loss_fn)
        clean_loss, clean_grads = loss_and_grad(params, clean)
        # Not with the batch: a barrier takes what is the same on all devices of a `shard_map` for
        # different where one of its arguments is.
        clean_grads, params = jax.lax.optimization_barrier((clean_grads, params))
        adversarial_loss, adversarial_grads = loss_and_grad(params, adversarial)
        return GradientPair(clean_grads, adversarial_grads), (clean_loss, adversarial_loss)
    loss_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    (clean_loss, aux), clean_grads = loss_and_grad(params, clean, aux)
    clean_grads, params = jax.lax.optimization_barrier((clean_grads, params))
    (adversarial_loss, aux), adversarial_grads = loss_and_grad(params, adversarial, aux)
    return GradientPair(clean_grads, adversarial_grads), (clean_loss, adversarial_loss), aux


def leaf_names(params: PyTree) -> tuple[str, ...]:
    """Names the leaves of a tree, in the order of the diagnostics in `AGRState`.

    Example:
        >>> leaf_names({"conv": {"kernel": 0.0, "bias": 0.0}})
        ('conv/bias', 'conv/kernel')
    """
    paths = [path for path, _ in jax.tree.leaves_with_path(params)]
    return tuple(jax.tree_util.keystr(path, simple=True, separator="/") for path in paths)


_INSIDE = (
    "put from_gradient_pair around the chain with AGR, and the other wrapper around that "
    "(docs/optax.md has optax.contrib.sam)"
)


def _takes_clean_grads(update: Callable[..., Any]) -> bool:
    """Whether a call with `clean_grads=` is possible, as far as its signature says."""
    parameters = inspect.signature(update).parameters
    kinds = [parameter.kind for parameter in parameters.values()]
    return "clean_grads" in parameters or inspect.Parameter.VAR_KEYWORD in kinds


def _unknown(count: int) -> list[jax.Array]:
    # `jax_debug_nans` stops at every NaN that a program returns, whatever it means.
    debugged = jax.config.jax_debug_nans  # type: ignore[attr-defined]
    mark = jnp.inf if debugged else jnp.nan
    # Four arrays, not one four times: a state that is donated to a step may not share buffers.
    return [jnp.full([count], mark, jnp.float32) for _ in range(4)]


def _check_real(tree: PyTree) -> None:
    for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
        dtype = getattr(leaf, "dtype", type(leaf))
        if jax.dtypes.issubdtype(dtype, np.complexfloating):
            raise TypeError(
                f"agr_transform: leaf {name!r} is complex ({dtype}); put "
                "optax.contrib.split_real_and_imaginary around the chain with agr_transform and "
                "give it a GradientPair"
            )


def _check_pair(adversarial: PyTree, clean: PyTree) -> None:
    a_structure: Any = jax.tree.structure(adversarial)
    c_structure: Any = jax.tree.structure(clean)
    if a_structure != c_structure:
        raise ValueError(
            "the clean and the adversarial gradient differ in structure: "
            f"clean {c_structure}, adversarial {a_structure}"
        )
    names = leaf_names(adversarial)
    leaves = zip(names, jax.tree.leaves(clean), jax.tree.leaves(adversarial), strict=True)
    for name, c, a in leaves:
        if jnp.shape(c) != jnp.shape(a):
            raise ValueError(
                f"leaf {name!r}: the clean gradient has shape {jnp.shape(c)}, "
                f"the adversarial one {jnp.shape(a)}"
            )
