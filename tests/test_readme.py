"""The Python of the README and of docs/optax.md runs as printed, each page as one program."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from agr_jax.diagnostics import DiagnosticsLog

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def printed_by(program, folder):
    """What a program prints, in a process of its own with four devices; warnings are errors."""
    (folder / "page.py").write_text(program)
    result = subprocess.run(
        [sys.executable, "-W", "error", str(folder / "page.py")],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "4"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_python_blocks_run(tmp_path):
    blocks = python_blocks("README.md")
    assert len(blocks) == 3
    run = tmp_path / "runs/digits_at"
    run.mkdir(parents=True)
    log = DiagnosticsLog(run / "diagnostics", ["kernel"])
    measured = ("cosine", "projected", "clean_norm", "adversarial_norm")
    log.add(1, {f"leaf_{name}": np.ones(1, np.float32) for name in measured})
    log.write()
    printed = printed_by("\n".join(blocks), tmp_path)
    assert "AutoAttack, Linf epsilon 0.01, 16 images" in printed
    assert "cosine of each leaf: [" in printed
    assert "GOP frequency of each leaf: {'kernel': " in printed


def test_the_block_of_agr_stands_alone(tmp_path):
    """What a reader copies; that of the attacks is the first on the page."""
    assert "cosine of each leaf: [" in printed_by(python_blocks("README.md")[1], tmp_path)


def test_blocks_of_the_page_about_optax(tmp_path):
    blocks = python_blocks("docs/optax.md")
    assert len(blocks) == 3
    check = "assert len(losses[0]) == devices == 4 and updates['kernel'].shape == (4, 3)\n"
    printed_by("\n".join([*blocks, check]), tmp_path)


def test_commands_name_files_that_exist():
    names = set(re.findall(r"--config=((?:configs|examples)/\w+\.py)", README))
    names |= set(re.findall(r"requirements[-\w]*\.txt", README))
    names |= set(re.findall(r"\]\(([\w/.]+)(?:#\w+)?\)", README))
    names |= set(re.findall(r"python (examples/\w+\.py)", README))
    assert len(names) > 5
    for name in names:
        assert (ROOT / name).is_file(), name
