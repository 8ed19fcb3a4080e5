"""Runs the exact tests of tests/float64 in a process of their own, with float64 switched on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(bool(os.environ.get("JAX_ENABLE_X64")), reason="already in such a process")
def test_exact_tests_pass_in_float64():
    folder = Path(__file__).parent / "float64"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", str(folder), "-q", "-n0", "-p", "no:cacheprovider"],
        env={**os.environ, "JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
    )
    print(result.stdout[-20000:])
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
