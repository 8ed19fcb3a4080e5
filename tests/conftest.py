"""Settings of the test process, and where the reference numbers lie."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

_ROOT = Path(__file__).resolve().parents[1]
_SHARED = _ROOT.parent / "shared"

# Four CPU devices, so that meshes of 1, 2 and 4 can be compared in one process.
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", str(_ROOT / ".cache" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # thousands of small ones


def _are_known(flags: str) -> bool:
    """Whether this XLA knows the flags; it aborts a process that sets others."""
    return not subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices('cpu')"],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
    ).returncode


# Most of the tests' time is compilation: without LLVM's optimisation, with XLA's older emitters and
# in one piece it takes half of it.
if "XLA_FLAGS" not in os.environ:
    _quick = (
        "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
        "--xla_cpu_parallel_codegen_split_count=1"
    )
    os.environ["XLA_FLAGS"] = _quick if _are_known(_quick) else ""

flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="session")
def golden():
    """Loads a file of reference numbers by name, from the checkout or from ../shared/golden."""

    def load(name: str):
        for folder in (_ROOT / "tests" / "golden", _SHARED / "golden"):
            if (folder / name).exists():
                return np.load(folder / name, allow_pickle=False)
        pytest.skip(f"reference numbers {name} are neither in tests/golden nor in ../shared/golden")

    return load


@pytest.fixture
def compilations():
    """A list that grows by one with every program that is compiled, or read from the cache."""
    found = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session", autouse=True)
def cache_of_decoded_images(tmp_path_factory):
    """No test uses, or fills, the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def free_compiled_programs():
    """A file's compiled programs go with it: together they would take gigabytes."""
    yield
    jax.clear_caches()


def pytest_collection_modifyitems(items):
    """The files that take longest begin first, so that no process waits for the other at the end.

    (xdist's own order, by the number of tests, is off: test_float64.py is one test.)
    """
    longest = ("test_float64", "test_train", "test_launch", "test_attack_contract")
    items.sort(key=lambda item: not item.path.name.startswith(longest))
