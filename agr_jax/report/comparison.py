"""AGR-small: AT, its controls and AGR from the same bases, and what `docs/experiments.md` asked."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agr_jax.attacks import named
from agr_jax.report.page import Table
from agr_jax.report.paired import mcnemar, mean_and_deviation
from agr_jax.report.run_records import Found, RunRecord, arm_title
from agr_jax.report.tables import arm_order, complete, of_fewer

SETTING = "CIFAR-10, preactresnet18 of width 16, 10,000 training images, 60 epochs"
BASES = 3
# Least change of accuracy against AT + clip, in points.
LEAST_CHANGE = {"clean": 0.5, "pgd20": -0.3, "fast": -0.3}
FRONT = ("tau_0", "tau_0.25", "tau_0.5", "tau_0.75", "tau_0.9")
_ATTACKS = tuple(LEAST_CHANGE)
_Families = Mapping[str, Mapping[str, RunRecord]]  # base -> arm -> run


def comparison(runs: Sequence[RunRecord]) -> list[str | Table]:
    """Accuracies, paired differences and the verdict.

    Runs belong together if they branch from the same base.
    """
    families: dict[str, dict[str, RunRecord]] = collections.defaultdict(dict)
    repeated = []
    for run in complete(runs):
        if run.base and run.method == "at":
            first = families[run.base].setdefault(run.arm, run)
            if first is not run:
                repeated.append(f"{run.name}, which has the base and the arm of {first.name}")
    families = {base: arms for base, arms in families.items() if "clip" in arms}
    if not families:
        return ["No base in this folder has a branch AT + clip, the control."]
    arms = sorted({arm for family in families.values() for arm in family}, key=arm_order)
    rows = []
    for base, family in sorted(families.items()):
        for arm in arms:
            if arm in family:
                cells = (_found_cell(family[arm], attack) for attack in _ATTACKS)
                rows.append((f"{base}: AT {arm_title(arm)}".strip(), *cells))
    alone = [r for r in complete(runs) if r.arm == "best" and not r.config.init_from]
    rows += [(r.name, *(_found_cell(r, attack) for attack in _ATTACKS)) for r in alone]
    blocks: list[str | Table] = [Table(("run", *map(named.title, _ATTACKS)), tuple(rows))]
    if repeated:
        blocks.append(f"Left out: {'; '.join(repeated)}.")
    for control in ("off", "clip"):
        differences_of = _differences(families, arms, control)
        if differences_of:
            title = f"AT {arm_title(control)}".strip()
            blocks += [
                f"**Differences to {title} of the same base**, points; in brackets images that "
                "only this run, and only the control, classifies correctly, and McNemar's p.",
                Table(("run", *map(named.title, _ATTACKS)), differences_of),
            ]
    of_small = {
        base: {arm: run for arm, run in family.items() if run.setting == SETTING}
        for base, family in families.items()
    }
    of_small = {base: family for base, family in of_small.items() if family}
    if of_small:
        blocks += [
            "**What `docs/experiments.md` asked**, point by point.",
            verdict(of_small, [run for run in alone if run.setting == SETTING]),
        ]
    return blocks


def verdict(families: _Families, alone: Sequence[RunRecord] = ()) -> Table:
    """The answers to what `docs/experiments.md` asked before the runs.

    Args:
        families: for each base its branches by their arms.
        alone: runs of the best recipe, from their own start.
    """
    rows = []
    answers: list[bool | None] = []
    for base, family in sorted(families.items()):
        shown = []
        for attack, least in LEAST_CHANGE.items():
            change = _change(family.get("agr"), family.get("clip"), attack)
            answer = None if change is None else change >= least
            answers.append(answer)
            size = "not run"
            if change is not None:
                counts = _counts(family["agr"].attacks[attack], family["clip"].attacks[attack])
                size = f"{change:+.2f}{counts}"
            shown.append(f"{named.title(attack)} {size}, at least {least:+.1f}: {_yes(answer)}")
        rows.append((f"{base}: AGR against AT + clip", "; ".join(shown)))
    answers += [None] * max(BASES - len(families), 0)
    first = min(families)  # the one base with every fixed tau
    above, reason = _above_the_front(families[first])
    rows.append((f"{first}: AGR above the front of fixed tau", f"{_yes(above)}{reason}"))
    for arm, name in (("agr", "AGR"), ("agr_no_clip", "AGR without clip")):
        distance = _above_the_line(families[first], arm)
        rows.append((f"{first}: {name} above the line through fixed tau", distance))
    answers.append(above)
    works = False if False in answers else None if None in answers else True
    count = f"{len(families)} of {BASES} bases" if len(families) < BASES else "all bases"
    rows.insert(0, ("AGR works", f"{_yes(works)} ({count})"))
    for run in alone:
        others = [each for family in families.values() for each in family.values()]
        better, named_so = _beats(run, others)
        rows.append((f"{run.name} beats every other arm", f"{_yes(better)}{named_so}"))
    return Table(("asked", "answer"), tuple(rows))


def _yes(answer: bool | None) -> str:
    return "not decided" if answer is None else "yes" if answer else "no"


def _change(ours: RunRecord | None, theirs: RunRecord | None, attack: str) -> float | None:
    """Difference of accuracy in points, where both saw the same images."""
    if ours is None or theirs is None:
        return None
    first, second = ours.attacks.get(attack), theirs.attacks.get(attack)
    if first is None or second is None or first.images != second.images:
        return None
    return round(100 * (first.accuracy - second.accuracy), 6)  # whole images, not rounding


def _above_the_front(family: Mapping[str, RunRecord]) -> tuple[bool | None, str]:
    """Whether no fixed mix is as good as AGR or better in both clean accuracy and `fast`."""
    as_good, unknown = [], False
    for arm in FRONT:
        changes = [_change(_fixed(family, arm), family.get("agr"), a) for a in ("clean", "fast")]
        known = [change for change in changes if change is not None]
        if len(known) == 2 and min(known) >= 0:
            as_good.append(arm_title(arm).removeprefix("+ "))
        unknown = unknown or len(known) < 2
    if as_good:
        return False, f": {', '.join(as_good)} as good or better in both"
    return (None if unknown else True), ""


def _fixed(family: Mapping[str, RunRecord], arm: str) -> RunRecord | None:
    """A run of fixed tau; the mean of both gradients is that of tau 0.5."""
    return family.get(arm) or (family.get("mean") if arm == "tau_0.5" else None)


def _above_the_line(family: Mapping[str, RunRecord], arm: str) -> str:
    """How far an arm's `fast` is above the line through fixed tau at its clean accuracy.

    Choosing between two networks by chance reaches the line between their points. AT + clip stands
    for tau 1. Behind it, where the records have them, the standard error over the images of `fast`:
    another sample of images, not another training, and clean accuracy taken as exact.
    """
    own = family.get(arm)
    runs = [_fixed(family, fixed) for fixed in FRONT] + [family.get("clip")]
    if any(_change(run, own, attack) is None for run in runs for attack in ("clean", "fast")):
        return "not decided"
    *points, (clean, fast, own) = (
        (100 * run.attacks["clean"].accuracy, 100 * run.attacks["fast"].accuracy, run)
        for run in (*runs, own)
        if run
    )
    points.sort(key=lambda point: point[:2])
    least, most = points[0][0], points[-1][0]
    if not least <= clean <= most:
        return f"its clean accuracy, {clean:.2f}, is outside of theirs, {least:.2f} to {most:.2f}"

    def height(line: tuple[Any, Any]) -> float:
        (x, y, _), (other_x, other_y, _) = line
        return float(np.interp(clean, (x, other_x), (y, other_y)))

    lines = itertools.combinations_with_replacement(points, 2)
    highest = max((each for each in lines if each[0][0] <= clean <= each[1][0]), key=height)
    (x, _, low), (other_x, _, high) = highest
    share = (clean - x) / (other_x - x) if other_x > x else 0.0
    masks = [run.attacks["fast"].correct for run in (own, low, high)]
    error = _standard_error(masks, (1, share - 1, -share))
    return f"{fast - height(highest):+.2f}{error} points of {named.title('fast')}"


def _standard_error(masks: Sequence[np.ndarray | None], weights: Sequence[float]) -> str:
    """That of a weighted sum of accuracies, from how it differs from image to image."""
    known = [mask for mask in masks if mask is not None]
    if len(known) < len(masks):
        return ""
    by_image = sum(weight * mask for weight, mask in zip(weights, known, strict=True))
    return f" ± {100 * np.std(by_image, ddof=1) / np.sqrt(len(known[0])):.2f}"


def _beats(run: RunRecord, others: Sequence[RunRecord]) -> tuple[bool | None, str]:
    """Whether a run is better than each other in both clean accuracy and `fast`."""
    unbeaten, unknown = [], not others
    for other in others:
        changes = [_change(run, other, attack) for attack in ("clean", "fast")]
        if any(change is not None and change <= 0 for change in changes):
            unbeaten.append(other.name)
        unknown = unknown or None in changes
    if unbeaten:
        return False, f": not {', '.join(unbeaten)}"
    return (None if unknown else True), ""


def _found_cell(run: RunRecord, attack: str) -> str:
    if attack not in run.attacks:
        return "not run"
    found = run.attacks[attack]
    return f"{100 * found.accuracy:.2f} of {found.images}"


def _differences(
    families: _Families, arms: Sequence[str], control: str
) -> tuple[tuple[str, ...], ...]:
    rows = []
    for arm in arms:
        if arm == control:
            continue
        means: dict[str, list[float]] = collections.defaultdict(list)
        for base, family in sorted(families.items()):
            if arm not in family or control not in family:
                continue
            cells = []
            for attack in _ATTACKS:
                ours, theirs = (family[a].attacks.get(attack) for a in (arm, control))
                if ours is None or theirs is None:
                    cells.append("not run")
                    continue
                if ours.images != theirs.images:
                    cells.append(f"not comparable: {ours.images} and {theirs.images} images")
                    continue
                change = 100 * (ours.accuracy - theirs.accuracy)
                means[attack].append(change)
                cells.append(f"{change:+.2f}{_counts(ours, theirs)}")
            rows.append((f"{base}: AT {arm_title(arm)}".strip(), *cells))
        if any(len(values) > 1 for values in means.values()):
            summary = []
            count = max(len(values) for values in means.values())
            for attack in _ATTACKS:
                values = means.get(attack, [])
                mean, deviation = mean_and_deviation(values) if values else (0.0, None)
                shown = "" if deviation is None else f" ± {deviation:.2f}"
                fewer = of_fewer(len(values), count)
                summary.append(f"{mean:+.2f}{shown}{fewer}" if values else "not run")
            rows.append((f"mean of {count} bases: AT {arm_title(arm)}".strip(), *summary))
    return tuple(rows)


def _counts(ours: Found, theirs: Found) -> str:
    if ours.correct is None or theirs.correct is None:
        return ""
    found = mcnemar(ours.correct, theirs.correct)
    return f" ({found.gained}/{found.lost}, p {found.p_value:.2g})"


def mechanism(runs: Sequence[RunRecord]) -> list[str | Table]:
    """First-order changes of both losses, as `measure.mechanism` found them."""
    measured = [run for run in runs if "mechanism" in run.measurements]
    if not measured:
        return ["Not measured: `--job=measure --config.measure.names=\"('mechanism',)\"`."]
    rows = []
    for run in measured:
        record = run.measurements["mechanism"]
        for way, change in record["change"].items():
            cells = [
                f"{change[q]['mean']:+.4f} ± {change[q]['std']:.4f}"
                for q in ("clean", "adversarial")
            ]
            rows.append((f"{run.name}: {way}", *cells, f"{change['norm']['mean']:.3f}"))
    head = ("base and gradient", "clean loss", "adversarial loss", "norm of the gradient")
    batches = measured[0].measurements["mechanism"]["batches"]
    note = (
        "Change of each loss, to first order, by an update of norm 1 against the gradient; mean "
        f"and standard deviation over {batches} batches, whose own gradients they are."
    )
    return [Table(head, tuple(rows)), note]
