"""Faults that are put into the package one by one, to see which tests notice.

    python tests/mutations.py                                  # all, in this checkout's last commit
    python tests/mutations.py --commit=COMMIT --before         # in one from before the packages
    python tests/mutations.py --only=agr --table=FILE.md

Each fault is made in a copy of a commit; the tests named for it run there, `slow` ones left out,
until the first that fails. A fault that none of them notices is looked for by the exact tests too
(`test_float64.py`). `tests/mutations.md` holds the table.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# Where a module was before it moved, for `--before`.
BEFORE = {
    "agr/_rule.py": "combination.py",
    "evaluation/record_files.py": "evaluation_records.py",
    "evaluation/packed_bits.py": "image_masks.py",
    "evaluation/accuracy.py": "evaluate.py",
    "runs/checkpoints.py": "checkpoints.py",
    "training/resume.py": "resume.py",
    "training/step.py": "train_step.py",
    "training/optimizers.py": "optim.py",
    "files.py": "metrics.py",
    "attacks/_autoattack/packing.py": "attacks/packing.py",
    "attacks/_autoattack/search.py": "attacks/autoattack_run.py",
    "attacks/_autoattack/members.py": "attacks/autoattack.py",
}


class Fault(NamedTuple):
    """One change of the source, and the test files that should notice."""

    file: str
    right: str
    wrong: str
    tests: str

    def path(self, *, before: bool) -> str:
        """Of the file, in the package."""
        if not before:
            return self.file
        moved = BEFORE.get(self.file)
        return moved or re.sub(r"^attacks/_", "attacks/", self.file)


FAULTS = [
    Fault("agr/_rule.py", "finite & (dot < 0)", "finite & (dot > 0)", "agr"),
    Fault("agr/_rule.py", "projected = gop & conflict", "projected = gop & finite", "agr"),
    Fault("agr/_rule.py", "weight = self._clean_weight(cosine)", "weight = 1 - cosine", "agr"),
    Fault("agr/_rule.py", "jnp.where(projected, -dot,", "jnp.where(projected, dot,", "agr"),
    Fault(
        "agr/_rule.py",
        "(clean.scale / adversarial.scale)",
        "(adversarial.scale / clean.scale)",
        "agr agr_properties",
    ),
    Fault("agr/_rule.py", "~(norm <= self.clip_norm)", "~(norm <= 2 * self.clip_norm)", "agr"),
    Fault("agr/_rule.py", "jnp.full_like(cosine, 1 - tau)", "jnp.full_like(cosine, tau)", "agr"),
    Fault("agr/_rule.py", "poisoned = (gop | gics) &", "poisoned = gop &", "agr"),
    Fault("agr/_rule.py", "else step >= start", "else step > start", "agr"),
    Fault(
        "agr/_rule.py", "& eligible & finite", "& finite", "agr agr_properties theory official_step"
    ),
    Fault(
        "losses.py", "ordered[:, -1] - ordered[:, -3]", "ordered[:, -1] - ordered[:, -2]", "losses"
    ),
    Fault("losses.py", "0.5 * (ordered[:, -3] + ordered[:, -4])", "ordered[:, -3]", "losses"),
    Fault(
        "losses.py",
        "jnp.exp(log_p) * (log_p - log_q)",
        "jnp.exp(log_q) * (log_p - log_q)",
        "losses",
    ),
    Fault("losses.py", "(1e-4 + 1e-12)", "1e-12", "losses"),
    Fault("losses.py", "loss = unsure * jnp.sum", "loss = unsure**2 * jnp.sum", "losses"),
    Fault("threat.py", "k, shape, images.dtype, -1, 1)", "k, shape, images.dtype, 0, 1)", "threat"),
    Fault(
        "threat.py",
        "jnp.where(norm > self.epsilon,",
        "jnp.where(norm > 2 * self.epsilon,",
        "threat",
    ),
    Fault("threat.py", "round((1 - self.sparsity) *", "round(self.sparsity *", "threat"),
    Fault("threat.py", "1 - flat_images, flat_images", "flat_images, 1 - flat_images", "threat"),
    Fault("attacks/_pgd.py", "candidates + step_size *", "candidates - step_size *", "pgd"),
    Fault(
        "attacks/_pgd.py",
        "            fooled | wrong,",
        "            wrong,",
        "pgd attack_contract",
    ),
    Fault(
        "attacks/_pgd.py",
        "return -height if attack.targeted else height\n\n\ndef",
        "return height\n\n\ndef",
        "pgd",
    ),
    Fault(
        "attacks/_pgd.py",
        "attack.momentum * total + unit",
        "attack.momentum * total + direction",
        "pgd",
    ),
    Fault(
        "attacks/_apgd_rules.py",
        "due & (too_few | stuck)",
        "due & too_few",
        "golden_attacks attack_contract",
    ),
    Fault(
        "attacks/_apgd_rules.py",
        " + (1 - share) * (points - state.previous)",
        "",
        "golden_attacks attack_contract",
    ),
    Fault(
        "attacks/_apgd_rules.py",
        "max(window - max(",
        "max(window + max(",
        "golden_attacks attack_contract",
    ),
    Fault("attacks/_apgd_rules.py", "return due & sparser,", "return due,", "golden_attacks"),
    Fault(
        "attacks/_fab.py",
        "attack.overshoot * step_here",
        "step_here",
        "golden_attacks attack_contract",
    ),
    Fault(
        "attacks/_fab.py",
        "attack.backward * (moved - images)",
        "(moved - images)",
        "golden_attacks attack_contract",
    ),
    Fault(
        "attacks/_square.py",
        "(margin > state.margin)",
        "(margin < state.margin)",
        "square_and_spsa attack_contract",
    ),
    Fault(
        "attacks/_square.py",
        "2 * threat.epsilon * signs",
        "threat.epsilon * signs",
        "square_and_spsa attack_contract",
    ),
    Fault(
        "attacks/_autoattack/packing.py",
        "order <= first[rows]",
        "order < first[rows]",
        "autoattack",
    ),
    Fault(
        "attacks/_autoattack/members.py",
        "targets=9, stop_when_fooled=True)",
        "targets=8, stop_when_fooled=True)",
        "autoattack",
    ),
    Fault("attacks/_autoattack/search.py", "~right & allowed", "~right", "autoattack"),
    Fault("methods/trades.py", "+ self.beta * divergence", "+ divergence", "methods"),
    Fault("methods/mart.py", "boosted + self.beta", "boosted - self.beta", "methods"),
    Fault("methods/avmixup.py", "(1 - share) * vertex", "share * vertex", "methods"),
    Fault("methods/awp.py", "w + self.gamma * v", "w - self.gamma * v", "methods"),
    Fault("methods/awp.py", "if weight.ndim < 2:", "if weight.ndim < 1:", "methods"),
    Fault("data/augment.py", "image[:, ::-1]", "image[::-1]", "data_augment"),
    Fault(
        "data/augment.py",
        "0, height, jnp.int32) - size // 2",
        "0, height, jnp.int32)",
        "data_augment",
    ),
    Fault(
        "data/augment.py",
        "pixels * float(high) + pixels * float(low)",
        "pixels * float(high)",
        "data_augment",
    ),
    Fault(
        "data/batches.py",
        "return -(-examples // batch_size)",
        "return examples // batch_size",
        "data_batches data_sources train_on_data",
    ),
    Fault(
        "data/dataset.py",
        "(_HOLD_OUT_STREAM, seed)",
        "(_SUBSET_STREAM, seed)",
        "data_dataset data_sources",
    ),
    Fault(
        "data/feed.py",
        "permutation[used : used + size - share]",
        "permutation[: size - share]",
        "data_extra",
    ),
    Fault(
        "data/cifar.py",
        "pixels.transpose(0, 2, 3, 1)",
        "pixels.transpose(0, 3, 2, 1)",
        "data_archives",
    ),
    Fault(
        "training/resume.py",
        'opt_state=checkpoints.restore(source, "optimizer", fresh.opt_state)',
        "opt_state=fresh.opt_state",
        "train train_methods",
    ),
    Fault(
        "training/resume.py",
        'EpochMeter.from_dict(about["epoch_so_far"]) if resumed else EpochMeter()',
        "EpochMeter()",
        "train train_methods",
    ),
    Fault(
        "training/step.py",
        "(state.step % self.steps_per_epoch) * self.batch_size",
        "(state.step % self.steps_per_epoch)",
        "step devices train train_methods",
    ),
    Fault(
        "training/step.py",
        "jax.random.fold_in(key, state.step)",
        "key",
        "step train train_methods devices",
    ),
    Fault("training/step.py", "(10 + state.step)", "(100 + state.step)", "train_methods"),
    Fault(
        "training/optimizers.py",
        "optax.add_decayed_weights(optimizer.weight_decay)",
        "optax.add_decayed_weights(0.0)",
        "optim optimizers train_methods",
    ),
    Fault(
        "files.py",
        'record.get("step", step + 1) <= step',
        'record.get("step", step + 1) < step',
        "train train_methods",
    ),
    Fault(
        "evaluation/accuracy.py",
        "functools.partial(jax.random.fold_in, root)",
        "lambda row: jax.random.fold_in(root, 0 * row)",
        "accuracy train silent_robustness",
    ),
    Fault(
        "evaluation/record_files.py",
        'stored.get(name, defaults.get(name, "nothing"))',
        "stored.get(name)",
        "record_files evaluation_records",
    ),
    Fault(
        "evaluation/packed_bits.py",
        "unpackbits(packed, count=examples)",
        "unpackbits(packed)[-examples:]",
        "packed_bits report",
    ),
    Fault(
        "runs/checkpoints.py",
        "return max(scored, key",
        "return min(scored, key",
        "train train_methods",
    ),
]


def notice(fault: Fault, commit: str, *, before: bool) -> tuple[str, float]:
    """The first test that fails with a fault, or nothing, and the seconds that it took."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "agr_jax"
        subprocess.run(["git", "clone", "-q", "--shared", str(ROOT), str(copy)], check=True)
        subprocess.run(["git", "-C", str(copy), "checkout", "-q", commit], check=True)
        shared = ROOT.parent / "shared"
        if shared.is_dir():
            (Path(folder) / "shared").symlink_to(shared)
        path = copy / "agr_jax" / fault.path(before=before)
        text = path.read_text()
        if text.count(fault.right) < 1:
            raise SystemExit(f"{path.name} has no {fault.right!r}: mend {Path(__file__).name}")
        path.write_text(text.replace(fault.right, fault.wrong))
        started = time.monotonic()
        files = [f"tests/test_{name}.py" for name in fault.tests.split()]
        files = [name for name in files if (copy / name).is_file()]
        for each in (files, ["tests/test_float64.py"]):
            found = failing(copy, each)
            if found:
                break
        return found, time.monotonic() - started


def failing(copy: Path, files: list[str]) -> str:
    """The first test of these files that fails in a copy; nothing if all pass."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla"))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", *files],
        cwd=copy,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": cache},
        capture_output=True,
        text=True,
    )
    if result.returncode == 0:
        return ""
    match = re.search(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
    if match is None:
        raise SystemExit(result.stdout + result.stderr)
    return match[1]


def main() -> None:
    """Runs the faults and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", default="HEAD")
    parser.add_argument("--before", action="store_true", help="a commit from before the packages")
    parser.add_argument("--only", default="", help="faults whose file's path holds this")
    parser.add_argument("--table", type=Path, help="a Markdown file to append the rows to")
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", options.commit],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    caught = tried = 0
    for fault in FAULTS:
        if options.only not in fault.file:
            continue
        found, seconds = notice(fault, commit, before=options.before)
        tried, caught = tried + 1, caught + bool(found)
        change = f"`{fault.right.strip()}` -> `{fault.wrong.strip() or 'nothing'}`"
        row = f"| {fault.file} | {' '.join(change.split())} | {found or '**not noticed**'} |"
        print(row, f"{seconds:.0f} s", flush=True)
        if options.table:
            with options.table.open("a") as file:
                file.write(row + "\n")
    print(f"{caught} of {tried} are noticed at {commit[:7]}")


if __name__ == "__main__":
    main()
