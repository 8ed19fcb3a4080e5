"""A checkpoint's row: accuracy on clean images and under attacks, in float32."""

from __future__ import annotations

import functools
import itertools
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import agr_jax
from agr_jax import checkpoints, evaluation_records, mesh, network, run_folder
from agr_jax import config as config_module
from agr_jax.attacks import PGD, Attack, AutoAttack, named
from agr_jax.attacks.attack import GradientAttack
from agr_jax.attacks.journal import BatchRecord, Journal, digest
from agr_jax.attacks.pgd import too_short
from agr_jax.config import Config
from agr_jax.data import Dataset, Split, load_dataset, to_unit_range
from agr_jax.data.batches import evaluation_batches
from agr_jax.data.dataset import Part, part_of
from agr_jax.errors import CheckpointError, ConfigError, NonFiniteLossError, OtherEvaluationError
from agr_jax.image_masks import encode_mask
from agr_jax.metrics import Progress
from agr_jax.models import Classifier


def make_attacks(config: Config) -> dict[str, Attack | None]:
    """The attacks that `config.eval.attacks` names, in their order; see `agr_jax.attacks.named`.

    Raises:
        ConfigError: on an unknown name.
    """
    names = named.names(config.eval.attacks)
    return {name: evaluation_records.make_attack(config, name) for name in names}


def correct_under_attack(
    classifier: Classifier,
    attack: Attack | None,
    split: Split,
    *,
    seed: int,
    batch_size: int,
    on: Mesh,
    progress: Progress | None = None,
    journal: Journal | None = None,
    messages: list[str] | None = None,
) -> np.ndarray:
    """Which images are classified correctly after the attack.

    The attack's draws depend on the seed and on an image's position in the split alone, not on the
    batch size or the number of devices.

    Args:
        classifier: network with its variables.
        attack: `None` for the clean images.
        split: images and labels.
        seed: of the attack.
        batch_size: images at a time; the last batch is filled up, so that one program serves all.
        on: devices to share each batch.
        progress: advanced by one per batch.
        journal: of the batches that are done.
        messages: gets what makes the result unreliable.

    Returns:
        Booleans `[examples]`.

    Raises:
        NonFiniteLossError: if the attack's images, or the logits there, are NaN.
    """
    batch_size = min(batch_size, len(split.labels))
    batch_size += -batch_size % on.size
    root = jax.random.key(seed)
    masks, blind = [], 0
    for start, stop in evaluation_batches(len(split.labels), batch_size):
        # The last batch repeats its last image until it is full.
        rows = np.minimum(np.arange(start, start + batch_size), stop - 1)
        record = None if journal is None else journal.next("batch", rows[: stop - start])
        if record is not None:
            masks.append(~record.fooled)
            blind += int(record.zero_gradients)
            if progress is not None:
                progress.advance()
            continue
        started = time.perf_counter()
        keys = jax.vmap(functools.partial(jax.random.fold_in, root))(rows)
        batch = jax.device_put(
            (split.images[rows], split.labels[rows], keys), mesh.batch_sharding(on)
        )
        with jax.default_matmul_precision("float32"):
            correct, defined, no_gradient = _correct(attack, classifier, *batch)
        if not bool(defined.all()):
            under = "no attack" if attack is None else type(attack).__name__
            raise NonFiniteLossError(
                f"images {start} to {stop - 1} under {under}: the network's logits, or their "
                "gradient, are NaN for some, which says nothing of its robustness"
            )
        masks.append(np.asarray(correct)[: stop - start])
        zero_gradients = int(np.asarray(no_gradient)[: stop - start].sum())
        blind += zero_gradients
        if journal is not None:
            seconds = time.perf_counter() - started
            record = BatchRecord.of_mask(rows[: stop - start], ~masks[-1], seconds, zero_gradients)
            journal.add("batch", record)
        if progress is not None:
            progress.advance()
    if blind and messages is not None:
        messages.append(
            f"the loss has no gradient where the attack starts, at {blind} of "
            f"{len(split.labels)} images: it is blind there; compare with square"
        )
    return np.concatenate(masks)


@functools.partial(jax.jit, static_argnums=0)
def _correct(
    attack: Attack | None,
    classifier: Classifier,
    images: jax.Array,
    labels: jax.Array,
    keys: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which images are right, where nothing is NaN, and where the attack began with no gradient."""
    inputs, no_gradient = to_unit_range(images), jnp.zeros_like(labels, bool)
    if isinstance(attack, GradientAttack):
        inputs, (no_gradient, _) = attack.look(classifier, inputs, labels, keys)
    elif attack is not None:
        inputs = attack(classifier, inputs, labels, keys)
    logits = classifier(inputs)
    defined = ~(jnp.isnan(inputs).reshape(len(labels), -1).any(1) | jnp.isnan(logits).any(1))
    return jnp.argmax(logits, axis=-1) == labels, defined, no_gradient


def evaluate_run(
    folder: Path,
    config: Config,
    *,
    which: Sequence[str] | None = None,
    dataset: Dataset | None = None,
    on: Mesh | None = None,
    label: str = "",
) -> list[dict[str, Any]]:
    """Evaluates checkpoints of a run on the test set, and saves `evaluations/<which>.json`.

    With fewer than all test images the file is `<which>-first<n>.json`, or `<which>-drawn<n>.json`
    where the test set is ordered by class (see `test_part`), so that it never replaces the whole
    evaluation; a label comes before that, `<which>-<label>-first<n>.json`. Other attacks that the
    file has of the same evaluation stay in it, each with the `environment` that it ran in; all else
    that it has is kept under `earlier` (see `evaluation_records`). What is done is kept batch by
    batch: the same call continues an evaluation that was killed, and ends with the same result.

    Args:
        folder: the run folder.
        config: its config, possibly with other `eval` fields.
        which: of `last`, `best` and `average`, by default `config.eval.checkpoints`; beside the
            last one, the best is left out where nothing was held out, and the average where none is
            kept. Where one is kept, the best is the average of its epoch.
        dataset: already loaded, or `None` to load it.
        on: devices, by default all.
        label: tells evaluations of one checkpoint with other attacks apart.

    Returns:
        One record per checkpoint: what the JSON file holds.

    Raises:
        CheckpointError: if the run has no checkpoint, or one of another model or data set.
        ConfigError: on an unknown attack or too many examples.
    """
    which = config.eval.checkpoints if which is None else which
    attacks = make_attacks(config)
    dataset = dataset if dataset is not None else dataset_from_config(config)
    on = on if on is not None else mesh.data_mesh()
    part = test_part(config, dataset)
    split = test_split(config, dataset)
    subset = (f"-{label}" if label else "") + part.suffix
    records = []
    for name in which:
        try:
            checkpoint = checkpoints.find(folder, name)
        except CheckpointError:
            if name != "last" and "last" in which:  # nothing held out or not scored, no average
                continue
            raise
        # What the held-out split scored, and so what is best, is the average where one is kept.
        averaged = name != "last" and (checkpoint / "average").is_dir()
        item = "average" if averaged else "variables"
        classifier, about = network.load_classifier(checkpoint, config, dataset, on, item=item)
        digests = {
            "network": digest(classifier),
            "images": digest([split.images, split.labels]),
        }
        record: dict[str, Any] = {
            "checkpoint": name,
            "step": about["step"],
            "epoch": about["epoch"],
            "weights": "moving average" if averaged else "as trained",
            "data": dataset.describe(),
            "complete_data": dataset.complete,
            "examples": len(part),
            "selection": str(part),
            "seed": config.seed,
            "threat": {"norm": config.attack.norm, "epsilon": config.attack.epsilon},
            "digests": digests,
            "attacks": {},
            **provenance(config, on),
        }
        path = run_folder.evaluations_path(folder) / f"{name}{subset}.json"
        # What is done of attacks that are not asked for now stays there.
        unfinished = run_folder.evaluations_path(folder) / f".{name}{subset}"
        with run_folder.locked(unfinished):
            kept, earlier = _carried_over(path, record, config)
            record["attacks"] = kept
            done = []
            for attack_name, attack in attacks.items():
                arguments = attack_name, attack, classifier, split, config, on, digests
                begun = unfinished / attack_name.replace("/", "-")
                found, where = _continued(begun, functools.partial(_evaluate_attack, *arguments))
                record["attacks"][attack_name] = found
                done.append(where)
            if earlier:
                record["earlier"] = earlier
            evaluation_records.write(path, record)
            for where in done:
                shutil.rmtree(where, ignore_errors=True)
            if {path.name for path in unfinished.iterdir()} == {".lock"}:
                shutil.rmtree(unfinished)
        records.append(record)
    return records


def _carried_over(
    path: Path, record: Mapping[str, Any], config: Config
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a file has of this evaluation, and what else it has, which stays in it too."""
    stored = evaluation_records.read(path)
    # The images' digest knows them wherever they lie; what describes them names the folder, but
    # files of earlier versions have no digests.
    images = "digests" if "digests" in stored else "data"
    asked = {name: record[name] for name in ("step", "seed", "examples", images)}
    kept, earlier, moved = evaluation_records.carry_over(stored, config, asked)
    for result in moved:
        print(f"{path}: {result.name} is kept under 'earlier': {result.reason}", flush=True)
    return kept, earlier


def _continued(
    folder: Path, evaluate: Callable[[Path], dict[str, Any]]
) -> tuple[dict[str, Any], Path]:
    """What an evaluation gives that keeps its batches in a folder, and the folder.

    Where the folder has those of another evaluation, they stay, and a folder beside it is taken.
    """
    for number in itertools.count(2):
        try:
            return evaluate(folder), folder
        except OtherEvaluationError as error:
            print(f"beginning anew in a folder beside: {error}", flush=True)
            folder = folder.with_name(f"{folder.name.partition('.other-')[0]}.other-{number}")
    raise AssertionError("there is always another number")


def _evaluate_attack(
    name: str,
    attack: Attack | None,
    classifier: Classifier,
    split: Split,
    config: Config,
    on: Mesh,
    digests: Mapping[str, str],
    folder: Path,
) -> dict[str, Any]:
    """One attack's entry of a record."""
    started = time.perf_counter()
    if isinstance(attack, AutoAttack):
        images = np.asarray(to_unit_range(jnp.asarray(split.images)))
        key = jax.random.key(config.seed)
        result = attack.evaluate(classifier, images, split.labels, key, folder=folder, on=on)
        correct = result.robust
        found = {
            "correct": int(correct.sum()),
            **result.as_dict(),
            "settings": named.describe(attack),
        }
    else:
        settings = named.describe(attack)
        absent = evaluation_records.default_settings(attack)
        identity = {
            **{field: str(value) for field, value in settings.items()},
            "seed": config.seed,
            "batch_size": config.eval.batch_size,
            **digests,
        }
        batch_size = min(config.eval.batch_size, len(split.labels))
        batches = -(-len(split.labels) // (batch_size + -batch_size % on.size))
        with Progress(name, batches, unit="batch") as progress:
            messages: list[str] = []
            correct = correct_under_attack(
                classifier,
                attack,
                split,
                seed=config.seed,
                batch_size=config.eval.batch_size,
                on=on,
                progress=progress,
                journal=Journal(folder, identity, {n: str(v) for n, v in absent.items()}),
                messages=messages,
            )
        found = {
            "correct": int(correct.sum()),
            "accuracy": float(correct.mean()),
            "settings": settings,
        }
        if isinstance(attack, PGD) and (message := too_short(attack)):
            messages.append(message)
        if messages:
            found["warnings"] = messages
    # Seconds of this start alone: a continued evaluation does not repeat what was done.
    found["correct_images"] = encode_mask(correct)
    return {**found, "wall_seconds": round(time.perf_counter() - started, 2)}


def test_split(config: Config, dataset: Dataset) -> Split:
    """The test images that `config.eval.examples` asks for; see `test_part`.

    Raises:
        ConfigError: if the test set has fewer.
    """
    part = test_part(config, dataset)
    return dataset.test.take(part.rows) if part.suffix else dataset.test


def test_part(config: Config, dataset: Dataset) -> Part:
    """Which test images these are: all for 0, or else as many as are asked for.

    The first ones, or, where the test set is ordered by class, some drawn with a seed that all runs
    share; see `agr_jax.data.dataset.part_of`.

    Raises:
        ConfigError: if the test set has fewer.
    """
    examples = config.eval.examples or len(dataset.test)
    if examples > len(dataset.test):
        raise ConfigError(
            f"config.eval.examples: {examples} asked for, the test set has {len(dataset.test)}"
        )
    return part_of(dataset.test, examples)


def dataset_from_config(config: Config) -> Dataset:
    """Reads the data set that a config names."""
    data = config.data
    return load_dataset(
        data.name,
        directory=data.dir or None,
        image_size=data.image_size or None,
        resize=data.resize,
        subset_ok=data.subset_ok,
        train_examples=data.train_examples or None,
        validation_examples=data.validation_examples,
        seed=config.seed,
        may_download=data.download,
        use_cache=data.cache,
    )


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as a Markdown table, accuracies in percent."""
    if not records:
        raise CheckpointError("nothing was evaluated")
    attacks = [evaluation_records.attacks_of(record) for record in records]
    names = list(dict.fromkeys(name for found in attacks for name in found))
    titles = [named.title(name) for name in names]
    lines = [
        "| checkpoint | epoch | " + " | ".join(titles) + " |",
        "|---|---|" + "---|" * len(titles),
    ]
    for record, found in zip(records, attacks, strict=True):
        cells = [f"{100 * found[name]['accuracy']:.2f}" if name in found else "-" for name in names]
        lines.append(f"| {record['checkpoint']} | {record['epoch']} | " + " | ".join(cells) + " |")
    record = records[0]
    note = "" if record["complete_data"] else "; a SUBSET of the data set, not comparable"
    threat, settings = record["threat"], record["config"]["eval"]
    lines.append("")
    lines.append(
        f"% correct of {record['examples']} test images{_selection(record)}, {threat['norm']} "
        f"epsilon {threat['epsilon']:.4g}, seed {record['seed']}{note}"
    )
    radii = {"linf": 8 / 255, "l2": settings["l2_epsilon"], "l1": settings["l1_epsilon"]}
    asked = [named.split(name) for name in names]
    others = {each.norm for each in asked if each.norm and each.epsilon is None}
    for norm in sorted(others - {threat["norm"]}):
        lines.append(f"columns {norm.capitalize()}: epsilon {radii[norm]:.4g}")
    for each, of_each in zip(records, attacks, strict=True):
        for name, found in of_each.items():
            lines += [
                f"warning ({each['checkpoint']}, {named.title(name)}): {message}"
                for message in found.get("warnings", [])
            ]
        lines += [
            f"earlier, not in this table ({each['checkpoint']}, {named.title(name)}): "
            f"{entry.get('reason')}"
            for group in each.get("earlier", [])
            for name, entry in evaluation_records.attacks_of(group).items()
        ]
    return "\n".join(lines)


def _selection(record: Mapping[str, Any]) -> str:
    """Which test images, in brackets; nothing for all of them."""
    selection = record.get("selection", "all ")  # files of earlier versions do not say it
    return "" if selection.startswith("all ") else f" ({selection})"


def provenance(config: Config, on: Mesh) -> dict[str, Any]:
    """What a record needs to be repeated: versions, commit, devices, and the whole config."""
    return {"environment": _environment(on), "config": config_module.to_dict(config)}


def _environment(on: Mesh) -> dict[str, Any]:
    device = on.devices.flat[0]
    return {
        "agr_jax": agr_jax.__version__,
        "commit": _commit(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{on.size} x {device.device_kind} ({device.platform})",
    }


def _commit() -> str | None:
    """Commit of the checkout that this package lies in, if it lies in one."""
    git = Path(__file__).resolve().parents[1] / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        if (git / name).exists():
            return (git / name).read_text().strip()
        packed = (git / "packed-refs").read_text().splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)
    except OSError:
        return None
