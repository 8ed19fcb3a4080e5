"""One run of AutoAttack: what is left goes to the devices in batches, what is done to disk."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from agr_jax import mesh
from agr_jax.attacks import attack as calling
from agr_jax.attacks import autoattack_checks as checks
from agr_jax.attacks import packing
from agr_jax.attacks.apgd import APGD
from agr_jax.attacks.attack import LogitsFn, check_labels, traced_network, warn
from agr_jax.attacks.autoattack_result import AutoAttackResult
from agr_jax.attacks.fab import FAB
from agr_jax.attacks.journal import BatchRecord, Journal, digest
from agr_jax.attacks.square import Square, SquareState
from agr_jax.attacks.tracing import Traced
from agr_jax.metrics import Progress
from agr_jax.threat import L1, L2, Linf

if TYPE_CHECKING:
    from agr_jax.attacks.autoattack import AutoAttack

ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
# Relative excess over the radius that the rounding of sums can make.
_ROUNDING = 1e-5


class Run:
    """One evaluation: which images are left, and what was found."""

    def __init__(
        self,
        attack: AutoAttack,
        logits_fn: LogitsFn,
        images: np.ndarray,
        labels: np.ndarray,
        key: jax.Array,
        on: Mesh | None,
    ) -> None:
        self.attack, self.images, self.labels, self.on = attack, images, labels, on
        self.key = key
        # The draws of a randomised network are those of its whole batch.
        self.apart = None if attack.version == "rand" else on
        self.logits_fn = logits_fn
        self._networks: dict[int, Traced] = {}
        self._placed: dict[int, tuple[Any, Any]] = {}
        self.shapes = packing.batch_shapes(min(attack.batch_size, len(labels)), on)
        self.adversarial = images.copy()
        self.robust, self.predictions, self.num_classes = self._clean_predictions()
        self.zero_gradients: dict[str, int] = {}

    def evaluate(self, folder: Path | None, progress: bool) -> AutoAttackResult:
        """Runs the attacks in their order; see `AutoAttack.evaluate`."""
        messages = self._messages_before()
        for message in messages:
            warn(message)
        journal = Journal(folder, {} if folder is None else self._identity())
        robust_after = {"clean": self.robust.copy()}
        seconds: dict[str, float] = {}
        planned = {name: self.attack.make(name, self.num_classes) for name in self.attack.sequence}
        bar = _Bar(self, planned) if progress else None
        try:
            for name, one in planned.items():
                seconds[name] = 0.0
                units, done = one.units(self.num_classes), np.zeros_like(self.labels)
                while batch := packing.next_batch(self.robust, done, units, self.shapes):
                    record = journal.next(name, batch.rows)
                    if record is None:
                        record = self._attack(name, one, batch)
                        journal.add(name, record)
                    np.add.at(done, batch.rows, 1)
                    seconds[name] += float(record.seconds)
                    self._take(name, record)
                    if bar is not None:
                        bar.done(name, len(batch.rows), int((units - done)[self.robust].sum()))
                robust_after[name] = self.robust.copy()
        finally:
            if bar is not None:
                bar.close()
        after = {name: float(mask.mean()) for name, mask in robust_after.items()}
        found = checks.zero_gradients(self.zero_gradients), checks.square_improves(after)
        late = [message for message in found if message is not None]
        for message in late:
            warn(message)
        return AutoAttackResult(
            self.attack,
            robust_after,
            self.adversarial,
            self.predictions,
            seconds,
            tuple(messages + late),
            self._one_draw(),
        )

    def network(self, rows: int) -> Traced:
        """The network for batches of so many images, its arrays on the devices."""
        if rows not in self._networks:
            images = jax.ShapeDtypeStruct((rows, *self.images.shape[1:]), self.images.dtype)
            keys = (self.key,) if self.attack.version == "rand" else ()
            network = traced_network(self.logits_fn, images, *keys, gradient=self._gradient)
            self._networks[rows] = self._place(network)
        return self._networks[rows]

    @property
    def _gradient(self) -> bool:
        """Whether any attack differentiates the network."""
        return set(self.attack.sequence) != {"square"}

    def network_of_device(self, shape: int) -> Traced:
        """The network for the part of a batch that one device gets."""
        return self.network(shape if self.apart is None else shape // self.apart.size)

    def _place(self, network: Traced) -> Traced:
        if self.on is None:
            return network
        for array in jax.tree.leaves(network):  # one copy for all shapes
            if id(array) not in self._placed:
                self._placed[id(array)] = array, jax.device_put(array, mesh.replicated(self.on))
        return jax.tree.map(lambda array: self._placed[id(array)][1], network)

    def _clean_predictions(self) -> tuple[np.ndarray, np.ndarray, int]:
        all_logits, right, predictions = [], [], []
        for rows, shape in packing.pack(np.arange(len(self.labels)), self.shapes):
            images, labels, keys = self._put(rows, shape, "clean")
            found = _judge(self._draws, self.network(shape), images, labels, keys[0])
            logits, *judged = (np.asarray(part)[: len(rows)] for part in found)
            checks.check_finite(logits)
            all_logits.append(logits)
            right.append(judged[0])
            predictions.append(judged[1])
        logits = np.concatenate(all_logits)
        check_labels(self.labels, logits.shape[1])
        # Four digits tell networks apart, and survive another order of a sum.
        moments = np.abs(logits).mean(), logits.std(), logits[0].max(), logits[-1].max()
        self.clean_logits = [f"{moment:.4g}" for moment in moments]
        return np.concatenate(right), np.concatenate(predictions), logits.shape[1]

    @property
    def _draws(self) -> int:
        """Of a randomised network that a verdict takes; 0 for one that is not."""
        return self.attack.verdict_draws if self.attack.version == "rand" else 0

    def _one_draw(self) -> float | None:
        """Share of right predictions at the final points, over fresh draws."""
        if not self._draws:
            return None
        shares = []
        for rows, shape in packing.pack(np.arange(len(self.labels)), self.shapes):
            _, labels, keys = self._put(rows, shape, "clean")
            filled = np.concatenate([rows, np.repeat(rows[-1:], shape - len(rows))])
            points = jnp.asarray(self.adversarial[filled])
            key = jax.random.fold_in(keys[0], 2)
            share = _share_of_right(self._draws, self.network(shape), points, labels, key)
            shares.append(np.asarray(share)[: len(rows)])
        return float(np.concatenate(shares).mean())

    def _messages_before(self) -> list[str]:
        rows, shape = next(packing.pack(np.arange(len(self.labels)), self.shapes))
        images, labels, keys = self._put(rows, shape, "clean")
        network = self.network(shape)
        logits, _, _ = _judge(self._draws, network, images, labels, keys[0])
        found = [
            checks.probabilities(logits),
            checks.too_few_classes(self.num_classes, self.attack.sequence),
        ]
        if not self._draws:
            # Traced anew: what a network draws in Python is a constant of one trace.
            again = traced_network(self.logits_fn, images, gradient=False)
            checks.check_batch_independence(network, images)
            found.append(checks.randomised(network, again, images))
        return [message for message in found if message is not None]

    def _identity(self) -> dict[str, Any]:
        """What makes two evaluations the same one."""
        threat = self.attack.threat
        return {
            "format": 3,
            "version": self.attack.version,
            "attacks": list(self.attack.sequence),
            "threat": f"{type(threat).__name__}({threat.epsilon!r})",
            "batch_shapes": list(self.shapes),
            "key": np.asarray(jax.random.key_data(self.key)).tolist(),
            "images": digest([self.images, self.labels]),
            "network": digest(self.network(self.shapes[0])),
            **({"verdict_draws": self._draws} if self._draws else {}),
            "clean logits": self.clean_logits,
            "predictions": digest(self.predictions),
        }

    def _put(self, rows: np.ndarray, shape: int, name: str) -> tuple[Any, Any, Any]:
        """A batch on the devices: images, labels, keys; filled up with its last image."""
        rows = np.concatenate([rows, np.repeat(rows[-1:], shape - len(rows))])
        number = 0 if name == "clean" else 1 + ATTACKS.index(name)
        keys = _keys_of_images(self.key, number, rows)
        batch = self.images[rows], self.labels[rows], keys
        return batch if self.on is None else jax.device_put(batch, mesh.batch_sharding(self.on))

    def _attack(self, name: str, one: APGD | FAB | Square, batch: packing.Batch) -> BatchRecord:
        started = time.perf_counter()
        rows, shape = batch.rows, batch.shape
        images, labels, keys = self._put(rows, shape, name)
        if isinstance(one, Square):
            points = self._search_squares(one, rows, shape)
            blind = np.zeros(len(rows), bool)
        else:
            filled = np.pad(batch.units, (0, shape - len(rows)), mode="edge")
            network, units = self.network_of_device(shape), jnp.asarray(filled)
            fixed, varying = calling.taken_apart(one)
            unit = calling.compiled_for(network.program)(_unit, ("on", "fixed"))
            outcome = unit(self.apart, fixed, varying, network, images, labels, keys, units)
            points = outcome.points
            blind = np.asarray(jnp.logical_or(*outcome.blind))[: len(rows)]
        # The last word has a look from outside: inside ball and box, and misclassified.
        key = jax.random.fold_in(keys[0], 1)
        _, right, guesses = _judge(self._draws, self.network(shape), points, labels, key)
        allowed = _is_allowed(self.attack.threat, images, points)
        fooled = np.asarray(~right & allowed)[: len(rows)]
        # The first run that fools an image counts, as if the others had not been made.
        needed = packing.until_fooled(rows, fooled)
        fooled, blind = fooled & needed, blind & needed
        return BatchRecord(
            rows=rows,
            fooled=fooled,
            predictions=np.asarray(guesses)[: len(rows)],
            zero_gradients=np.asarray(blind.sum()),
            seconds=np.asarray(time.perf_counter() - started),
            points=np.asarray(points)[: len(rows)][fooled],
        )

    def _search_squares(self, square: Square, rows: np.ndarray, shape: int) -> Any:
        """All queries; images that are fooled leave, and the others move to a smaller batch."""
        images, labels, keys = self._put(rows, shape, "square")
        fixed, varying = calling.taken_apart(square)
        compiled = calling.compiled_for(self.network(shape).program)
        begin = compiled(_begin_squares, ("fixed",))
        advance = compiled(_advance_squares, ("on", "fixed"))
        state = begin(fixed, varying, self.network(shape), images, labels, keys)
        points = np.array(state.points)
        left = np.arange(len(rows))
        done = 0
        while done < square.queries and len(left):
            until = min(done + max(done, 100), square.queries)
            network, bounds = self.network_of_device(shape), (jnp.int32(done), jnp.int32(until))
            state = advance(
                self.apart, fixed, varying, network, images, labels, keys, state, *bounds
            )
            done = until
            points[left] = np.asarray(state.points)[: len(left)]
            open_ = ~np.asarray(state.fooled)[: len(left)]
            kept = np.flatnonzero(open_)
            left = left[kept]
            smaller = min(s for s in self.shapes if s >= len(left))
            if len(left) and smaller < shape:
                shape = smaller
                filled = np.concatenate([kept, np.repeat(kept[-1:], shape - len(kept))])
                state = SquareState(*(np.asarray(part)[filled] for part in state))
                if self.on is not None:
                    state = jax.device_put(state, mesh.batch_sharding(self.on))
                images, labels, keys = self._put(rows[left], shape, "square")
            elif len(left) < len(open_):
                # The batch keeps its shape: those that are fooled stay, untouched, at its end.
                order = np.concatenate([kept, np.flatnonzero(~open_)])
                order = np.concatenate([order, np.arange(len(order), shape)])
                state = SquareState(*(np.asarray(part)[order] for part in state))
                if self.on is not None:
                    state = jax.device_put(state, mesh.batch_sharding(self.on))
                images, labels, keys = (part[order] for part in (images, labels, keys))
        return points

    def _take(self, name: str, record: BatchRecord) -> None:
        fooled = record.rows[record.fooled]
        self.robust[fooled] = False
        self.adversarial[fooled] = record.points
        self.predictions[fooled] = record.predictions[record.fooled]
        count = int(record.zero_gradients)
        self.zero_gradients[name] = self.zero_gradients.get(name, 0) + count


class _Bar:
    """Progress in passes of one image through the network, of which attacks need known numbers."""

    def __init__(self, run: Run, planned: dict[str, APGD | FAB | Square]) -> None:
        self._run, self._passed = run, 0
        self._unit = {name: _passes(one) for name, one in planned.items()}
        self._left = {
            name: one.units(run.num_classes) * self._unit[name] for name, one in planned.items()
        }
        self._progress = Progress(run.attack.title, self._total(0), unit="pass")

    def _total(self, left_of_attack: int) -> int:
        left_of_others = sum(self._left.values()) * int(self._run.robust.sum())
        return self._passed + left_of_attack + left_of_others

    def done(self, name: str, runs: int, left: int) -> None:
        self._left.pop(name, None)
        passes = self._unit[name] * runs
        self._passed += passes
        total = self._total(self._unit[name] * left)
        self._progress.expect(total, f"{self._run.attack.title}: {name}")
        self._progress.advance(passes, f"robust {100 * self._run.robust.mean():.2f} %")

    def close(self) -> None:
        self._progress.close()


def _passes(one: APGD | FAB | Square) -> int:
    """Forward passes of one unit for one image; a gradient counts as two more."""
    if isinstance(one, Square):
        return one.queries
    if isinstance(one, FAB):
        return 4 * one.steps
    return 3 * one.steps * max(one.draws, 1)


@jax.jit
def _keys_of_images(key: jax.Array, number: int, rows: jax.Array) -> jax.Array:
    own = jax.random.fold_in(key, number)
    return jax.vmap(functools.partial(jax.random.fold_in, own))(rows)


@functools.partial(jax.jit, static_argnums=0)
def _judge(
    draws: int, network: Traced, points: jax.Array, labels: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits, which predictions are right, and the predictions.

    Of a randomised network the logits of the first of several draws, what more than half of them
    say of being right, and the most frequent prediction.
    """
    if not draws:
        logits = network(points)
        predictions = jnp.argmax(logits, axis=1)
        return logits, predictions == labels, predictions
    keys = jax.random.split(key, draws)
    first = network(points, keys[0])
    counts = _counts(first.shape[1], network, points, keys)
    right = (counts * jax.nn.one_hot(labels, first.shape[1], dtype=jnp.int32)).sum(1)
    return first, 2 * right > draws, jnp.argmax(counts, axis=1)


def _counts(classes: int, network: Traced, points: jax.Array, keys: jax.Array) -> jax.Array:
    """How many draws predict each class, `[batch, classes]`."""

    def add(counts: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        predictions = jnp.argmax(network(points, key), axis=1)
        return counts + jax.nn.one_hot(predictions, classes, dtype=jnp.int32), None

    return lax.scan(add, jnp.zeros([points.shape[0], classes], jnp.int32), keys)[0]


@functools.partial(jax.jit, static_argnums=0)
def _share_of_right(
    draws: int, network: Traced, points: jax.Array, labels: jax.Array, key: jax.Array
) -> jax.Array:
    classes = network.program.value.shape[1]
    counts = _counts(classes, network, points, jax.random.split(key, draws))
    return (counts * jax.nn.one_hot(labels, classes, dtype=jnp.int32)).sum(1) / draws


def _unit(
    on: Mesh | None,
    fixed: APGD | FAB,
    varying: dict[str, Any],
    network: Traced,
    images: jax.Array,
    labels: jax.Array,
    keys: jax.Array,
    index: jax.Array,
) -> Any:
    def unit(varying: dict[str, Any], *arguments: Any) -> Any:
        return calling.put_together(fixed, varying).unit(*arguments)

    arguments = (mesh.WHOLE, mesh.WHOLE, *[mesh.ROWS] * 4)
    return mesh.apart(unit, on, arguments)(varying, network, images, labels, keys, index)


def _begin_squares(
    fixed: Square,
    varying: dict[str, Any],
    network: Traced,
    images: jax.Array,
    labels: jax.Array,
    keys: jax.Array,
) -> SquareState:
    square: Square = calling.put_together(fixed, varying)
    return square.begin(network, images, labels, keys)


def _advance_squares(
    on: Mesh | None,
    fixed: Square,
    varying: dict[str, Any],
    network: Traced,
    images: jax.Array,
    labels: jax.Array,
    keys: jax.Array,
    state: SquareState,
    first: jax.Array,
    last: jax.Array,
) -> SquareState:
    def advance(varying: dict[str, Any], *arguments: Any) -> SquareState:
        square: Square = calling.put_together(fixed, varying)
        return square.advance(*arguments)

    arguments = (mesh.WHOLE, mesh.WHOLE, *[mesh.ROWS] * 4, mesh.WHOLE, mesh.WHOLE)
    result: SquareState = mesh.apart(advance, on, arguments)(
        varying, network, images, labels, keys, state, first, last
    )
    return result


def _is_allowed(threat: Linf | L2 | L1, images: jax.Array, points: jax.Array) -> jax.Array:
    """Which points lie in the ball and the box."""
    flat = points.reshape(points.shape[0], -1)
    in_box = (flat.min(1) >= 0) & (flat.max(1) <= 1)
    most = threat.epsilon * (1 + _ROUNDING) + _rounding(threat, flat)
    return in_box & (threat.distance(points, images) <= most)


def _rounding(threat: Linf | L2 | L1, flat: jax.Array) -> float:
    """Excess over the radius that the rounding of each pixel, half a unit in its last place, makes.

    It matters for radii as small as 0.003.
    """
    pixels = flat.shape[1]
    unit = float(jnp.finfo(flat.dtype).eps) / 2
    if isinstance(threat, Linf):
        return unit
    return unit * (pixels if isinstance(threat, L1) else pixels**0.5)
