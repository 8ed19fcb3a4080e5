"""Evaluates the checkpoints of a run: one record each, kept batch by batch until it is done."""

from __future__ import annotations

import functools
import itertools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agr_jax import distributed
from agr_jax.attacks import PGD, Attack, AutoAttack, named
from agr_jax.attacks._pgd import too_short
from agr_jax.data import Split, to_unit_range
from agr_jax.errors import CheckpointError, OtherEvaluationError
from agr_jax.evaluation import record_files
from agr_jax.evaluation.accuracy import correct_under_attack
from agr_jax.evaluation.packed_bits import encode_mask
from agr_jax.journal import Journal, digest
from agr_jax.models import Classifier
from agr_jax.progress import Progress
from agr_jax.runs import Run, checkpoints
from agr_jax.runs.folder import EVALUATIONS, locked


def evaluate_run(
    run: Run, *, which: Sequence[str] | None = None, label: str = ""
) -> list[dict[str, Any]]:
    """Evaluates checkpoints of a run on the test set, and saves `evaluations/<which>.json`.

    With fewer than all test images the file is `<which>-first<n>.json`, or `<which>-drawn<n>.json`
    where the test set is ordered by class (see `Run.test_part`), so that it never replaces the
    whole evaluation; a label comes before that, `<which>-<label>-first<n>.json`. Other attacks that
    the file has of the same evaluation stay in it, each with the `environment` that it ran in; all
    else that it has is kept under `earlier` (see `record_files`). What is done is kept batch by
    batch: the same call resumes an evaluation that was killed, and ends with the same result.

    Args:
        run: whose `config.eval` says what to evaluate.
        which: of `last`, `best` and `average`, by default `config.eval.checkpoints`; beside the
            last one, the best is left out where nothing was held out, and the average where none is
            kept. Where one is kept, the best is the average of its epoch.
        label: tells evaluations of one checkpoint with other attacks apart.

    Returns:
        One record per checkpoint: what the JSON file holds.

    Raises:
        CheckpointError: if the run has no checkpoint, or one of another model or data set.
        ConfigError: on an unknown attack or too many examples.
    """
    which = run.config.eval.checkpoints if which is None else which
    attacks, split = named.from_config(run.config), run.test_split()
    stem = (f"-{label}" if label else "") + run.test_part.suffix
    records = []
    for name in which:
        try:
            checkpoint = checkpoints.find(run.folder, name)
        except CheckpointError:
            if name != "last" and "last" in which:  # nothing held out or not scored, no average
                continue
            raise
        subject, record = _subject(run, name, checkpoint, split)
        path = run.folder / EVALUATIONS / f"{name}{stem}.json"
        records.append(_evaluate_attacks(subject, attacks, record, path))
    return records


class _Subject(NamedTuple):
    """What is attacked: one checkpoint's network, on some test images."""

    run: Run
    classifier: Classifier
    split: Split
    digests: Mapping[str, str]


def _subject(
    run: Run, name: str, checkpoint: Path, split: Split
) -> tuple[_Subject, dict[str, Any]]:
    """A checkpoint's network and images, and its record before any attack."""
    # What the held-out split scored, and so what is best, is the average where one is kept.
    averaged = distributed.from_first(lambda: name != "last" and (checkpoint / "average").is_dir())
    classifier, about = run.load_classifier(checkpoint, "average" if averaged else "variables")
    digests = {"network": digest(classifier), "images": digest([split.images, split.labels])}
    attack = run.config.attack
    record: dict[str, Any] = {
        "checkpoint": name,
        "step": about["step"],
        "epoch": about["epoch"],
        "weights": "moving average" if averaged else "as trained",
        "data": run.dataset.describe(),
        "complete_data": run.dataset.complete,
        "examples": len(run.test_part),
        "selection": str(run.test_part),
        "seed": run.config.seed,
        "threat": {"norm": attack.norm, "epsilon": attack.epsilon},
        "digests": digests,
        "attacks": {},
        **run.provenance(),
    }
    return _Subject(run, classifier, split, digests), record


def _evaluate_attacks(
    subject: _Subject, attacks: Mapping[str, Attack | None], record: dict[str, Any], path: Path
) -> dict[str, Any]:
    """Completes a record with each attack's entry, and writes its file."""
    # What is done of attacks that are not asked for now stays there.
    unfinished = path.with_name(f".{path.stem}")
    with locked(unfinished):
        record["attacks"], earlier = _carried_over(path, record, named.maker(subject.run.config))
        done = []
        for name, attack in attacks.items():
            begun = unfinished / name.replace("/", "-")
            evaluate = functools.partial(_evaluate_attack, subject, name, attack)
            record["attacks"][name], where = _continued(begun, evaluate)
            done.append(where)
        if earlier:
            record["earlier"] = earlier
        record_files.write(path, record)
        distributed.from_first(functools.partial(_forget, unfinished, done))
    return record


def _forget(unfinished: Path, done: Sequence[Path]) -> None:
    """Removes the batches of attacks that are in the record."""
    for where in done:
        shutil.rmtree(where, ignore_errors=True)
    if {left.name for left in unfinished.iterdir()} == {".lock"}:
        shutil.rmtree(unfinished)


def _carried_over(
    path: Path, record: Mapping[str, Any], meant: record_files.Maker
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a file has of this evaluation, and what else it has, which stays in it too."""
    stored = record_files.read(path)
    # The images' digest is the same wherever they are stored, while what describes them names the
    # folder; but files of earlier versions have no digests.
    images = "digests" if "digests" in stored else "data"
    asked = {name: record[name] for name in ("step", "seed", "examples", images)}
    kept, earlier, moved = record_files.carry_over(stored, meant, asked)
    for result in moved:
        distributed.say(f"{path}: {result.name} is kept under 'earlier': {result.reason}")
    return kept, earlier


def _continued(
    folder: Path, evaluate: Callable[[Path], dict[str, Any]]
) -> tuple[dict[str, Any], Path]:
    """What an evaluation gives that keeps its batches in a folder, and the folder.

    Where the folder has those of another evaluation, they stay, and a folder beside it is taken.
    """
    for number in itertools.count(2):
        try:
            return evaluate(folder), folder
        except OtherEvaluationError as error:
            distributed.say(f"beginning again in another folder: {error}")
            folder = folder.with_name(f"{folder.name.partition('.other-')[0]}.other-{number}")
    raise AssertionError("there is always another number")


def _evaluate_attack(
    subject: _Subject, name: str, attack: Attack | None, folder: Path
) -> dict[str, Any]:
    """One attack's entry of a record; its batches are kept in the folder."""
    started = time.perf_counter()
    if isinstance(attack, AutoAttack):
        entry, correct = _evaluate_ensemble(subject, attack, folder)
    else:
        entry, correct = _evaluate_single(subject, name, attack, folder)
    return {
        "correct": int(correct.sum()),
        **entry,
        "settings": named.describe(attack),
        "correct_images": encode_mask(correct),
        # Of this start alone: a resumed evaluation does not repeat what was done.
        "wall_seconds": round(time.perf_counter() - started, 2),
    }


def _evaluate_ensemble(
    subject: _Subject, attack: AutoAttack, folder: Path
) -> tuple[dict[str, Any], np.ndarray]:
    split, run = subject.split, subject.run
    images = np.asarray(to_unit_range(jnp.asarray(split.images)))
    key = jax.random.key(run.config.seed)
    result = attack.evaluate(
        subject.classifier, images, split.labels, key, folder=folder, on=run.mesh
    )
    return result.as_dict(), result.robust


def _evaluate_single(
    subject: _Subject, name: str, attack: Attack | None, folder: Path
) -> tuple[dict[str, Any], np.ndarray]:
    run, seed, most = subject.run, subject.run.config.seed, subject.run.config.eval.batch_size
    identity = {
        **{field: str(value) for field, value in named.describe(attack).items()},
        "seed": seed,
        "batch_size": most,
        **subject.digests,
    }
    absent = {n: str(value) for n, value in record_files.default_settings(attack).items()}
    examples = len(subject.split.labels)
    batch_size = min(most, examples)
    batches = -(-examples // batch_size)
    messages: list[str] = []
    with Progress(name, batches, unit="batch") as progress:
        correct = correct_under_attack(
            subject.classifier,
            attack,
            subject.split,
            seed=seed,
            batch_size=most,
            mesh=run.mesh,
            progress=progress,
            journal=Journal(folder, identity, absent),
            messages=messages,
        )
    if isinstance(attack, PGD) and (message := too_short(attack)):
        messages.append(message)
    entry: dict[str, Any] = {"accuracy": float(correct.mean())}
    return {**entry, "warnings": messages} if messages else entry, correct
