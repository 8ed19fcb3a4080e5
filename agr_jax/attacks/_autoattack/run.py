"""One evaluation: which images are left, attack after attack, and what is kept on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agr_jax import sharding
from agr_jax.attacks._autoattack import checks, packing
from agr_jax.attacks._autoattack.members import Ensemble, Member, make_member
from agr_jax.attacks._autoattack.placed import CLEAN, Placed
from agr_jax.attacks._autoattack.result import AutoAttackResult
from agr_jax.attacks._autoattack.search import attack_batch
from agr_jax.attacks._autoattack.verdicts import judge, share_of_right
from agr_jax.attacks._checks import check_labels, warn
from agr_jax.journal import BatchRecord, Journal, digest
from agr_jax.progress import Progress


def evaluate(
    placed: Placed, ensemble: Ensemble, folder: Path | None, progress: bool
) -> AutoAttackResult:
    """Runs the attacks in their order; see `AutoAttack.evaluate`."""
    clean = _clean_predictions(placed)
    messages = _messages_before(placed, ensemble, clean.num_classes)
    for message in messages:
        warn(message)
    journal = Journal(folder, {} if folder is None else _identity(placed, ensemble, clean))
    members = {
        name: make_member(name, ensemble.threat, ensemble.version, clean.num_classes)
        for name in ensemble.sequence
    }
    position = _Position(placed.images, clean)
    robust_after = {"clean": position.robust.copy()}
    seconds: dict[str, float] = {}
    bar = _Bar(ensemble.title, members, clean.num_classes, position) if progress else None
    try:
        for name, member in members.items():
            seconds[name] = _run_member(placed, name, member, position, journal, bar)
            robust_after[name] = position.robust.copy()
    finally:
        if bar is not None:
            bar.close()
    after = {name: float(mask.mean()) for name, mask in robust_after.items()}
    found = checks.zero_gradients(position.zero_gradients), checks.square_improves(after)
    late = [message for message in found if message is not None]
    for message in late:
        warn(message)
    return AutoAttackResult(
        ensemble,
        robust_after,
        position.adversarial,
        position.predictions,
        seconds,
        tuple(messages + late),
        _one_draw(placed, position.adversarial),
    )


class _Clean(NamedTuple):
    """The network at the clean images.

    `moments` are four digits each: enough to tell networks apart, and the same after another order
    of a sum.
    """

    right: np.ndarray
    predictions: np.ndarray
    num_classes: int
    moments: list[str]


class _Position:
    """What was found so far."""

    def __init__(self, images: np.ndarray, clean: _Clean) -> None:
        self.adversarial = images.copy()
        self.robust, self.predictions = clean.right, clean.predictions
        self.num_classes = clean.num_classes
        self.zero_gradients: dict[str, int] = {}

    def take(self, name: str, record: BatchRecord) -> None:
        """Adds what an attack found on a batch."""
        fooled = record.rows[record.fooled]
        self.robust[fooled] = False
        self.adversarial[fooled] = record.points
        self.predictions[fooled] = record.predictions[record.fooled]
        count = int(record.zero_gradients)
        self.zero_gradients[name] = self.zero_gradients.get(name, 0) + count


def _run_member(
    placed: Placed,
    name: str,
    member: Member,
    position: _Position,
    journal: Journal,
    bar: _Bar | None,
) -> float:
    """Runs an attack on all images that are left; returns the seconds that it took."""
    seconds = 0.0
    units, done = member.units(position.num_classes), np.zeros_like(placed.labels)
    while batch := packing.next_batch(position.robust, done, units, placed.shapes):
        record = journal.next(name, batch.rows)
        if record is None:
            record = attack_batch(placed, name, member, batch)
            journal.add(name, record)
        np.add.at(done, batch.rows, 1)
        seconds += float(record.seconds)
        position.take(name, record)
        if bar is not None:
            bar.done(name, len(batch.rows), int((units - done)[position.robust].sum()))
    return seconds


def _clean_predictions(placed: Placed) -> _Clean:
    """Judges the clean images.

    Raises:
        ValueError: on logits that are not finite, or labels that are no class.
    """
    all_logits, right, predictions = [], [], []
    for rows, shape in placed.batches():
        images, labels, _ = placed.batch(rows, shape, CLEAN)
        key = placed.key_of_batch(rows, CLEAN)
        found = sharding.get(judge(placed.draws, placed.network(shape), images, labels, key))
        logits, *judged = (part[: len(rows)] for part in found)
        checks.check_finite(logits)
        all_logits.append(logits)
        right.append(judged[0])
        predictions.append(judged[1])
    logits = np.concatenate(all_logits)
    check_labels(placed.labels, logits.shape[1])
    moments = np.abs(logits).mean(), logits.std(), logits[0].max(), logits[-1].max()
    return _Clean(
        np.concatenate(right),
        np.concatenate(predictions),
        logits.shape[1],
        [f"{moment:.4g}" for moment in moments],
    )


def _one_draw(placed: Placed, adversarial: np.ndarray) -> float | None:
    """Of a randomised network, the share of right predictions at the final points."""
    if not placed.draws:
        return None
    shares = []
    for rows, shape in placed.batches():
        _, labels, _ = placed.batch(rows, shape, CLEAN)
        points = placed.split(jnp.asarray(adversarial[placed.filled(rows, shape)]))
        key = jax.random.fold_in(placed.key_of_batch(rows, CLEAN), 2)
        share = share_of_right(placed.draws, placed.network(shape), points, labels, key)
        shares.append(sharding.get(share)[: len(rows)])
    return float(np.concatenate(shares).mean())


def _messages_before(placed: Placed, ensemble: Ensemble, num_classes: int) -> list[str]:
    """What may make the result unreliable, seen on the first batch."""
    rows, shape = next(placed.batches())
    images, labels, _ = placed.batch(rows, shape, CLEAN)
    network = placed.network(shape)
    key = placed.key_of_batch(rows, CLEAN)
    logits = sharding.get(judge(placed.draws, network, images, labels, key)[0])
    found = [checks.probabilities(logits), checks.too_few_classes(num_classes, ensemble.sequence)]
    if not placed.draws:
        # Whole in every process, and so are the logits, which are compared there.
        images = jnp.asarray(placed.images[placed.filled(rows, shape)])
        checks.check_batch_independence(network, images)
        found.append(checks.randomised(network, placed.traced_again(images), images))
    return [message for message in found if message is not None]


def _identity(placed: Placed, ensemble: Ensemble, clean: _Clean) -> dict[str, Any]:
    """What makes two evaluations the same one."""
    threat = ensemble.threat
    return {
        "format": 3,
        "version": ensemble.version,
        "attacks": list(ensemble.sequence),
        "threat": f"{type(threat).__name__}({threat.epsilon!r})",
        "batch_shapes": list(placed.shapes),
        "key": np.asarray(jax.random.key_data(placed.key)).tolist(),
        "images": digest([placed.images, placed.labels]),
        "network": digest(placed.network(placed.shapes[0])),
        **({"verdict_draws": placed.draws} if placed.draws else {}),
        "clean logits": clean.moments,
        "predictions": digest(clean.predictions),
    }


class _Bar:
    """Progress in passes of one image through the network, of which attacks need known numbers."""

    def __init__(
        self, title: str, members: dict[str, Member], num_classes: int, position: _Position
    ) -> None:
        self._title, self._position, self._passed = title, position, 0
        self._unit = {name: member.passes for name, member in members.items()}
        self._left = {
            name: member.units(num_classes) * member.passes for name, member in members.items()
        }
        self._progress = Progress(title, self._total(0), unit="pass")

    def _total(self, left_of_attack: int) -> int:
        left_of_others = sum(self._left.values()) * int(self._position.robust.sum())
        return self._passed + left_of_attack + left_of_others

    def done(self, name: str, runs: int, left: int) -> None:
        self._left.pop(name, None)
        passes = self._unit[name] * runs
        self._passed += passes
        total = self._total(self._unit[name] * left)
        self._progress.expect(total, f"{self._title}: {name}")
        self._progress.advance(passes, f"robust {100 * self._position.robust.mean():.2f} %")

    def close(self) -> None:
        self._progress.close()
