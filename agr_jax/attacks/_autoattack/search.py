"""One batch of runs of one attack: searched on the devices, then judged from outside."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from agr_jax import sharding
from agr_jax.attacks import _calling as calling
from agr_jax.attacks._autoattack import packing
from agr_jax.attacks._autoattack.members import Member
from agr_jax.attacks._autoattack.placed import Placed, stream_of
from agr_jax.attacks._autoattack.verdicts import judge
from agr_jax.attacks._tracing import Traced
from agr_jax.journal import BatchRecord
from agr_jax.sharding import REPLICATED, SHARDED, per_device
from agr_jax.threat import is_allowed


def attack_batch(placed: Placed, name: str, member: Member, batch: packing.Batch) -> BatchRecord:
    """Runs an attack on a batch, and looks at what it found.

    A point counts if it lies inside the ball and the box and the network misclassifies it there.
    """
    started = time.perf_counter()
    rows = batch.rows
    images, labels, keys = placed.batch(rows, batch.shape, stream_of(name))
    if member.stages:
        arguments = images, labels, keys
        points = _search_in_stages(placed, name, member, batch, arguments)
        blind = np.zeros(len(rows), bool)
    else:
        network = placed.network_of_device(batch.shape)
        units = placed.split(placed.filled(batch.units, batch.shape))
        fixed, varying = calling.taken_apart(member)
        program = calling.compiled_for(network.program)(run_unit, ("mesh", "fixed"))
        outcome = program(placed.per_device, fixed, varying, network, images, labels, keys, units)
        points = outcome.points
        blind = sharding.get(jnp.logical_or(*outcome.blind))[: len(rows)]
    key = jax.random.fold_in(placed.key_of_batch(rows, stream_of(name)), 1)
    network = placed.network(batch.shape)
    _, right, guesses = judge(placed.draws, network, points, labels, key)
    allowed = is_allowed(member.threat, images, points)
    guesses, fooled, points = (
        part[: len(rows)] for part in sharding.get((guesses, ~right & allowed, points))
    )
    # The first run that fools an image counts, as if the others had not been made.
    needed = packing.until_fooled(rows, fooled)
    fooled, blind = fooled & needed, blind & needed
    return BatchRecord(
        rows=rows,
        fooled=fooled,
        predictions=guesses,
        zero_gradients=np.asarray(blind.sum()),
        seconds=np.asarray(time.perf_counter() - started),
        points=points[fooled],
    )


def _search_in_stages(
    placed: Placed, name: str, member: Member, batch: packing.Batch, arguments: tuple[Any, ...]
) -> Any:
    """All queries; between stages, images that are fooled leave, and the others close up."""
    rows, shape = batch.rows, batch.shape
    fixed, varying = calling.taken_apart(member)
    compiled = calling.compiled_for(placed.network(shape).program)
    begin = compiled(begin_search, ("fixed",))
    advance = compiled(advance_search, ("mesh", "fixed"))
    state = begin(fixed, varying, placed.network(shape), *arguments)
    points: Any = np.array(sharding.get(state.points))
    left = np.arange(len(rows))
    done = 0
    for until in member.stages:
        network = placed.network_of_device(shape)
        bounds = jnp.int32(done), jnp.int32(until)
        state = advance(placed.per_device, fixed, varying, network, *arguments, state, *bounds)
        done = until
        found = sharding.get((state.points, state.fooled))
        points[left] = found[0][: len(left)]
        is_open = ~found[1][: len(left)]
        kept = np.flatnonzero(is_open)
        left = left[kept]
        if not len(left):
            break
        smaller = min(other for other in placed.shapes if other >= len(left))
        if smaller < shape:
            shape = smaller
            state = _reordered(placed, state, placed.filled(kept, shape))
            arguments = placed.batch(rows[left], shape, stream_of(name))
        elif len(kept) < len(is_open):
            # The batch keeps its shape: those that are fooled stay, untouched, at its end.
            order = np.concatenate([kept, np.flatnonzero(~is_open)])
            order = np.concatenate([order, np.arange(len(order), placed.rows_of(shape))])
            state = _reordered(placed, state, order)
            arguments = tuple(part[order] for part in arguments)
    return placed.split(points)


def _reordered(placed: Placed, state: Any, order: np.ndarray) -> Any:
    """A state's rows in another order, or fewer of them, on the devices again."""
    return placed.split(jax.tree.map(lambda part: part[order], sharding.get(state)))


def run_unit(
    mesh: Mesh | None,
    fixed: Any,
    varying: dict[str, Any],
    network: Traced,
    images: jax.Array,
    labels: jax.Array,
    keys: jax.Array,
    index: jax.Array,
) -> Any:
    """`unit` of the attack that was taken apart, on each device for its own rows."""

    def unit(varying: dict[str, Any], *arguments: Any) -> Any:
        return calling.put_together(fixed, varying).unit(*arguments)

    split = (REPLICATED, REPLICATED, *[SHARDED] * 4)
    return per_device(unit, mesh, split)(varying, network, images, labels, keys, index)


def begin_search(
    fixed: Any,
    varying: dict[str, Any],
    network: Traced,
    images: jax.Array,
    labels: jax.Array,
    keys: jax.Array,
) -> Any:
    """`begin` of the attack that was taken apart."""
    return calling.put_together(fixed, varying).begin(network, images, labels, keys)


def advance_search(
    mesh: Mesh | None,
    fixed: Any,
    varying: dict[str, Any],
    network: Traced,
    images: jax.Array,
    labels: jax.Array,
    keys: jax.Array,
    state: Any,
    first: jax.Array,
    last: jax.Array,
) -> Any:
    """`advance` of the attack that was taken apart, on each device for its own rows."""

    def advance(varying: dict[str, Any], *arguments: Any) -> Any:
        return calling.put_together(fixed, varying).advance(*arguments)

    split = (REPLICATED, REPLICATED, *[SHARDED] * 4, REPLICATED, REPLICATED)
    return per_device(advance, mesh, split)(
        varying, network, images, labels, keys, state, first, last
    )
