"""AutoAttack: a fixed sequence of attacks, each on the images that all before it left.

Example:
    >>> import jax, jax.numpy as jnp
    >>> from agr_jax.attacks import autoattack
    >>> from agr_jax.threat import Linf
    >>> images = jnp.stack([jnp.full([8, 8, 1], 0.45), jnp.full([8, 8, 1], 0.2)])
    >>> dark = lambda x: jnp.stack([0.5 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.5,
    ...                             x[:, 0, 0, 0] - 2, x[:, 1, 1, 0] - 2], axis=1)
    >>> attack = autoattack(Linf(0.1))
    >>> result = attack.evaluate(dark, images, jnp.array([0, 0]), jax.random.key(0), progress=False)
    >>> result.robust_accuracy
    0.5
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from agr_jax import losses, mesh
from agr_jax.attacks import autoattack_checks as checks
from agr_jax.attacks.apgd import APGD
from agr_jax.attacks.attack import LogitsFn, as_pytree, check_inputs, loop_from_host
from agr_jax.attacks.fab import FAB
from agr_jax.attacks.journal import BatchRecord, Journal, digest
from agr_jax.attacks.square import Square, SquareState
from agr_jax.metrics import Progress
from agr_jax.threat import L1, L2, Linf

ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
_VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    "fast": ("apgd-ce", "apgd-t"),
}
# Relative excess over the radius that rounding can make.
_ROUNDING = 1e-5


@dataclasses.dataclass(frozen=True)
class AutoAttack:
    """The parameter-free ensemble that robustness is usually reported with.

    `evaluate` gives the whole result. Called as `attack(logits_fn, images, labels, key)` it returns
    the adversarial images alone. It packs the images that are left into a few fixed batch shapes
    from the host, so it is not for use inside `jit`.

    Attributes:
        threat: `Linf`, `L2` or `L1` ball.
        version: `standard` (APGD-CE, targeted APGD, targeted FAB, Square), `plus`, `rand` for
            randomised networks `logits_fn(images, key)`, `custom`, or `fast`: APGD-CE and targeted
            APGD, **which is not AutoAttack** and says so in every output.
        attacks: with `custom`, which of `ATTACKS` in which order, with the settings of `standard`.
        batch_size: images at a time; changes the speed, not the result.

    Source: Croce and Hein, ICML 2020, and the settings of the published code (of July 2024). Unlike
    there, Square draws for each image apart, and all draws depend on the key, the attack and the
    position of an image alone.
    """

    threat: Linf | L2 | L1
    version: Literal["standard", "plus", "rand", "fast", "custom"] = "standard"
    attacks: tuple[str, ...] = ()
    batch_size: int = 250

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Linf | L2 | L1):
            raise ValueError(f"AutoAttack.threat must be Linf, L2 or L1, got {self.threat!r}")
        if self.version not in (*_VERSIONS, "custom"):
            raise ValueError(
                f"AutoAttack.version must be one of {', '.join((*_VERSIONS, 'custom'))}, got "
                f"{self.version!r}"
            )
        if (self.version == "custom") != bool(self.attacks):
            raise ValueError(
                'AutoAttack.attacks goes with version="custom", and only with it, got '
                f"{self.attacks} with {self.version!r}"
            )
        unknown = [name for name in self.attacks if name not in ATTACKS]
        if unknown or len(set(self.attacks)) != len(self.attacks):
            raise ValueError(
                f"AutoAttack.attacks must be different ones of {', '.join(ATTACKS)}, got "
                f"{self.attacks}"
            )
        if self.batch_size < 1:
            raise ValueError(f"AutoAttack.batch_size must be at least 1, got {self.batch_size}")

    @property
    def title(self) -> str:
        """What a table may call it."""
        if self.version == "standard":
            return "AutoAttack"
        if self.version == "fast":
            return "APGD-CE + APGD-T (fast, not AutoAttack)"
        if self.version == "custom":
            return f"{' + '.join(self.attacks)} (custom, not AutoAttack)"
        return f"AutoAttack ({self.version})"

    @property
    def sequence(self) -> tuple[str, ...]:
        """The attacks in their order."""
        return self.attacks or _VERSIONS[self.version]

    def __call__(
        self, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> jax.Array:
        """Returns adversarial images: fooled ones at their points, the others as they are.

        Arguments and errors as `evaluate`, which also shows the progress.
        """
        return jnp.asarray(
            self.evaluate(logits_fn, images, labels, key, progress=False).adversarial
        )

    def evaluate(
        self,
        logits_fn: LogitsFn,
        images: Any,
        labels: Any,
        key: jax.Array,
        *,
        folder: Path | None = None,
        on: Mesh | None = None,
        progress: bool = True,
    ) -> AutoAttackResult:
        """Attacks every image until one attack succeeds or all have failed.

        Everything runs at float32's full matrix precision (float64 for float64 images).

        Args:
            logits_fn: maps images `[batch, ...]` to logits `[batch, classes]`, in evaluation mode;
                with `rand` it takes a key too. A pytree such as `Partial(model.apply, variables)`
                compiles nothing again for a second network of the same structure.
            images: floats in [0, 1], `[examples, ...]` (for Square `[examples, height, width,
                channels]`).
            labels: integers `[examples]`.
            key: one JAX key, the seed of all draws.
            folder: where to keep what is done after each batch; a second call with the same
                arguments goes on from there and ends with the same result.
            on: devices that share each batch; by default the one that JAX uses.
            progress: show a bar, or plain lines where there is no terminal.

        Raises:
            ValueError: if images, labels or logits have the wrong dtype, shape or range, or if the
                logits of an image depend on its batch.
            EvaluationStateError: if `folder` holds another evaluation or damaged files.

        Warns:
            EvaluationWarning: where a check finds that the result may be unreliable.
        """
        images, labels = _as_arrays(images, labels)
        if key.ndim if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key.ndim != 1:
            raise ValueError(f"key must be one key, got shape {key.shape}")
        with jax.default_matmul_precision("float32"):
            run = _Run(self, as_pytree(logits_fn), images, labels, key, on)
            return run.evaluate(folder, progress)

    def make(self, name: str, num_classes: int) -> APGD | FAB | Square:
        """One attack of the sequence, for a number of classes."""
        l1, plus, rand = (
            isinstance(self.threat, L1),
            self.version == "plus",
            self.version == "rand",
        )
        apgd = functools.partial(APGD, self.threat, stop_when_fooled=True, draws=20 if rand else 0)
        # With `plus` and `rand` the published code keeps to the radius under L1 too.
        wide = l1 and not plus and not rand
        restarts = 5 if plus or (l1 and not rand) else 1
        if name == "apgd-ce":
            return apgd(restarts=restarts, large_radii=wide)
        if name == "apgd-dlr":
            dlr = losses.dlr if num_classes >= 3 else losses.margin
            return apgd(loss=dlr, restarts=restarts, large_radii=wide)
        if name == "apgd-t":
            targeted = losses.targeted_dlr if num_classes >= 4 else losses.targeted_margin
            return apgd(loss=targeted, targets=5 if wide else 9, large_radii=wide)
        if name == "fab":
            return FAB(self.threat, targets=0, restarts=5, stop_when_fooled=True)
        if name == "fab-t":
            return FAB(self.threat, targets=9, stop_when_fooled=True)
        return Square(self.threat)


@dataclasses.dataclass(frozen=True)
class AutoAttackResult:
    """What an evaluation found, image by image.

    Attributes:
        attack: what was run.
        robust_after: booleans `[examples]` by name, in order: `clean`, then after each attack.
        adversarial: `[examples, ...]`: in the ball and the box, and misclassified, for an image
            that was classified correctly and then fooled; else the image.
        predictions: integers `[examples]`, the network's at `adversarial`.
        seconds: that each attack took, compilation included, over all starts of the evaluation.
        warnings: messages of the checks.
    """

    attack: AutoAttack
    robust_after: dict[str, np.ndarray]
    adversarial: np.ndarray
    predictions: np.ndarray
    seconds: dict[str, float]
    warnings: tuple[str, ...]

    @property
    def robust(self) -> np.ndarray:
        """Booleans `[examples]`, after all attacks."""
        return list(self.robust_after.values())[-1]

    @property
    def robust_accuracy(self) -> float:
        """Share of the images that are classified correctly after all attacks."""
        return float(self.robust.mean())

    def as_dict(self) -> dict[str, Any]:
        """Numbers and strings, for JSON."""
        return {
            "title": self.attack.title,
            "version": self.attack.version,
            "attacks": list(self.attack.sequence),
            "norm": type(self.attack.threat).__name__,
            "epsilon": self.attack.threat.epsilon,
            "examples": len(self.robust),
            "accuracy": self.robust_accuracy,
            "correct_after": {name: int(mask.sum()) for name, mask in self.robust_after.items()},
            "seconds": {name: round(seconds, 2) for name, seconds in self.seconds.items()},
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        threat, lines = self.attack.threat, []
        for name, mask in self.robust_after.items():
            took = f"  ({self.seconds[name]:.1f} s)" if name in self.seconds else ""
            lines.append(f"{name:>9}: {100 * mask.mean():6.2f} %{took}")
        norm = f"{type(threat).__name__} epsilon {threat.epsilon:.4g}"
        return f"{self.attack.title}, {norm}, {len(self.robust)} images\n" + "\n".join(lines)


class _Run:
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
        self.key = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else _typed(key)
        self.logits_fn = logits_fn if on is None else jax.device_put(logits_fn, mesh.replicated(on))
        self.shapes = _batch_shapes(min(attack.batch_size, len(labels)), on)
        self.adversarial = images.copy()
        self.predictions, self.num_classes = self._clean_predictions()
        self.robust = self.predictions == labels
        self.zero_gradients: dict[str, int] = {}

    def evaluate(self, folder: Path | None, progress: bool) -> AutoAttackResult:
        messages = self._checks_before()
        journal = Journal(folder, self._identity())
        robust_after = {"clean": self.robust.copy()}
        seconds: dict[str, float] = {}
        planned = {name: self.attack.make(name, self.num_classes) for name in self.attack.sequence}
        bar = _Bar(self, planned) if progress else None
        try:
            for name, one in planned.items():
                seconds[name] = 0.0
                for index in range(one.units(self.num_classes)):
                    for rows, shape in _pack(np.flatnonzero(self.robust), self.shapes):
                        unit = f"{name}-{index}"
                        record = journal.next(unit, rows)
                        if record is None:
                            record = self._attack(name, one, index, rows, shape)
                            journal.add(unit, record)
                        seconds[name] += float(record.seconds)
                        self._take(name, record)
                        if bar is not None:
                            bar.done(name, one, rows)
                    if bar is not None:
                        bar.finish_unit(name)
                robust_after[name] = self.robust.copy()
        finally:
            if bar is not None:
                bar.close()
        after = {name: float(mask.mean()) for name, mask in robust_after.items()}
        for message in (
            checks.zero_gradients(self.zero_gradients),
            checks.square_improves(after),
        ):
            if message is not None:
                checks.warn(message)
                messages.append(message)
        return AutoAttackResult(
            self.attack,
            robust_after,
            self.adversarial,
            self.predictions,
            seconds,
            tuple(messages),
        )

    def _clean_predictions(self) -> tuple[np.ndarray, int]:
        predictions, num_classes = [], 0
        for rows, shape in _pack(np.arange(len(self.labels)), self.shapes):
            images, _, keys = self._put(rows, shape, "clean")
            logits = _logits(self.attack.version == "rand", self.logits_fn, images, keys)
            checks.check_logits(logits, shape)
            num_classes = logits.shape[1]
            predictions.append(np.asarray(jnp.argmax(logits, axis=1))[: len(rows)])
        checks.check_labels(self.labels, num_classes)
        return np.concatenate(predictions), num_classes

    def _checks_before(self) -> list[str]:
        rows, shape = next(_pack(np.arange(len(self.labels)), self.shapes))
        images, _, keys = self._put(rows, shape, "clean")
        rand = self.attack.version == "rand"
        found = [
            checks.probabilities(_logits(rand, self.logits_fn, images, keys)),
            checks.too_few_classes(self.num_classes, self.attack.sequence),
        ]
        if not rand:
            checks.check_batch_independence(self.logits_fn, images)
            found.append(checks.randomised(self.logits_fn, images))
        messages = [message for message in found if message is not None]
        for message in messages:
            checks.warn(message)
        return messages

    def _identity(self) -> dict[str, Any]:
        """What makes two evaluations the same one."""
        threat = self.attack.threat
        return {
            "format": 1,
            "version": self.attack.version,
            "attacks": list(self.attack.sequence),
            "threat": f"{type(threat).__name__}({threat.epsilon!r})",
            "batch_shapes": list(self.shapes),
            "key": np.asarray(jax.random.key_data(self.key)).tolist(),
            "images": digest([self.images, self.labels]),
            "network": digest(self.logits_fn),
            "predictions": digest(self.predictions),
        }

    def _put(self, rows: np.ndarray, shape: int, name: str) -> tuple[Any, Any, Any]:
        """A batch on the devices: images, labels, keys; filled up with its last image."""
        rows = np.concatenate([rows, np.repeat(rows[-1:], shape - len(rows))])
        number = 0 if name == "clean" else 1 + ATTACKS.index(name)
        keys = _keys_of_images(self.key, number, rows)
        batch = self.images[rows], self.labels[rows], keys
        return batch if self.on is None else jax.device_put(batch, mesh.batch_sharding(self.on))

    def _attack(
        self, name: str, one: APGD | FAB | Square, index: int, rows: np.ndarray, shape: int
    ) -> BatchRecord:
        started = time.perf_counter()
        images, labels, keys = self._put(rows, shape, name)
        if isinstance(one, Square):
            points = self._search_squares(one, rows, shape)
            zero = np.zeros(len(rows), bool)
        else:
            run = _unit_from_host if jax.default_backend() == "cpu" else _unit
            outcome = run(one, self.logits_fn, images, labels, keys, index)
            points, zero = outcome.points, np.asarray(outcome.zero_gradient)[: len(rows)]
        # The last word has a look from outside: inside ball and box, and misclassified.
        fooled, predictions = _verify(self.attack, self.logits_fn, images, labels, points, keys)
        fooled = np.asarray(fooled)[: len(rows)]
        return BatchRecord(
            rows=rows,
            fooled=fooled,
            predictions=np.asarray(predictions)[: len(rows)],
            zero_gradients=np.asarray(zero.sum() if name in ("apgd-dlr", "apgd-t") else 0),
            seconds=np.asarray(time.perf_counter() - started),
            points=np.asarray(points)[: len(rows)][fooled],
        )

    def _search_squares(self, square: Square, rows: np.ndarray, shape: int) -> Any:
        """All queries; images that are fooled leave, and the others move to a smaller batch."""
        images, labels, keys = self._put(rows, shape, "square")
        state = _begin_squares(square, self.logits_fn, images, labels, keys)
        points = np.array(state.points)
        left = np.arange(len(rows))
        done = 0
        while done < square.queries and len(left):
            until = min(done + max(done, 100), square.queries)
            state = _advance_squares(
                square, self.logits_fn, images, labels, keys, state, done, until
            )
            done = until
            points[left] = np.asarray(state.points)[: len(left)]
            open_ = np.asarray(state.margin)[: len(left)] < 0
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

    def __init__(self, run: _Run, planned: dict[str, APGD | FAB | Square]) -> None:
        self._run, self._passed = run, 0
        self._left = {
            name: one.units(run.num_classes) * _passes(one) for name, one in planned.items()
        }
        self._unit = {name: _passes(one) for name, one in planned.items()}
        self._progress = Progress(run.attack.title, self._total(), unit="pass")

    def _total(self) -> int:
        return self._passed + sum(self._left.values()) * int(self._run.robust.sum())

    def done(self, name: str, one: APGD | FAB | Square, rows: np.ndarray) -> None:
        passes = self._unit[name] * len(rows)
        self._passed += passes
        robust = self._run.robust
        # What is left of this unit counts as done: it is less than a batch for each batch done.
        self._progress.expect(self._total(), f"{self._run.attack.title}: {name}")
        self._progress.advance(passes, f"robust {100 * robust.mean():.2f} %")

    def finish_unit(self, name: str) -> None:
        self._left[name] -= self._unit[name]

    def close(self) -> None:
        self._progress.close()


def _passes(one: APGD | FAB | Square) -> int:
    """Forward passes of one unit for one image; a gradient counts as two more."""
    if isinstance(one, Square):
        return one.queries
    if isinstance(one, FAB):
        return 4 * one.steps
    return 3 * one.steps * max(one.draws, 1)


def _as_arrays(images: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    dtype = getattr(images, "dtype", None)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"images must be floats in [0, 1], got dtype {dtype}; divide by 255")
    if getattr(images, "ndim", 4) == 4 and images.shape[1] in (1, 3) and images.shape[3] > 4:
        raise ValueError(
            f"images must be [examples, height, width, channels], got shape {images.shape}, which "
            "looks like channels first: images.transpose(0, 2, 3, 1)"
        )
    wide = np.float64 if dtype == np.float64 and jax.config.read("jax_enable_x64") else np.float32
    images, labels = np.asarray(images, wide), np.asarray(labels)
    if not len(labels):
        raise ValueError("there are no images to attack")
    check_inputs(jnp.asarray(images), labels)
    return images, labels.astype(np.int32)


def _typed(key: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(key)


def _batch_shapes(batch_size: int, on: Mesh | None) -> tuple[int, ...]:
    """The full batch, a quarter and a sixteenth of it: all that is ever compiled."""
    devices = 1 if on is None else on.size
    wanted = {batch_size, *(batch_size // share for share in (4, 16) if batch_size // share >= 8)}
    return tuple(sorted({-(-size // devices) * devices for size in wanted}, reverse=True))


def _pack(rows: np.ndarray, shapes: tuple[int, ...]) -> Iterator[tuple[np.ndarray, int]]:
    """Cuts rows into batches of the given shapes, with little to fill up."""
    while len(rows):
        # The largest shape that the rows fill, or else the smallest that holds them.
        filled = [shape for shape in shapes if shape <= len(rows)]
        holding = [shape for shape in shapes if shape >= len(rows)]
        shape = filled[0] if filled else holding[-1]
        if holding and holding[-1] <= 1.25 * len(rows):
            shape = holding[-1]
        yield rows[:shape], shape
        rows = rows[shape:]


@jax.jit
def _keys_of_images(key: jax.Array, number: int, rows: jax.Array) -> jax.Array:
    own = jax.random.fold_in(key, number)
    return jax.vmap(functools.partial(jax.random.fold_in, own))(rows)


@functools.partial(jax.jit, static_argnums=0)
def _logits(rand: bool, logits_fn: LogitsFn, images: jax.Array, keys: jax.Array) -> jax.Array:
    return logits_fn(images, keys[0]) if rand else logits_fn(images)


@functools.partial(jax.jit, static_argnums=0)
def _unit(
    one: APGD | FAB,
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    keys: jax.Array,
    index: jax.Array | int,
) -> Any:
    return one.unit(logits_fn, images, labels, keys, index)


def _unit_from_host(
    one: APGD | FAB,
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    keys: jax.Array,
    index: jax.Array | int,
) -> Any:
    return one.unit(logits_fn, images, labels, keys, jnp.int32(index), loop_from_host)


@functools.partial(jax.jit, static_argnums=0)
def _begin_squares(
    square: Square, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, keys: jax.Array
) -> SquareState:
    return square.begin(logits_fn, images, labels, keys)


@functools.partial(jax.jit, static_argnums=0)
def _advance_squares(
    square: Square,
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    keys: jax.Array,
    state: SquareState,
    first: jax.Array | int,
    last: jax.Array | int,
) -> SquareState:
    return square.advance(logits_fn, images, labels, keys, state, first, last)


@functools.partial(jax.jit, static_argnums=0)
def _verify(
    attack: AutoAttack,
    logits_fn: LogitsFn,
    images: jax.Array,
    labels: jax.Array,
    points: jax.Array,
    keys: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Which points are adversarial examples, and the predictions there."""
    key = jax.random.fold_in(keys[0], 1)
    logits = logits_fn(points, key) if attack.version == "rand" else logits_fn(points)
    predictions = jnp.argmax(logits, axis=1)
    flat = points.reshape(points.shape[0], -1)
    in_box = (flat.min(1) >= 0) & (flat.max(1) <= 1)
    distance = attack.threat.distance(points, images)
    in_ball = distance <= attack.threat.epsilon * (1 + _ROUNDING)
    return (predictions != labels) & in_box & in_ball, predictions
