"""The README's Python runs as printed, from the first block to the last, in one program."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from agr_jax.diagnostics import DiagnosticsLog

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_python_blocks_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    check = "assert adversarial.shape == images.shape and len(losses[0]) == devices == 4\n"
    run = tmp_path / "runs" / "digits_at"
    run.mkdir(parents=True)
    log = DiagnosticsLog(run / "diagnostics", ["kernel"])
    measured = ("cosine", "projected", "clean_norm", "adversarial_norm")
    log.add(1, {f"leaf_{name}": np.ones(1, np.float32) for name in measured})
    log.write()
    (tmp_path / "readme.py").write_text("\n".join([*blocks, check]))
    result = subprocess.run(
        [sys.executable, "-W", "error", str(tmp_path / "readme.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "4"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "cosine of each leaf" in result.stdout
    assert "GOP frequency of each leaf" in result.stdout


def test_commands_name_files_that_exist():
    names = set(re.findall(r"--config=((?:configs|examples)/\w+\.py)", README))
    names |= set(re.findall(r"requirements[-\w]*\.txt", README))
    names |= set(re.findall(r"\]\(([\w/.]+)\)", README))
    assert len(names) > 5
    for name in names:
        assert (ROOT / name).is_file(), name
