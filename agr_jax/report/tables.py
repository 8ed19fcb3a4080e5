"""The paper's tables from runs, each beside the paper's own numbers."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agr_jax import methods
from agr_jax.attacks import named
from agr_jax.config import to_dict
from agr_jax.data import sources
from agr_jax.report import paper_numbers
from agr_jax.report.page import Table
from agr_jax.report.paired import percent
from agr_jax.report.run_records import (
    Found,
    RunRecord,
    arm_title,
    read_diagnostics,
)

TITLES = {
    "table1": "Table 1: accuracy without and with AGR",
    "table2": "Table 2: L2 and L1 attacks",
    "table3": "Table 3: AGR without and with GOP",
    "table4": "Table 4: how the gradients are mixed",
}
_Key = tuple[str, str, str, str]  # setting, data set, method, arm


def complete(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Finished runs that are no base of others, nor, beside the same without, for diagnostics."""
    bases = {run.base for run in runs}
    found = [run for run in runs if run.finished and run.name not in bases]
    plain = {_identity(run) for run in found if not run.config.diagnostics}
    return [run for run in found if not run.config.diagnostics or _identity(run) not in plain]


def _identity(run: RunRecord) -> tuple[str, str, int]:
    return run.setting, run.title, run.config.seed


def paper_table(name: str, runs: Sequence[RunRecord]) -> list[str | Table]:
    """One of the paper's tables: ours, mean and deviation over seeds, and the paper's.

    Rows of which there is no run say so, and what the paper's scale would cost.
    """
    columns = paper_numbers.COLUMNS[name]
    wanted = [r for r in complete(runs) if r.arm in paper_numbers.ROWS[name]]
    groups: dict[_Key, list[RunRecord]] = collections.defaultdict(list)
    for run in wanted:
        groups[run.setting, run.config.data.name, run.method, run.arm].append(run)
    blocks: list[str | Table] = []
    present = set()
    seeds = set()
    for setting in sorted({key[0] for key in groups}):
        rows = []
        for (of, data, method, arm), group in sorted(groups.items(), key=_by_method_and_arm):
            attacks = {attack for run in group for attack in run.attacks}
            if of == setting and attacks & set(_measured(columns)) - {"clean"}:
                rows += [_row(name, data, method, arm, part) for part in _repetitions(group)]
                seeds.add((setting, frozenset(run.config.seed for run in group)))
                if _at_the_papers_scale(group[0]):
                    present.add((data, _model_of(group), method, arm))
        if rows:
            head = ("", *(named.title(c) for c in columns), *_extra_titles(name), "runs")
            blocks += [f"**{setting}**", Table(head, tuple(rows))]
    if not blocks:
        blocks.append("No run in this folder belongs to this table.")
    missing = _missing(name, present)
    if missing:
        blocks.append(
            Table(
                (
                    "not run at the paper's scale",
                    *(named.title(c) for c in columns),
                    "3 seeds need about",
                ),
                missing,
            )
        )
    note = (
        "Accuracy in percent, last epoch; ± is the standard deviation over runs (seeds). "
        "“Of 1,000” is of the first 1,000 test images, unless it says that they were drawn. "
        "The paper's number stands in brackets where it is known here. Device-hours: operations of "
        f"training at {paper_numbers.MEASURED_TFLOPS:.0f} TFLOP/s, which PreAct-ResNet-18 reached "
        "on one H200 with TF32 products; for other networks that is an assumption."
    )
    if len(seeds) > len({setting for setting, _ in seeds}):
        note += " Rows are of different seeds: the paired comparison below is of the same ones."
    blocks.append(note)
    return blocks


def _repetitions(group: Sequence[RunRecord]) -> list[Sequence[RunRecord]]:
    """The runs of a row: all, if they differ in their seeds alone, or else each apart."""
    distinct = len({run.config.seed for run in group}) == len(group)
    same = all(_recipe(run) == _recipe(group[0]) for run in group)
    return [group] if distinct and same else [[run] for run in group]


def _recipe(run: RunRecord) -> dict[str, Any]:
    """The settings that make a run what it is, without its seed."""
    values = to_dict(run.config)
    for name in ("name", "seed", "init_from", "eval", "measure", "checkpoints", "diagnostics"):
        del values[name]
    for name in ("dir", "download", "cache", "device_budget_mb", "picture"):
        del values["data"][name]
    return values


def _measured(columns: Sequence[str]) -> tuple[str, ...]:
    return (*columns, "fast") if "autoattack" in columns else tuple(columns)


def _row(
    name: str, data: str, method: str, arm: str, group: Sequence[RunRecord]
) -> tuple[str, ...]:
    columns = paper_numbers.COLUMNS[name]
    paper = paper_numbers.reported(name, data, _model_of(group), method, arm)
    cells = []
    for column in columns:
        found = [run.attacks[column] for run in group if column in run.attacks]
        mark = ""
        if not found and column == "autoattack":
            found = [run.attacks["fast"] for run in group if "fast" in run.attacks]
            mark = " (fast)"
        cells.append(_cell(found, len(group), mark, paper.get(column)))
    extra = [_gop_frequency(group)] if name == "table3" else []
    title = f"{methods.title(method)} {arm_title(arm)}".strip()
    return (title, *cells, *extra, str(len(group)) if len(group) > 1 else group[0].name)


def _cell(found: Sequence[Found], runs: int, mark: str, paper: float | None) -> str:
    text = "not run"
    if found:
        text = percent([one.accuracy for one in found]) + mark
        fewest = min(found, key=lambda one: one.examples)
        if {one.examples for one in found} != {10_000}:
            text += f" of {fewest.images}"
        text += of_fewer(len(found), runs)
    return text if paper is None else f"{text} [{paper:.2f}]"


def of_fewer(count: int, whole: int) -> str:
    """What a mean says of runs that are missing."""
    return "" if count == whole else f" ({count} of {whole} runs)"


def _extra_titles(name: str) -> tuple[str, ...]:
    return ("conflicting leaves",) if name == "table3" else ()


def _gop_frequency(group: Sequence[RunRecord]) -> str:
    """Share of leaves whose gradients conflict, which GOP projects, over the branch's steps."""
    values = []
    for run in group:
        measured = read_diagnostics(run)
        if measured is not None:
            values.append(float((measured.cosine < 0).mean()))
        elif run.metrics and "conflicting" in run.metrics[-1]:
            epochs = [m["conflicting"] for m in run.metrics if "conflicting" in m]
            values.append(float(np.mean(epochs)))
    return percent(values) + " %" if values else "not measured"


def _model_of(group: Sequence[RunRecord]) -> str:
    return group[0].config.model.name


def _by_method_and_arm(item: tuple[_Key, list[RunRecord]]) -> tuple[str, int, str]:
    (_, data, method, arm), _ = item
    order = [*methods.METHODS, "awp"]
    return data, order.index(method) if method in order else len(order), arm_order(arm)


def arm_order(arm: str) -> str:
    """Sorts arms: AT, its controls, parts of AGR, fixed mixes, AGR."""
    first = ("off", "clip", "agr_no_gop", "agr_no_clip", "mean")
    return f"{first.index(arm)}" if arm in first else f"8{arm}" if arm != "agr" else "9"


def _missing(name: str, present: set[tuple[str, str, str, str]]) -> tuple[tuple[str, ...], ...]:
    """The paper's rows of which there is no run at its own scale."""
    columns = paper_numbers.COLUMNS[name]
    everywhere = name in ("table1", "table2")
    rows = []
    for data in paper_numbers.DATA_SETS if everywhere else ("cifar10",):
        for model in paper_numbers.MODELS if everywhere else ("preactresnet18",):
            for method in paper_numbers.METHODS:
                for arm in paper_numbers.ROWS[name]:
                    if (data, model, method, arm) in present:
                        continue
                    paper = paper_numbers.reported(name, data, model, method, arm)
                    hours = paper_numbers.device_hours(data, model, arm)
                    title = f"{methods.title(method)} {arm_title(arm)}".strip()
                    rows.append(
                        (
                            f"{sources.TITLES[data]}, {model}: {title}",
                            *(f"[{paper[c]:.2f}]" if c in paper else "not run" for c in columns),
                            f"{hours:.0f} device-hours",
                        )
                    )
    return tuple(rows)


def _at_the_papers_scale(run: RunRecord) -> bool:
    config = run.config
    whole = not config.data.train_examples and not config.model.width
    return whole and config.epochs == paper_numbers.EPOCHS


def overview(runs: Sequence[RunRecord], problems: Mapping[str, str]) -> list[str | Table]:
    """All runs with their state, and what could not be used."""
    rows = tuple(
        (
            run.name,
            run.title,
            f"{run.epochs} of {run.config.epochs}",
            str(run.config.seed),
            ", ".join(run.attacks) or "none",
            ", ".join(run.measurements) or "none",
        )
        for run in runs
    )
    head = ("run", "method", "epochs", "seed", "evaluated", "measured")
    blocks: list[str | Table] = [Table(head, rows)] if rows else ["There are no runs here."]
    if problems:
        blocks += [
            "**Not used:**",
            Table(("folder or file", "reason"), tuple(sorted(problems.items()))),
        ]
    return blocks
