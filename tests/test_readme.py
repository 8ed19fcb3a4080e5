"""The Python of the README and of docs/optax.md runs as printed, each page as one program."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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


@pytest.mark.slow
def test_blocks_of_the_page_about_optax(tmp_path):
    blocks = python_blocks("docs/optax.md")
    assert len(blocks) == 8
    check = "assert len(losses[0]) == devices == 4 and updates['kernel'].shape == (4, 3)\n"
    printed = printed_by("\n".join([*blocks, check, CLAIMS]), tmp_path)
    assert "not measured: [ True  True]" in printed
    assert "clip norm: 0.1" in printed


# What the page says of the numbers in its blocks, each against a way of its own.
CLAIMS = """
import numpy as np
import pytest

same = lambda a, b: jax.tree.all(jax.tree.map(lambda x, y: jnp.allclose(x, y, atol=1e-7), a, b))
one_step = lambda optimizer, pair: optimizer.update(pair, optimizer.init(params), params)[0]
after_two = gradients_at({"kernel": jnp.ones([4, 3]), "bias": jnp.arange(3.0)}, 0)

# A NaN in a clean leaf leaves that leaf alone without an update, and the other with one.
assert (safe_updates["bias"] == 0).all() and (safe_updates["kernel"] != 0).any()
# Before AGR, `zero_nans` does not see the clean gradient, and a global norm is that of the pair.
before = optax.chain(optax.zero_nans(), agr_transform())
spoilt, _ = before.update(pair.adversarial, before.init(params), params, clean_grads=poisoned)
assert np.isnan(spoilt["bias"]).all()
together = GradientPair(*jax.tree.map(lambda g: g * 1e-3 / optax.tree.norm(after_two), after_two))
clipped = one_step(optax.chain(optax.clip_by_global_norm(1e-3), agr_transform()), after_two)
assert same(clipped, one_step(agr_transform(), together)) and optax.tree.norm(clipped) > 0

# The misspelt keyword is adversarial training; the right one is not.
plain = optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(0.1))
assert same(misspelt, plain.update(pair.adversarial, plain.init(params), params)[0])

# Schedules: as a fixed clip norm of the step's value, and negative ones are seen.
schedule = lambda step: 0.1 - 0.075 * step
for options in ({}, {"static_args": ("gop_start", "gics_start", "clip_start")}):
    moving = optax.inject_hyperparams(agr_transform, **options)(clip_norm=schedule)
    state = moving.init(params)
    for norm in (0.1, 0.025, None):
        got, state = jax.jit(moving.update)(after_two, state, params)
        expected = None if norm is None else one_step(agr_transform(clip_norm=norm), after_two)
        assert same(got, expected) if norm else np.isnan(optax.tree.norm(got)), norm
    assert ("gop_start" in state.hyperparams) == (not options)

# Complex leaves: AGR on their two parts.
parts = lambda tree: {"real": tree["kernel"].real, "imaginary": tree["kernel"].imag}
real_pair = GradientPair(parts(both.clean), parts(both.adversarial))
chain = optax.chain(agr_transform(), optax.sgd(0.1))
assert same(parts(complex_updates), chain.update(real_pair, chain.init(real_pair.clean))[0])
assert optax.tree.get(complex_state, "cosine").shape == (2,)

# SAM: AGR at the point that the adversarial gradient leads to.
uphill = pair.adversarial
length = optax.tree.norm(uphill)
point = jax.tree.map(lambda p, g: p + 0.05 * g / length, params, uphill)
assert same(sam_updates, one_step(chain, gradients_at(point, 0)))
assert jnp.isfinite(optax.tree.get(sam_state.opt_state, "cosine")).all()
try:
    sam.update(pair.adversarial, sam_state, params, clean_grads=pair.clean)
    raise AssertionError("sam took clean_grads")
except TypeError as error:
    assert "clean_grads" in str(error)
transparent = optax.contrib.sam(chain, inner)
state, at = transparent.init(params), params
for _ in range(2):
    updates, state = transparent.update(gradients_at(at, 0), state, at)
    at = optax.apply_updates(at, updates)
assert same(at, optax.apply_updates(params, sam_updates))
assert jnp.isnan(state.opt_state[0].cosine).all()
"""


def test_commands_name_files_that_exist():
    names = set(re.findall(r"--config=((?:configs|examples)/\w+\.py)", README))
    names |= set(re.findall(r"requirements[-\w]*\.txt", README))
    names |= set(re.findall(r"\]\(([\w/.]+)(?:#\w+)?\)", README))
    names |= set(re.findall(r"python (examples/\w+\.py)", README))
    assert len(names) > 5
    for name in names:
        assert (ROOT / name).is_file(), name
