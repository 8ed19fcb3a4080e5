"""Sweeps and reports from the command line, killed and continued."""

import json
import shutil
import subprocess
import time

import numpy as np
import pytest
from test_launch import ROOT, command, environment, forked, last_checkpoint, launch, refused

SWEEP = ["--job=sweep", "--config=configs/paper/figure6.py:digits"]


def test_mistakes_are_one_line(tmp_path):
    assert "--workdir: give the folder that holds the run folders" in refused("--job=report")
    missing = refused("--job=report", f"--workdir={tmp_path / 'none'}")
    assert "expected a folder of runs, found none" in missing
    assert "a sweep needs a file of configs/paper" in refused(
        "--job=sweep", "--config=configs/digits_at.py"
    )
    assert "this file lists many runs: use --job=sweep" in refused(
        "--config=configs/paper/table1.py:digits"
    )
    assert "scale: must be one of full, small, digits" in refused(
        "--job=sweep", "--config=configs/paper/table1.py:tiny"
    )


def test_a_report_of_nothing_is_rendered(tmp_path):
    result = forked("--job=report", f"--workdir={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / "report/report.html") in result.stdout
    assert "not run" in (tmp_path / "report/report.md").read_text()


@pytest.mark.slow
def test_a_sweep_killed_at_random_moments_ends_the_same(tmp_path):
    started = time.monotonic()
    whole = launch(*SWEEP, f"--workdir={tmp_path / 'whole'}")
    seconds = time.monotonic() - started
    assert whole.returncode == 0, whole.stderr
    assert "3 of 3 runs are complete" in whole.stdout
    killed = 0
    for _ in range(3):
        process = subprocess.Popen(
            command(*SWEEP, f"--workdir={tmp_path / 'killed'}"),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(np.random.default_rng().uniform(0.1, 0.5) * seconds)
        killed += process.poll() is None
        process.kill()
        process.wait()
    assert killed  # with what the first one compiled it is quicker: not all came too late
    done = launch(*SWEEP, f"--workdir={tmp_path / 'killed'}")
    assert done.returncode == 0, done.stderr
    names = sorted(p.name for p in (tmp_path / "whole").iterdir() if p.is_dir())
    assert len(names) == 3
    for name in names:
        ours, theirs = (last_checkpoint(tmp_path / which / name) for which in ("killed", "whole"))
        assert ours.keys() == theirs.keys()
        for leaf in ours:
            np.testing.assert_array_equal(ours[leaf], theirs[leaf], err_msg=f"{name} {leaf}")
        records = []
        for which in ("killed", "whole"):
            (path,) = (tmp_path / which / name / "evaluations").glob("last-first64.json")
            record = json.loads(path.read_text())
            del record["config"]
            for found in record["attacks"].values():
                del found["wall_seconds"]
            records.append(record)
        assert records[0] == records[1]
    # A damaged run is named, and the report shows the rest.
    shutil.rmtree(tmp_path / "killed" / names[0] / "evaluations")
    (tmp_path / "killed" / names[1] / "config.json").write_text("{")
    result = launch("--job=report", f"--workdir={tmp_path / 'killed'}")
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "killed/report/report.md").read_text()
    assert f"| {names[1]} | " in text
    assert "cannot be read" in text
    assert "figure6.svg" in text
