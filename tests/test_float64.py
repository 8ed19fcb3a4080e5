"""Runs the exact tests of tests/float64 in a process of their own, with float64 switched on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

OPTIONS = ("-q", "-n0", "-p", "no:cacheprovider")


@pytest.mark.skipif(bool(os.environ.get("JAX_ENABLE_X64")), reason="already in such a process")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_exact_tests_pass_in_float64(which):
    folder = Path(__file__).parent / "float64"
    # The slow ones compute for long: they are compiled as for users.
    flags = {"XLA_FLAGS": ""} if which == "slow" else {}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", str(folder), "-m", which, *OPTIONS],
        env={**os.environ, "JAX_ENABLE_X64": "1", **flags},
        capture_output=True,
        text=True,
    )
    print(result.stdout[-20000:])
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
