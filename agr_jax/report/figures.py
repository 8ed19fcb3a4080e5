"""The paper's figures from runs, drawn with matplotlib in colours that all can tell apart."""

from __future__ import annotations

import collections
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from agr_jax import methods
from agr_jax.report.page import Picture
from agr_jax.report.paired import mean_and_deviation
from agr_jax.report.run_records import RunRecord, read_diagnostics
from agr_jax.report.tables import arm_order, complete

# Okabe and Ito's palette, safe for the colour-blind; line styles differ too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
STYLES = ("-", "--", "-.", ":")
TITLES = {
    "figure1": "Figure 1: cosine of clean and adversarial gradient by layer",
    "figure3": "Figure 3: AWP and AVmixup with AGR",
    "figure4": "Figure 4: distance to the decision boundary",
    "figure5": "Figure 5: loss along a random direction of the weights",
    "figure6": "Figure 6: loss by epoch",
    "figure7": "Figure 7: fixed share of the adversarial gradient",
    "figure8": "Figure 8: time and memory",
}


def draw(name: str, runs: Sequence[RunRecord]) -> Picture | None:
    """A figure of `TITLES`, or AGR-small's `tradeoff` or `layers`; `None` if no run has its data.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    caption = _DRAWINGS[name](figure, runs)
    if caption is None:
        return None
    files = []
    for kind, metadata in (("svg", {"Date": None}), ("png", {})):
        stream = io.BytesIO()
        with rc_context({"svg.hashsalt": name}):  # else names within the file are random
            figure.savefig(stream, format=kind, dpi=150, metadata=metadata)
        files.append(stream.getvalue())
    return Picture(name, caption, *files)


def _look(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": STYLES[index % len(STYLES)],
    }


def _cosines(figure: Any, runs: Sequence[RunRecord]) -> str | None:
    """Kernels of the first and last layer and of those between, smoothed over 1 % of the steps."""
    found = [(run, d) for run in runs if (d := read_diagnostics(run)) is not None]
    if not found:
        return None
    # The paper's is AT from the start.
    run, measured = min(found, key=lambda each: (each[0].arm != "off", -len(each[1].steps)))
    kernels = [i for i, name in enumerate(measured.names) if name.endswith("kernel")]
    chosen = [
        kernels[i] for i in np.unique(np.linspace(0, len(kernels) - 1, 6).round().astype(int))
    ]
    axes = figure.add_subplot()
    window = max(1, len(measured.steps) // 100)
    for index, leaf in enumerate(chosen):
        smooth = np.convolve(measured.cosine[:, leaf], np.ones(window) / window, "valid")
        steps = np.asarray(measured.steps)[window - 1 :]
        axes.plot(steps, smooth, label=measured.names[leaf], linewidth=1.2, **_look(index))
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.set(xlabel="training step", ylabel="cosine of clean and adversarial gradient")
    figure.legend(fontsize="small", ncols=3, loc="outside upper center")
    return f"{run.title}, {run.setting}, run {run.name}; running mean over {window} steps."


def _bars(figure: Any, runs: Sequence[RunRecord]) -> str | None:
    wanted = [
        r for r in complete(runs) if r.method in ("awp", "avmixup") and r.arm in ("off", "agr")
    ]
    if not wanted:
        return None
    wanted = [run for run in wanted if run.setting == wanted[0].setting]
    wanted.sort(key=lambda run: (run.method, run.arm != "off", run.name))
    attacks = [a for a in ("clean", "pgd20", "spsa") if any(a in run.attacks for run in wanted)]
    by_title: dict[str, list[RunRecord]] = {}
    for run in wanted:
        by_title.setdefault(run.title, []).append(run)
    axes = figure.add_subplot()
    width = 0.8 / len(by_title)
    for index, (title, repeated) in enumerate(by_title.items()):
        accuracies = [
            [100 * run.attacks[a].accuracy for run in repeated if a in run.attacks] or [np.nan]
            for a in attacks
        ]
        means, deviations = zip(*map(mean_and_deviation, accuracies), strict=True)
        places = np.arange(len(attacks)) + (index - (len(by_title) - 1) / 2) * width
        bars = axes.bar(
            places,
            means,
            width,
            yerr=None if None in deviations else deviations,
            label=title,
            color=COLOURS[index % len(COLOURS)],
            hatch="//" if repeated[0].arm == "agr" else "",
            edgecolor="white",
        )
        axes.bar_label(bars, fmt="%.1f", fontsize="x-small")
    titles = {"clean": "clean", "pgd20": "PGD-20", "spsa": "SPSA"}
    axes.set_xticks(np.arange(len(attacks)), [titles[a] for a in attacks])
    axes.set(ylabel="accuracy, %")
    axes.legend(fontsize="small")
    repetitions = {len(repeated) for repeated in by_title.values()}
    seeds = "one seed" if repetitions == {1} else f"mean of up to {max(repetitions)} seeds"
    return f"{wanted[0].setting}; last epoch, {seeds}."


def _boundary(figure: Any, runs: Sequence[RunRecord]) -> str | None:
    found = [run for run in complete(runs) if "boundary" in run.measurements]
    if not found:
        return None
    axes = figure.add_subplot()
    for index, run in enumerate(found):
        steps = np.sort(run.measurements["boundary"]["steps"])
        axes.plot(np.arange(1, len(steps) + 1), steps, label=run.title, **_look(index))
    measured = found[0].measurements["boundary"]
    axes.set(
        xlabel="direction, sorted by distance",
        ylabel="steps of 1/255 until the prediction changes",
    )
    axes.legend()
    return (
        f"{measured['images']} correctly classified test images, {measured['directions']} random "
        f"directions (signs) each, at most {measured['most_steps']} steps; {found[0].setting}."
    )


def _landscape(figure: Any, runs: Sequence[RunRecord]) -> str | None:
    found = [run for run in complete(runs) if "landscape" in run.measurements]
    if not found:
        return None
    panels = (("filter_normalised", "filter-normalised"), ("raw", "raw Gaussian"))
    for place, (key, title) in enumerate(panels, 1):
        axes = figure.add_subplot(1, 2, place)
        for index, run in enumerate(found):
            curve = run.measurements["landscape"][key]
            colour = COLOURS[index % len(COLOURS)]
            for kind, style in (("clean", "--"), ("adversarial", "-")):
                axes.plot(
                    curve["alpha"],
                    curve[f"{kind}_loss"],
                    style,
                    color=colour,
                    label=f"{run.title}, {kind}",
                )
        axes.set(xlabel="alpha", ylabel="cross-entropy, nats", title=title)
        axes.legend(fontsize="x-small")
    return f"Mean over {_images(found[0].measurements['landscape'])}; {found[0].setting}."


def _images(measured: Mapping[str, Any]) -> str:
    """Which test images something was measured on; files of earlier versions: the first."""
    if "drawn" in measured.get("selection", ""):
        return f"{measured['images']} drawn test images"
    return f"the first {measured['images']} test images"


def _losses(figure: Any, runs: Sequence[RunRecord]) -> str | None:
    found = [r for r in complete(runs) if r.method == "at" and r.arm in ("off", "agr")]
    if not found:
        return None
    # One seed and setting; a branch goes on from the curve of its base.
    found = [run for run in found if _family(run) == min(map(_family, found))]
    found.sort(key=lambda run: run.arm != "off")
    by_name = {run.name: run for run in runs}
    axes = figure.add_subplot()
    for index, run in enumerate(found):
        epochs = [*(by_name[run.base].metrics if run.base in by_name else ()), *run.metrics]
        for kind, style in (("clean", "--"), ("adversarial", "-")):
            points = [(m["epoch"], m[f"{kind}_loss"]) for m in epochs if f"{kind}_loss" in m]
            axes.plot(
                [epoch for epoch, _ in points],
                [loss for _, loss in points],
                style,
                color=COLOURS[index % len(COLOURS)],
                label=f"{run.title}, {kind}",
            )
    axes.set(xlabel="epoch", ylabel="training loss, nats")
    axes.legend(fontsize="small")
    return (
        "Mean over each epoch's batches, augmented, in training mode; "
        f"{found[0].setting}, seed {found[0].config.seed}."
    )


def _taus(figure: Any, runs: Sequence[RunRecord]) -> str | None:
    found = [r for r in complete(runs) if r.arm.startswith("tau_") and "clean" in r.attacks]
    if not found:
        return None
    # Branches of one base: of the setting, method and seed that has most of them.
    counts = collections.Counter(map(_family, found))
    family = max(sorted(counts), key=lambda family: counts[family])
    found = [run for run in found if _family(run) == family]
    found.sort(key=lambda run: run.config.agr.tau)
    robust = "fast" if all("fast" in run.attacks for run in found) else "pgd20"
    axes = figure.add_subplot()
    for index, (attack, marker) in enumerate((("clean", "o"), (robust, "s"))):
        points = [
            (run.config.agr.tau, 100 * run.attacks[attack].accuracy)
            for run in found
            if attack in run.attacks
        ]
        title = {"clean": "clean", "pgd20": "PGD-20", "fast": "APGD-CE + targeted APGD"}[attack]
        axes.plot(
            *zip(*points, strict=True), marker=marker, label=f"fixed tau, {title}", **_look(index)
        )
        for run in complete(runs):
            if run.arm == "agr" and _family(run) == family and attack in run.attacks:
                value = 100 * run.attacks[attack].accuracy
                axes.axhline(value, linewidth=0.8, alpha=0.6, label=f"AGR, {title}", **_look(index))
    axes.set(xlabel="tau, share of the adversarial gradient", ylabel="accuracy, %")
    axes.legend()
    first = found[0]
    method = methods.title(first.method)
    return (
        f"{method}, {first.setting}, seed {first.config.seed}; the lines are AGR's cosine (GICS)."
    )


def _trade_off(figure: Any, runs: Sequence[RunRecord]) -> str | None:
    found = [
        run
        for run in complete(runs)
        if run.method == "at"
        and {"clean", "fast"} <= run.attacks.keys()
        and (run.base or run.arm == "best")
    ]
    if not found:
        return None
    setting, found = _of_one_setting(found)
    arms = sorted({r.arm for r in found if not r.arm.startswith("tau_")}, key=arm_order)
    base_of = {run.config.seed: run.base for run in found if run.base}
    panels: dict[str, list[RunRecord]] = collections.defaultdict(list)
    for run in found:
        # A run from its own start stands beside the branches of its seed.
        panels[run.base or base_of.get(run.config.seed, run.name)].append(run)
    columns = min(len(panels), 3)
    places = figure.subplots(
        -(-len(panels) // columns), columns, sharex=True, sharey=True, squeeze=False
    ).flat
    bases = len({run.base for run in found if run.base})
    for (base, of_base), axes in zip(sorted(panels.items()), places, strict=False):
        _trade_off_of_base(axes, of_base, arms)
        axes.set_title(base, fontsize="medium")
        axes.set(xlabel="clean accuracy, %")
        axes.margins(x=0.1)
        if axes.get_subplotspec().is_first_col():
            axes.set(ylabel="under APGD-CE + targeted APGD, %")
    for axes in places:  # those that the last row has left
        axes.set_axis_off()
    labels = {label: handle for axes in figure.axes for handle, label in _legend(axes)}
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=3)
    count = f"{bases} {'base' if bases == 1 else 'bases'}"
    alone = sorted(run.name for run in found if not run.base)
    started = f"; {', '.join(alone)} from the start, beside the base of its seed" if alone else ""
    return (
        f"Clean accuracy against robustness, {setting}; {count}{started}. Further up and to the "
        "right is better; between two networks of fixed tau, a choice by chance reaches the line."
    )


def _of_one_setting(runs: Sequence[RunRecord]) -> tuple[str, list[RunRecord]]:
    """The commonest setting, and its runs."""
    setting = collections.Counter(run.setting for run in runs).most_common(1)[0][0]
    return setting, [run for run in runs if run.setting == setting]


def _legend(axes: Any) -> list[tuple[Any, str]]:
    return list(zip(*axes.get_legend_handles_labels(), strict=True))


def _trade_off_of_base(axes: Any, runs: Sequence[RunRecord], arms: Sequence[str]) -> None:
    def points(runs: Sequence[RunRecord]) -> tuple[list[float], list[float]]:
        clean, robust = ([100 * run.attacks[a].accuracy for run in runs] for a in ("clean", "fast"))
        return clean, robust

    fixed = [run for run in runs if run.arm.startswith("tau_")]
    line = sorted(fixed, key=lambda run: run.config.agr.tau)
    if line:
        line += [run for run in runs if run.arm == "clip"]
        look = {"color": COLOURS[0], "linewidth": 1, "marker": "o", "markersize": 4}
        axes.plot(*points(line), label="fixed tau, to AT + clip", **look)
    for run, x, y in zip(line, *points(line), strict=True):
        if run.arm != "clip":
            at = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": "x-small"}
            axes.annotate(f"{run.config.agr.tau:g}", (x, y), **at)
    for index, arm in enumerate(arms, 1):
        of_arm = [run for run in runs if run.arm == arm]
        # Smaller and smaller, so that none hides another.
        size = max(80 - 10 * index, 20)
        look = {"color": COLOURS[index % len(COLOURS)], "marker": "sD^vP*X"[index % 7], "s": size}
        if of_arm:
            axes.scatter(*points(of_arm), label=of_arm[0].title, zorder=3, **look)


def _layers(figure: Any, runs: Sequence[RunRecord]) -> str | None:
    """Of the measurement `mechanism`: files of earlier versions do not tell leaves apart."""
    found = [run for run in runs if "by_leaf" in run.measurements.get("mechanism", {})]
    if not found:
        return None
    setting, found = _of_one_setting(found)
    leaves = [run.measurements["mechanism"]["by_leaf"] for run in found]
    names = leaves[0]["names"]
    pairs = [(run, leaf) for run, leaf in zip(found, leaves, strict=True) if leaf["names"] == names]
    kernels = [index for index, name in enumerate(names) if name.endswith("kernel")]
    share = 100 * np.array([leaf["projected"] for _, leaf in pairs])  # [run, leaf]
    most = np.argsort(-share.max(0), kind="stable")[:15]
    shown = sorted(index for index in most if share[:, index].any())
    left, right = figure.subplots(1, 2)
    for index, (run, leaf) in enumerate(pairs):
        look = {"color": COLOURS[index % len(COLOURS)], "marker": "osD^v"[index % 5]}
        cosines = np.array(leaf["cosine"])[kernels]
        left.plot(cosines, label=run.name, linewidth=1.2, markersize=4, **look)
        height = np.arange(len(shown)) + 0.15 * (index - (len(pairs) - 1) / 2)  # beside each other
        right.plot(share[index, shown], height, linestyle="none", markersize=4, **look)
    left.set(xlabel="kernel, in the order of the parameters", ylabel="cosine of g_c and g_a, mean")
    left.set_ylim(top=1)
    right.set(xlabel="batches in which GOP projects, %")
    right.set_yticks(range(len(shown)), [names[index] for index in shown], fontsize="x-small")
    right.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=4)
    return (
        "Clean and adversarial gradient of each kernel, and the leaves that GOP projects most; "
        f"{share[:, kernels].max(initial=0):.3g} % of batches is the most for a kernel. {setting}."
    )


def _family(run: RunRecord) -> tuple[str, str, int]:
    return run.setting, run.method, run.config.seed


def _costs(figure: Any, runs: Sequence[RunRecord]) -> str | None:
    # Only what was run alike can be compared: the same data, seed and device, from a base or not.
    alike: dict[tuple[Any, ...], dict[str, RunRecord]] = collections.defaultdict(dict)
    for run in sorted(runs, key=lambda run: (run.method, run.arm != "off")):
        if run.metrics and run.arm in ("off", "agr") and not run.config.diagnostics:
            group = run.setting, run.config.seed, bool(run.base), run.device
            alike[group].setdefault(run.title, run)
    if not alike:
        return None
    found = max(alike.values(), key=len)
    titles = list(found)
    # The first epoch of a start compiles; the fastest one is the least disturbed.
    seconds = [min(m["seconds"] for m in r.metrics[1:] or r.metrics) for r in found.values()]
    memory = [max(m.get("peak_memory_mb", np.nan) for m in r.metrics) for r in found.values()]
    quantities = (
        ("seconds of the fastest epoch", "%.3g", seconds),
        ("peak memory, MB", "%.0f", memory),
    )
    for place, (label, digits, values) in enumerate(quantities, 1):
        axes = figure.add_subplot(1, 2, place)
        axes.set(xlabel=label)
        if not np.isfinite(values).any():
            axes.text(0.5, 0.5, "not recorded", ha="center", transform=axes.transAxes)
            axes.set(xticks=[], yticks=[])
            continue
        bars = axes.barh(titles, values, color=COLOURS[place - 1])
        axes.bar_label(bars, fmt=digits, fontsize="x-small", padding=2)
        axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.tick_params(labelleft=place == 1)
    first = next(iter(found.values()))
    device = f", on {first.device}" if first.device else ""
    return (
        "As the runs recorded them, other work on the machine included; the memory is the "
        "most since the process began, earlier runs of the same sweep included. "
        f"{first.setting}{device}."
    )


_DRAWINGS: dict[str, Callable[[Any, Sequence[RunRecord]], str | None]] = {
    "figure1": _cosines,
    "figure3": _bars,
    "figure4": _boundary,
    "figure5": _landscape,
    "figure6": _losses,
    "figure7": _taus,
    "figure8": _costs,
    "tradeoff": _trade_off,
    "layers": _layers,
}
