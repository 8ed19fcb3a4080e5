"""What README and `docs/experiments.md` say of AGR-small is what the committed records say."""

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np

from agr_jax.report import write_report
from agr_jax.report.comparison import comparison
from agr_jax.report.paired import mcnemar
from agr_jax.report.run_records import read_run

DOCS = Path(__file__).parents[1] / "docs"
PAGE_ARMS = {"AT": "at", "AT + clip": "at_clip", "AGR": "agr"}
PAGE_ARMS |= {"AGR without clip": "agr_no_clip", "fixed tau 0.9 + clip": "tau_0.9"}
PAGE_ATTACKS = ("clean", "pgd20", "fast")


def accuracies(name):
    """A committed run's accuracies in percent: clean, PGD-20, APGD-CE + targeted APGD."""
    run = read_run(DOCS / "agr-small" / name)
    assert run.finished
    found = [run.attacks[attack] for attack in PAGE_ATTACKS]
    assert [each.examples for each in found] == [10_000, 10_000, 1_000]
    return [100 * each.accuracy for each in found]


def page_rows(text, columns):
    """Cells of a page's table rows, by their first."""
    row = re.compile(rf"^\| ([^|]+?) {'[|] ([^|]+?) ' * columns}\|$", re.MULTILINE)
    return {title: cells for title, *cells in row.findall(text) if cells[0][0] in "+-0123456789"}


def test_the_accuracies_are_those_of_the_records():
    result = (DOCS / "experiments.md").read_text().split("## Result")[1]
    bases, differences, alone = result.split("\n| arm |")[1:]
    found = {arm: [accuracies(f"{name}-{s}") for s in range(3)] for arm, name in PAGE_ARMS.items()}
    assert page_rows(bases, 3) == {
        arm: [" / ".join(f"{value:.2f}" for value in values) for values in of_bases]
        for arm, of_bases in found.items()
    }

    def spread(values, sign=""):
        return [f"{np.mean(v):{sign}.2f} ± {np.std(v, ddof=1):.2f}" for v in np.transpose(values)]

    control = np.array(found.pop("AT + clip"))
    assert page_rows(differences, 3) == {
        arm: spread(of_bases - control, "+") for arm, of_bases in found.items()
    }
    arms = {f"fixed tau {tau} + clip": f"tau_{float(tau)}-0" for tau in ("0.5", "0")}
    arms |= {f"fixed tau {tau} + clip": f"tau_{tau}-0" for tau in ("0.75", "0.25")}
    arms["AGR without GOP"] = "agr_no_gop-0"
    assert page_rows(alone, 3) == {
        arm: [f"{value:.2f}" for value in accuracies(name)] for arm, name in arms.items()
    }

    readme = (DOCS.parent / "README.md").read_text().split("## Does AGR work?")[1]
    best = [f"{value:.2f}" for value in accuracies("best-0")]
    shown = page_rows(readme.split("## Speed")[0], 3)
    assert list(shown.values()) == [
        spread(found["AT"]),
        spread(control),
        spread(found["AGR"]),
        best,
    ]
    assert " / ".join(best) in " ".join(result.split())
    on_cpu = read_run(DOCS / "agr-small-on-cpu/at-1")
    values = [100 * on_cpu.attacks[attack].accuracy for attack in PAGE_ATTACKS]
    assert f"{' / '.join(f'{value:.2f}' for value in values)} on the CPU" in result
    for path in DOCS.glob("agr-small*/*/evaluations/*.json"):
        record = json.loads(path.read_text())
        assert record["environment"]["commit"][:7] in result
        assert record["seed"] == read_run(path.parents[1]).config.seed


def test_the_answers_are_those_of_the_records():
    result = " ".join((DOCS / "experiments.md").read_text().split("## Result")[1].split())
    readme = " ".join((DOCS.parent / "README.md").read_text().split())
    for seed in range(3):
        agr, clip = (read_run(DOCS / f"agr-small/{arm}-{seed}") for arm in ("agr", "at_clip"))
        for attack in PAGE_ATTACKS:
            found = mcnemar(agr.attacks[attack].correct, clip.attacks[attack].correct)
            assert found.p_value < 3e-9
            counts = rf"\b{found.gained} and (the control )?{found.lost}\b"
            assert seed or re.search(counts, result), attack
    folders = [path.parent for path in sorted(DOCS.glob("agr-small/*/config.json"))]
    assert len(folders) == 24
    asked = dict(comparison([read_run(folder) for folder in folders])[-1].rows)
    assert asked["AGR works"] == "no (all bases)"
    assert asked["base-0: AGR above the front of fixed tau"] == "yes"
    line = asked["base-0: AGR above the line through fixed tau"]
    distance, error = re.match(r"-([\d.]+) ± ([\d.]+) points", line).groups()
    assert f"lies {distance} points" in result
    assert f"it is {distance} ± {error} points lower (not significant)" in readme
    assert f"standard error over images {error}" in result
    line = asked["base-0: AGR without clip above the line through fixed tau"]
    distance, error = re.match(r"\+([\d.]+) ± ([\d.]+) points", line).groups()
    assert f"lies {distance} ± {error} points above that line" in result
    assert f"without its clipping {distance} ± {error} points higher" in readme
    best = read_run(DOCS / "agr-small/best-0")
    for other, attack in itertools.product(("at-0", "agr-0"), PAGE_ATTACKS):
        theirs = read_run(DOCS / f"agr-small/{other}").attacks[attack]
        gain = 100 * (best.attacks[attack].accuracy - theirs.accuracy)
        assert (f"{gain:+.2f}" if gain < 5 else f"{gain:.1f}") in result
    # The page names them: AGR without clip on each base, fixed tau 0.25 and 0.
    unbeaten = asked["best-0 beats every other arm"].removeprefix("no: not ").split(", ")
    assert sorted(unbeaten) == [
        "agr_no_clip-0",
        "agr_no_clip-1",
        "agr_no_clip-2",
        "tau_0.0-0",
        "tau_0.25-0",
    ]


def test_the_counts_are_those_of_the_records():
    result = " ".join((DOCS / "experiments.md").read_text().split("## Result")[1].split())

    def pairs(first, second):
        return [
            mcnemar(*(read_run(DOCS / name).attacks[attack].correct for name in (first, second)))
            for attack in PAGE_ATTACKS
        ]

    _, pgd, apgd = (pair.p_value for pair in pairs("agr-small/best-0", "agr-small/at-0"))
    assert f"(p {pgd:.0e})".replace("e-0", "e-") in result
    assert f"(p {apgd:.2f}, not resolved)" in result
    clean, *_ = pairs("agr-small/best-0", "agr-small/agr-0")
    assert f"p {clean.p_value:.2f})" in result
    without = [
        pair.gained + pair.lost for pair in pairs("agr-small/agr_no_gop-0", "agr-small/agr-0")
    ]
    assert without[2] == 0
    assert f"{without[0]} clean images, {without[1]} under PGD-20 and none under APGD" in result
    devices = [pair.gained + pair.lost for pair in pairs("agr-small/at-1", "agr-small-on-cpu/at-1")]
    assert "correctly: {}, {} and {})".format(*devices) in result
    conflicting = [
        np.mean([epoch["conflicting"] for epoch in read_run(DOCS / f"agr-small/agr-{s}").metrics])
        for s in range(3)
    ]
    assert f"{100 * np.mean(conflicting):.1f} % of the leaves conflict" in result


def test_the_mechanism_is_that_of_the_records():
    result = " ".join((DOCS / "experiments.md").read_text().split("## Result")[1].split())
    measured = [read_run(DOCS / f"agr-small/base-{s}").measurements["mechanism"] for s in range(3)]
    assert {each["batches"] for each in measured} == {200}
    for way in ("agr", "clip"):
        for part in ("clean", "adversarial"):
            values = sorted(-each["change"][way][part]["mean"] for each in measured)
            assert f"{values[0]:.2f} to {values[-1]:.2f}" in result
    leaves = [each["by_leaf"] for each in measured]
    cosines, shares = (
        [dict(zip(each["names"], each[quantity], strict=True)) for each in leaves]
        for quantity in ("cosine", "projected")
    )
    for name, layer in (("conv1", "the first convolution"), ("linear", "the last layer")):
        values = sorted(cosine[f"{name}/kernel"] for cosine in cosines)
        assert f"{values[0]:.2f} to {values[-1]:.2f} at {layer}" in result
    projected = [name.split("/") for share in shares for name, value in share.items() if value]
    assert {block for block, *_ in projected} == {"layer1_0", "layer1_1", "layer2_0"}
    assert {leaf for *_, leaf in projected} == {"scale", "bias"}
    most = max(max(share.values()) for share in shares)
    assert f"at most {100 * most:.1f} % of the batches" in result


def test_the_committed_report_is_that_of_the_records(tmp_path):
    kept = DOCS / "agr-small/report/report.md"
    shutil.copytree(DOCS / "agr-small", tmp_path / "runs", ignore=shutil.ignore_patterns("report"))
    write_report(tmp_path / "runs", tmp_path / "report")
    assert (tmp_path / "report/report.md").read_text() == kept.read_text()
