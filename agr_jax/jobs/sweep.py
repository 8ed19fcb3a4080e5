"""Many runs in their order: trained, evaluated and measured where something is missing.

A sweep is stopped and resumed like a run: what is done is seen in the run folders.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from agr_jax import distributed, methods
from agr_jax.attacks import named
from agr_jax.config import Config, from_config_dict
from agr_jax.errors import ConfigError, FolderInUseError, UserError
from agr_jax.evaluation import record_files
from agr_jax.evaluation.evaluate import evaluate_run
from agr_jax.evaluation.table import render_table
from agr_jax.files import read_json_lines
from agr_jax.measure import measure_run
from agr_jax.runs import Run
from agr_jax.runs.folder import EVALUATIONS, MEASUREMENTS, METRICS, locked
from agr_jax.training import optimizers, train_run

# While another process is at a run.
_SECONDS_BETWEEN_LOOKS = 5.0


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run beside its own.

    Attributes:
        label: part of its file's name.
        attacks: as `config.eval.attacks`.
        examples: number of test images, as `config.eval.examples`; 0 for all.
    """

    label: str
    attacks: tuple[str, ...]
    examples: int


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        name: of its folder.
        config: its settings; `init_from` is set by `base`.
        base: name of the run to branch from, or empty.
        evaluations: beside that of `config.eval`.
        measurements: see `agr_jax.measure`.
    """

    name: str
    config: Config
    base: str = ""
    evaluations: tuple[Evaluation, ...] = ()
    measurements: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a file of `configs/paper` lists.

    Attributes:
        name: of the sweep.
        scale: `full`, `small` or `digits`.
        folder: that holds the run folders.
        runs: in their order; a base comes before its branches.
    """

    name: str
    scale: str
    folder: Path
    runs: tuple[PlannedRun, ...]


def from_plan(values: Mapping[str, Any], folder: Path | None = None) -> Sweep:
    """A sweep from the `ConfigDict` of a file of `configs/paper`.

    Args:
        values: of the file.
        folder: for the run folders, instead of the file's.

    Raises:
        ConfigError: if it is no sweep, a run's config is wrong, or a base is not listed before.
    """
    if "runs" not in values or "sweep" not in values:
        raise ConfigError(
            "--config: a sweep needs a file of configs/paper, such as configs/paper/table1.py:small"
        )
    folder = Path(values["folder"]) if folder is None else folder
    runs: dict[str, PlannedRun] = {}
    for each in values["runs"]:
        config = from_config_dict(each["config"])
        if each["base"]:
            if each["base"] not in runs:
                raise ConfigError(f"run {each['name']}: its base {each['base']} must come before")
            config = dataclasses.replace(config, init_from=str(folder / each["base"]))
        runs[each["name"]] = PlannedRun(
            name=each["name"],
            config=config,
            base=each["base"],
            evaluations=tuple(
                Evaluation(e["label"], tuple(e["attacks"]), e["examples"])
                for e in each["evaluations"]
            ),
            measurements=tuple(each["measurements"]),
        )
    return Sweep(values["sweep"], values["scale"], folder, tuple(runs.values()))


@dataclasses.dataclass(frozen=True)
class Part:
    """One of several shares of a sweep's runs, each made by a process of its own.

    Attributes:
        number: from 1.
        count: of the shares.
    """

    number: int = 1
    count: int = 1

    @classmethod
    def from_flag(cls, text: str | None) -> Part:
        """`I/N`; without one, all runs.

        Raises:
            ConfigError: if it is not of that form.
        """
        if text is None:
            return cls()
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise ConfigError(f"--part: must be I/N with I from 1 to N, got {text!r}")
        return cls(int(number), int(count))

    def of(self, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
        """This share: every N-th run, those first that wait for no other share's base."""
        own = list(runs[self.number - 1 :: self.count])
        names = {planned.name for planned in own}
        return sorted(own, key=lambda planned: bool(planned.base) and planned.base not in names)


def run(sweep: Sweep, part: Part = Part()) -> int:
    """Does what is missing, one run after the other.

    A run that fails is named, and so are its branches, which cannot begin; the others go on. What
    another process is at is waited for; a base that a share needs and nobody makes, it makes.

    Args:
        sweep: what is wanted.
        part: which of its runs; other processes make the others, in the same folder.

    Returns:
        0; 1 if a run failed; 128 plus the signal's number if it was interrupted: the same call
        continues.
    """
    runs = part.of(sweep.runs)
    for number, planned in enumerate(runs, 1):
        if missing := what_is_missing(sweep, planned):
            distributed.say(f"  {number}/{len(runs)} {planned.name}: {', '.join(missing)}")
    failed: dict[str, str] = {}
    by_name = {planned.name: planned for planned in sweep.runs}
    for number, planned in enumerate(runs, 1):
        if not what_is_missing(sweep, planned):
            continue
        left = [p for p in runs[number - 1 :] if p.name not in failed]
        title = f"[{number}/{len(runs)}] {planned.name}: {time_left(sweep, left)}"
        for each in (by_name.get(planned.base), planned):
            code = 0 if each is None else _make(sweep, each, title, failed)
            if code:
                return code
    for name, reason in failed.items():
        distributed.say(f"failed: {name}: {reason}")
    done = len(runs) - len([planned for planned in runs if planned.name in failed])
    distributed.say(f"\n{sweep.name} ({sweep.scale}): {done} of {len(runs)} runs are complete")
    if part.count == 1:
        distributed.say(f"python launch.py --job=report --workdir={sweep.folder}")
    return 1 if failed else 0


def _make(sweep: Sweep, planned: PlannedRun, title: str, failed: dict[str, str]) -> int:
    """Makes what a run misses; returns the signal that interrupted it, or 0."""
    is_waiting = False
    while planned.name not in failed and (missing := what_is_missing(sweep, planned)):
        if planned.base in failed:
            failed[planned.name] = f"its base {planned.base} failed"
            break
        if not is_waiting:
            distributed.say(f"\n{title}")
        try:
            if code := _complete(sweep, planned, missing):
                return code
        except FolderInUseError as error:
            if not is_waiting:
                distributed.say(f"waiting: {error}")
            is_waiting = True
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            continue
        except UserError as error:
            failed[planned.name] = str(error)
            distributed.say(f"failed: {planned.name}: {error}")
            break
        jax.clear_caches()  # the next run compiles programs of its own
    return 0


@distributed.decided_by_first
def what_is_missing(sweep: Sweep, planned: PlannedRun) -> list[str]:
    """`training`, `evaluation [label]`, `measurement`: what a run still needs."""
    folder = sweep.folder / planned.name
    if trained_epochs(folder) < planned.config.epochs:
        evaluations = [_shown(e) for e in planned.evaluations]
        return ["training", "evaluation", *evaluations, *planned.measurements]
    own = Evaluation("", planned.config.eval.attacks, planned.config.eval.examples)
    missing = [_shown(e) for e in (own, *planned.evaluations) if not _is_done(folder, planned, e)]
    return missing + [m for m in planned.measurements if not _is_measured(folder, planned, m)]


@distributed.decided_by_first
def trained_epochs(folder: Path) -> int:
    """Number of epochs that a run's metrics report."""
    path = folder / METRICS
    records = read_json_lines(path) if path.is_file() else []
    return max((record.get("epoch", 0) for record in records), default=0)


@distributed.decided_by_first
def time_left(sweep: Sweep, left: Iterable[PlannedRun]) -> str:
    """An estimate for training, from the seconds that this folder's runs took so far."""
    seconds = work = 0.0
    for planned in sweep.runs:
        path = sweep.folder / planned.name / METRICS
        if path.is_file():
            records = read_json_lines(path)
            seconds += sum(record.get("seconds", 0) for record in records)
            work += len(records) * passes_per_image(planned.config)
    to_do = 0.0
    for planned in left:
        done = trained_epochs(sweep.folder / planned.name)
        if done == 0 and planned.base:
            base = next(p for p in sweep.runs if p.name == planned.base)
            done = base.config.epochs
        to_do += max(planned.config.epochs - done, 0) * passes_per_image(planned.config)
    if not work:
        return "time left not known yet"
    hours = seconds / work * to_do / 3600
    return f"about {hours:.1f} h of training left" if hours >= 0.1 else "minutes of training left"


def passes_per_image(config: Config) -> float:
    """Forward passes of one training image in one epoch, a backward pass counted as one or two."""
    try:
        if not methods.from_config(config).is_adversarial:
            return 3
    except UserError:  # one's own, which cannot be imported: the run itself will say so
        pass
    clean_gradient = config.diagnostics or any(
        start is not None for start in optimizers.start_epochs(config.agr)
    )
    return 2 * config.attack.steps + 3 + (3 if clean_gradient else 1)


def _complete(sweep: Sweep, planned: PlannedRun, missing: Sequence[str]) -> int:
    folder, config = sweep.folder / planned.name, planned.config
    if "training" in missing or "evaluation" in missing:
        code = train_run(config, folder)
        if code:
            return code
    whole = Run.from_config(config, folder)
    for each in planned.evaluations:
        if _is_done(folder, planned, each):
            continue
        part = whole.with_eval(attacks=each.attacks, examples=each.examples)
        with locked(folder):
            records = evaluate_run(part, label=each.label)
        distributed.say(f"\n{planned.name}\n\n{render_table(records)}")
    for name in planned.measurements:
        if not _is_measured(folder, planned, name):
            with locked(folder):
                measure_run(whole, name)
    return 0


@distributed.decided_by_first
def _is_measured(folder: Path, planned: PlannedRun, name: str) -> bool:
    """Whether the last checkpoint has this measurement, of the run's last epoch."""
    try:
        path = folder / MEASUREMENTS / f"{name}.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        return bool(record["epoch"] == planned.config.epochs)
    except (OSError, ValueError, KeyError, TypeError):
        return False


@distributed.decided_by_first
def _is_done(folder: Path, planned: PlannedRun, wanted: Evaluation) -> bool:
    """Whether the last checkpoint has this evaluation, and the average if the run keeps one."""
    kept = ("last", "average") if planned.config.averaging.decay else ("last",)
    return all(
        _has(folder, planned, which, wanted)
        for which in kept
        if which in planned.config.eval.checkpoints
    )


def _has(folder: Path, planned: PlannedRun, which: str, wanted: Evaluation) -> bool:
    title = f"{which}-{wanted.label}" if wanted.label else which
    attacks = set(named.names(wanted.attacks))
    asked: dict[str, Any] = {"epoch": planned.config.epochs}
    if wanted.examples:
        asked["examples"] = wanted.examples
    for path in (folder / EVALUATIONS).glob(f"{title}*.json"):
        if record_files.file_title(path) != title:
            continue
        if not wanted.examples and record_files.is_part(path):
            continue
        if planned.config.data.name == "image_folder" and "-first" in path.stem:
            continue  # of an earlier version: the first images are those of the first classes
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found = record_files.results(record, named.maker(planned.config), asked)
            if attacks <= {result.name for result in found if not result.reason}:
                return True
        except (OSError, ValueError, AttributeError):  # damaged: what it holds is not there
            continue
    return False


def _shown(evaluation: Evaluation) -> str:
    return f"evaluation {evaluation.label}".strip()
