"""The scripts of docs/many-machines.md, as far as they can be tried without a cluster."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from absl import flags

from agr_jax import distributed
from agr_jax.config import check_field_name
from agr_jax.jobs import JOBS, sweep

importlib.import_module("launch")  # defines the flags
ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "many-machines.md").read_text()
SHELL = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
(JOBSET,) = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
POD = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
# Options of sbatch, from its manual.
SBATCH = {
    "job-name",
    "nodes",
    "ntasks-per-node",
    "gpus-per-node",
    "gpus",
    "time",
    "requeue",
    "signal",
    "array",
}


def command_lines():
    """All `launch.py` lines of the page, as lists of words."""
    found = [POD["containers"][0]["command"]]
    for text in SHELL:
        for line in re.sub(r"\\\n", " ", text).splitlines():
            inner = re.search(r'--command="(.*)"', line)
            command = inner[1] if inner else line
            if "launch.py" in command and not command.startswith("#"):
                words = shlex.split(command.rstrip("& ").replace('"$SLURM_ARRAY_TASK_ID/8"', "3/8"))
                found.append(words[words.index("python") :])
    return found


@pytest.mark.parametrize("words", command_lines(), ids=lambda words: " ".join(words[2:4]))
def test_every_line_is_one_that_the_program_takes(words):
    assert words[:2] == ["python", "launch.py"]
    given = dict(word.removeprefix("--").split("=", 1) for word in words[2:])
    assert (ROOT / given["config"]).is_file()
    for name in given:
        if name.startswith("config."):
            check_field_name(name)
        else:
            assert name in flags.FLAGS
    assert given.get("job", "train") in JOBS
    if "part" in given:
        assert sweep.Part.from_flag(given["part"]) == sweep.Part(3, 8)
    processes = {name: given.get(name) for name in ("coordinator", "processes", "process")}
    if given.get("coordinator"):
        numbers = {name: int(processes[name]) for name in ("processes", "process")}
        plan = distributed.detect({}, coordinator=given["coordinator"], **numbers)
        assert plan.kind == "connect"


def test_flags_of_the_page_exist():
    for name in re.findall(r"`--([a-z]+)=", PAGE):
        assert name in {*flags.FLAGS, "config"} or name == "gpus", name


@pytest.mark.parametrize("text", SHELL, ids=range(len(SHELL)))
def test_shell_scripts_parse(text):
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    for option in re.findall(r"^#SBATCH --([a-z-]+)", text, re.MULTILINE):
        assert option in SBATCH


def test_jobset_is_what_jax_looks_for():
    """Indexed, as many completions as pods, and a restart that continues the run."""
    job = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert JOBSET["kind"] == "JobSet"
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"] > 1
    assert job["backoffLimit"] == 0
    assert JOBSET["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert POD["restartPolicy"] == "Never"
    mounted = {mount["name"] for mount in POD["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in POD["volumes"]}


def test_exit_statuses_are_those_of_the_page():
    assert f"one line with its reason, {distributed.LOST_PROCESS}" in PAGE
