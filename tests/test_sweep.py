"""Sweeps: what is missing is made, once, and nothing else."""

import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_report import drawn_whole, rendered, section, settings

from agr_jax import measure
from agr_jax.config import from_config_dict
from agr_jax.errors import ConfigError, FolderInUseError
from agr_jax.jobs import sweep
from agr_jax.report.run_records import read_run
from agr_jax.runs import Run
from agr_jax.runs.folder import read_config
from benchmarks import arrangements
from configs.paper import agr_small, plans, table1


def tiny(plan):
    """A sweep on digits with three runs, made smaller still."""
    with plan.unlocked():
        plan.runs = tuple(run for run in plan.runs if "seed0" in run.name and "-at-" in run.name)
        for run in plan.runs:
            run.config.data.train_examples = 128
            run.config.model.name = "tests.tiny_network:create"
            run.config.attack.steps = 1
            run.config.epochs = 2 if run.base else 1
            run.config.agr.gics_start_epoch = run.config.agr.gop_start_epoch = 1
            run.config.eval.attacks = ("clean",)
            run.evaluations = tuple(
                plans.evaluation(e.label, ("clean", "fgsm"), 16) for e in run.evaluations
            )
    return plan


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The runs of Table 1 for AT, on digits."""
    folder = tmp_path_factory.mktemp("sweep") / "runs"
    planned = sweep.from_plan(tiny(table1.get_config("digits")), folder)
    assert sweep.run(planned) == 0
    return planned


def test_a_sweep_makes_its_runs_and_its_report(swept, capsys):
    names = {run.name for run in swept.runs}
    assert len(names) == 3
    for planned in swept.runs:
        record = read_run(swept.folder / planned.name)
        assert record.finished
        assert sweep.what_is_missing(swept, planned) == []
        if planned.base:
            assert set(record.attacks) == {"clean", "fgsm"}
            assert planned.config.init_from == str(swept.folder / planned.base)
    text, written = rendered(swept.folder)
    found = section(text, "Table 1: accuracy without and with AGR")
    assert "digits, tests.tiny_network:create, 128 training images, 2 epochs" in found
    rows = [line for line in found.splitlines() if line.startswith(("| AT |", "| AT + AGR |"))]
    assert len(rows) == 2
    assert all(row.count(" of 16 |") == 1 for row in rows)  # FGSM; clean is of more images
    assert (swept.folder / "report/figure6.svg") in written
    # Nothing is left to do, and nothing is done.
    before = {p: p.stat().st_mtime_ns for p in swept.folder.rglob("*") if p.is_file()}
    assert sweep.run(swept) == 0
    assert before == {p: p.stat().st_mtime_ns for p in swept.folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_measurements_of_a_real_run(swept, capsys):
    """What must hold of any network: the middle of the landscape, Cauchy and Schwarz, the cap."""
    base = swept.folder / swept.runs[0].name
    config = read_config(base)
    settings = dataclasses.replace(
        config.measure, images=20, directions=2, most_steps=30, points=3, batches=3
    )
    run = Run.from_config(dataclasses.replace(config, measure=settings), base)
    found = {
        name: measure.measure_run(run, name) for name in ("boundary", "landscape", "mechanism")
    }
    steps = found["boundary"]["steps"]
    assert len(steps) == 2 * found["boundary"]["images"]
    assert steps == sorted(steps)
    assert all(1 <= s <= 30 for s in steps)
    middle = [found["landscape"][scale] for scale in ("raw", "filter_normalised")]
    for curve in middle:
        assert curve["alpha"][1] == 0
        assert curve["adversarial_loss"][1] >= curve["clean_loss"][1] - 1e-5
    assert middle[0]["clean_loss"][1] == pytest.approx(middle[1]["clean_loss"][1], rel=1e-5)
    change = found["mechanism"]["change"]
    for way in ("clean", "adversarial"):
        assert change[way][way]["mean"] == pytest.approx(-change[way]["norm"]["mean"], rel=1e-4)
        for other in change.values():  # no direction of the same length does more
            assert other[way]["mean"] >= change[way][way]["mean"] - 1e-4
    for part in ("clean", "adversarial"):  # Theorem 4.1
        assert change["agr"][part]["mean"] <= 1e-5
    by_leaf, leaves = (found["mechanism"][name] for name in ("by_leaf", "leaves"))
    assert "conv/kernel" in by_leaf["names"]
    for name in ("cosine", "projected"):
        assert np.mean(by_leaf[name]) == pytest.approx(leaves[name]["mean"], abs=1e-6)
        assert len(by_leaf[name]) == len(by_leaf["names"])
    text, _ = rendered(swept.folder)
    assert "base-seed0: agr |" in section(text, "AGR-small: mechanism")
    assert "](layers.svg)" in section(text, "AGR-small: mechanism")
    left, right = drawn_whole(swept.folder, "layers")[0].axes
    kernels = [index for index, name in enumerate(by_leaf["names"]) if name.endswith("kernel")]
    assert left.lines[0].get_ydata().tolist() == np.array(by_leaf["cosine"])[kernels].tolist()
    projected = dict(zip(by_leaf["names"], by_leaf["projected"], strict=True))
    ticks = [label.get_text() for label in right.get_yticklabels()]
    assert right.lines[0].get_xdata().tolist() == [100 * projected[name] for name in ticks]
    assert bool(ticks) == (max(projected.values()) > 0)
    with pytest.raises(ConfigError, match="measurement 'x': there are boundary, landscape"):
        measure.measure_run(run, "x")
    shutil.rmtree(base / "measurements")


def test_a_sweep_wants_the_average_and_this_epoch(tmp_path):
    """As a kill leaves a run: trained, the last checkpoint evaluated, the average not yet."""
    planned = sweep.from_plan(agr_small.get_config("small"), tmp_path)
    best = planned.runs[-1]
    folder = tmp_path / best.name
    for name in ("evaluations", "measurements"):
        (folder / name).mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"epoch": 60}\n')

    def save(name, attacks, examples=1000):
        entries = {a: {"accuracy": 0.5, "settings": settings(best.config, a)} for a in attacks}
        record = {"epoch": 60, "examples": examples, "attacks": entries}
        (folder / f"evaluations/{name}.json").write_text(json.dumps(record))

    for which in ("last", "average"):
        assert sweep.what_is_missing(planned, best) == ["evaluation", "evaluation fast"]
        save(which, ("clean", "pgd20"), 10_000)
        save(f"{which}-fast-first1000", ("fast",))
    assert sweep.what_is_missing(planned, best) == []
    best = dataclasses.replace(best, measurements=("mechanism",))
    (folder / "measurements/mechanism.json").write_text('{"epoch": 20}')
    assert sweep.what_is_missing(planned, best) == ["mechanism"]
    (folder / "measurements/mechanism.json").write_text('{"epoch": 60}')
    assert sweep.what_is_missing(planned, best) == []


def test_a_sweep_does_only_what_is_missing(swept, tmp_path, monkeypatch):
    folder = tmp_path / "runs"
    planned = sweep.from_plan(tiny(table1.get_config("digits")), folder)
    shutil.copytree(swept.folder, folder)
    branch = planned.runs[-1]
    for path in (folder / branch.name / "evaluations").glob("*table1*"):
        path.unlink()
    assert sweep.what_is_missing(planned, branch) == ["evaluation table1"]
    trained = []
    monkeypatch.setattr(sweep, "train_run", lambda config, path: trained.append(path) or 0)
    # The base lies elsewhere now, which evaluations do not mind.
    assert sweep.run(planned) == 0
    assert trained == []
    same = [
        json.loads(next((root / branch.name / "evaluations").glob("*table1*")).read_text())
        for root in (folder, swept.folder)
    ]
    for record in same:
        for found in record["attacks"].values():
            found.pop("wall_seconds")
            found.pop("seconds", None)
        record.pop("config")
    assert same[0] == same[1]


def test_a_failing_run_is_named_and_the_others_go_on(tmp_path, capsys):
    plan = tiny(table1.get_config("digits"))
    with plan.unlocked():
        plan.runs[0].config.model.name = "no_such_network"
        other = plans.planned("alone", plan.runs[1].config.copy_and_resolve_references())
        plan.runs = (*plan.runs, other)
    planned = sweep.from_plan(plan, tmp_path)
    assert sweep.run(planned) == 1
    printed = capsys.readouterr().out
    base, first, second, alone = (run.name for run in planned.runs)
    assert f"failed: {base}: config.model.name" in printed
    assert f"failed: {first}: its base {base} failed" in printed
    assert f"failed: {second}: its base {base} failed" in printed
    assert "1 of 4 runs are complete" in printed
    assert read_run(tmp_path / alone).finished


def test_what_is_no_sweep_is_refused():
    with pytest.raises(ConfigError, match=r"a sweep needs a file of configs/paper"):
        sweep.from_plan({"epochs": 3})
    plan = table1.get_config("digits")
    with plan.unlocked():
        plan.runs = plan.runs[1:2]
    with pytest.raises(ConfigError, match=r"its base .* must come before"):
        sweep.from_plan(plan)
    with pytest.raises(ConfigError, match="scale: must be one of full, small, digits, got 'tiny'"):
        table1.get_config("tiny")


def test_the_time_left_comes_from_the_runs_so_far(tmp_path):
    plan = agr_small.get_config("small")
    planned = sweep.from_plan(plan, tmp_path)
    assert sweep.time_left(planned, planned.runs) == "time left not known yet"
    base = planned.runs[0]
    (tmp_path / base.name).mkdir()
    lines = [{"epoch": e, "step": e, "seconds": 60.0} for e in range(1, 46)]
    (tmp_path / base.name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    # Without AGR 10 + 4 passes, with it 10 + 6; 60 s an epoch of 14.
    per_pass = 60 / 14
    left = planned.runs[1:]
    epochs = sum(
        (45 if run.name.startswith("base") else 60 if run.name == "best-0" else 15)
        * sweep.passes_per_image(run.config)
        for run in left
    )
    expected = f"about {epochs * per_pass / 3600:.1f} h of training left"
    assert sweep.time_left(planned, left) == expected


@pytest.mark.parametrize(
    ("fields", "passes"),
    [
        ({"agr.enabled": False}, 10 + 3 + 1),
        ({}, 10 + 3 + 3),
        ({"agr.gop": False, "agr.interpolation": "none"}, 10 + 3 + 1),
        ({"agr.enabled": False, "diagnostics": True}, 10 + 3 + 3),
        ({"method": "standard"}, 3),
    ],
)
def test_passes_of_an_image(fields, passes):
    values = plans.arm(plans.recipe("small", "cifar10", "preactresnet18", "at", 0), "agr")
    values.update_from_flattened_dict(fields)
    assert sweep.passes_per_image(from_config_dict(values)) == passes


def test_agr_small_is_what_the_page_says():
    plan = agr_small.get_config("small")
    runs = {run.name: from_config_dict(run.config) for run in plan.runs}
    assert len([name for name in runs if name.startswith("base-")]) == 3
    for seed in (0, 1, 2):
        for arm in ("at", "at_clip", "agr", "agr_no_clip", "tau_0.9"):
            config = runs[f"{arm}-{seed}"]
            assert (config.seed, config.epochs, config.attack.steps) == (seed, 60, 5)
            assert config.data.train_examples == 10_000
            assert config.data.validation_examples == 2_000
            assert config.optimizer.milestones == (30, 45)
            assert config.model.width == 16
    assert len(runs) == 3 + 15 + 5 + 1
    page = (Path(__file__).parents[1] / "docs/experiments.md").read_text()
    commands = page.split("```sh")[1].split("```")[0]
    for name in ("base-$seed", "at-$seed", "at_clip-$seed", "agr-$seed", "tau_0.9-$seed"):
        assert f"runs/agr-small/{name}" in commands
    # The commands and the sweep make the same runs.
    flags = dict(re.findall(r"--config\.([\w.]+)=(\S+?)[\s\"]", commands.split("\n")[2] + " "))
    flat = dict(_flatten(dataclasses.asdict(runs["agr-0"])))
    for name, value in flags.items():
        assert str(flat[name]).replace(" ", "") == value, name


def _flatten(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@pytest.mark.parametrize("scale", plans.SCALES)
@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[1] / "configs/paper").glob("[tfa]*.py")),
    ids=lambda path: path.stem,
)
def test_every_plan_loads(path, scale):
    module = importlib.import_module(f"configs.paper.{path.stem}")
    planned = sweep.from_plan(module.get_config(scale))
    assert planned.runs
    assert len({run.name for run in planned.runs}) == len(planned.runs)


# ---- in parts


def test_parts_share_all_runs(swept):
    names = [planned.name for planned in swept.runs]
    for count in (1, 2, 3, 5):
        parts = [sweep.Part(number, count).of(swept.runs) for number in range(1, count + 1)]
        assert sorted(p.name for part in parts for p in part) == sorted(names)
        for part in parts:  # a base of its own comes first
            own = [planned.name for planned in part]
            for index, planned in enumerate(part):
                assert planned.base not in own[index:]
    assert sweep.Part.from_flag("2/3") == sweep.Part(2, 3)
    assert sweep.Part.from_flag(None) == sweep.Part(1, 1)


@pytest.mark.parametrize("text", ["", "2", "0/2", "3/2", "1/0", "-1/2", "1/2/3", "a/b"])
def test_a_part_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="--part: must be I/N with I from 1 to N, got"):
        sweep.Part.from_flag(text)


def test_a_part_waits_for_a_base_that_another_process_makes(swept, tmp_path, monkeypatch, capsys):
    """It does not begin while the base is held, and makes nothing of what is done by then."""
    planned = dataclasses.replace(swept, folder=tmp_path)
    base, branch = swept.runs[0], swept.runs[1]
    assert branch.base == base.name
    made, looks = [], []
    monkeypatch.setattr(
        sweep, "_complete", lambda sweep, planned, missing: made.append(planned.name) or 0
    )
    missing = {name: ["training"] for name in (base.name, branch.name)}
    monkeypatch.setattr(
        sweep, "what_is_missing", lambda sweep, planned: missing.get(planned.name, [])
    )
    complete = sweep._complete

    def held_at_first(sweep_, planned_, missing_):
        if planned_.name == base.name and len(looks) < 2:
            looks.append(planned_.name)
            raise FolderInUseError("run folder is in use")
        missing.pop(planned_.name)
        return complete(sweep_, planned_, missing_)

    def other_process_finishes(seconds):
        if len(looks) == 2:
            missing.pop(base.name)

    monkeypatch.setattr(sweep, "_complete", held_at_first)
    monkeypatch.setattr(sweep.time, "sleep", other_process_finishes)
    assert sweep.run(planned, sweep.Part(2, 3)) == 0
    assert made == [branch.name]
    assert capsys.readouterr().out.count("waiting: run folder is in use") == 1


@pytest.mark.slow
def test_two_parts_at_once_make_what_one_makes(swept, tmp_path):
    program = tmp_path / "part.py"
    program.write_text(
        "import sys\nfrom pathlib import Path\nfrom test_sweep import tiny, sweep, table1\n"
        "planned = sweep.from_plan(tiny(table1.get_config('digits')), Path(sys.argv[1]))\n"
        "sys.exit(sweep.run(planned, sweep.Part.from_flag(sys.argv[2])))\n"
    )
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    # The second share is asked for twice: whoever comes later waits, and finds it done.
    running = [
        subprocess.Popen(
            [sys.executable, program, tmp_path / "runs", part],
            env=environment,
            cwd=here.parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        for part in ("1/2", "2/2", "2/2")
    ]
    printed = [each.communicate(timeout=500)[0] for each in running]
    assert [each.returncode for each in running] == [0, 0, 0], printed
    for planned in swept.runs:
        records = [read_run(folder / planned.name) for folder in (swept.folder, tmp_path / "runs")]
        assert records[0].finished
        assert records[1].finished
        for name, found in records[0].attacks.items():
            np.testing.assert_array_equal(records[1].attacks[name].correct, found.correct)


@pytest.mark.slow
def test_two_processes_make_a_sweep_together(swept, tmp_path):
    program = tmp_path / "together.py"
    program.write_text(
        "import sys\nfrom pathlib import Path\n"
        "given = dict(a.removeprefix('--').split('=') for a in sys.argv[1:])\n"
        "from agr_jax import distributed, jobs\n"
        "with jobs.ending_with_one_line():\n"
        "    distributed.start(distributed.detect({}, coordinator=given['coordinator'],\n"
        "        processes=2, process=int(given['process'])))\n"
        f"    sys.path.append({str(Path(__file__).parent)!r})\n"
        "    from test_sweep import tiny, sweep, table1\n"
        "    planned = sweep.from_plan(tiny(table1.get_config('digits')), Path(given['workdir']))\n"
        "    status = sweep.run(planned)\n"
        "    distributed.finish()\n"
        "    sys.exit(status)\n"
    )
    printed = [tmp_path / f"{index}.txt" for index in (0, 1)]
    command = [str(program), f"--workdir={tmp_path / 'runs'}"]
    statuses = arrangements.wait(arrangements.start("2x1", command, printed=printed), 500)
    assert statuses == [0, 0], "\n".join(path.read_text() for path in printed)
    assert "3 of 3 runs are complete" in printed[0].read_text()
    assert "complete" not in printed[1].read_text()
    for planned in swept.runs:
        assert read_run(tmp_path / "runs" / planned.name).finished
