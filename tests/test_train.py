"""Runs in this process, on digits with a small network, over four CPU devices."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agr_jax import data, sharding
from agr_jax.attacks import PGD
from agr_jax.config import Config, from_config_dict
from agr_jax.data import Split, to_unit_range
from agr_jax.errors import (
    CheckpointError,
    ConfigError,
    NonFiniteLossError,
    RunFolderError,
    UserError,
)
from agr_jax.evaluation import evaluate
from agr_jax.evaluation.accuracy import correct_under_attack
from agr_jax.evaluation.evaluate import evaluate_run
from agr_jax.evaluation.table import render_table
from agr_jax.files import JsonLines, read_json_lines
from agr_jax.runs import Run, checkpoints
from agr_jax.runs.checkpoints import SELECTION_METRIC
from agr_jax.runs.folder import (
    DATA,
    check_data,
    locked,
    read_config,
    write_config,
    write_data_record,
)
from agr_jax.threat import Linf
from agr_jax.training import run_log, train_run
from agr_jax.training.loop import Progress
from agr_jax.training.signals import StopOnSignal
from configs import digits_at


def overridden(values, **overrides) -> Config:
    """A checked config with other values; `agr__gop` is a field of the group `agr`."""
    with values.unlocked():
        for name, value in overrides.items():
            *groups, last = name.split("__")
            target = values
            for group in groups:
                target = target[group]
            target[last] = value
    return from_config_dict(values)


def small(**overrides) -> Config:
    """Digits, 256 images, 4 steps an epoch, PGD-2."""
    values = digits_at.get_config()
    values.model.name = "tests.tiny_network:create"
    values.epochs = 2
    values.batch_size = 64
    values.data.train_examples = 256
    values.data.validation_examples = 60
    values.data.picture = False
    values.attack.steps = 2
    values.agr.gics_start_epoch = 1
    values.eval.examples = 60
    values.eval.attacks = ("clean", "pgd2")
    return overridden(values, **overrides)


def variables_of(folder, which="last"):
    """The parameters and statistics of a run's checkpoint, as one flat dict of arrays."""
    path = checkpoints.find(folder, which)
    classifier, _ = Run.from_config(read_config(folder), folder).load_classifier(path)
    return {
        jax.tree_util.keystr(key): np.asarray(leaf)
        for key, leaf in jax.tree.leaves_with_path(dict(classifier.variables))
    }


def assert_bit_identical(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert train_run(small(), folder) == 0
    return folder


def test_a_run_leaves_what_it_promises(finished):
    assert json.loads((finished / "config.json").read_text())["epochs"] == 2
    records = read_json_lines(finished / "metrics.jsonl")
    assert [record["epoch"] for record in records] == [1, 2]
    for record in records:
        assert 0 <= record[SELECTION_METRIC] <= record["validation_clean_accuracy"] <= 1
        assert -1 <= record["cosine"] <= 1
        assert record["adversarial_loss"] > 0
    for which in ("last", "best"):
        row = json.loads((finished / "evaluations" / f"{which}-first60.json").read_text())
        assert row["examples"] == 60
        assert row["attacks"]["pgd2"]["correct"] <= row["attacks"]["clean"]["correct"]
        assert row["complete_data"] is False
        assert row["config"]["agr"]["enabled"] is True
    table = render_table([row])
    assert "PGD-2" in table
    assert "SUBSET" in table


def evaluated(folder, **changes):
    """The last checkpoint's record, and its file, after an evaluation with other fields."""
    config = read_config(folder)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, **changes))
    (record,) = evaluate_run(Run.from_config(config, folder), which=("last",))
    assert json.loads((folder / "evaluations/last-first60.json").read_text()) == record
    return record


def test_an_evaluation_adds_to_the_one_before(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    file = folder / "evaluations/last-first60.json"
    before = json.loads(file.read_text())
    record = evaluated(folder, attacks=("fgsm", "pgd2@linf=3/20", "pgd2@linf=0.3"))
    assert list(record["attacks"]) == ["clean", "pgd2", "fgsm", "pgd2@linf=3/20", "pgd2@linf=0.3"]
    for name in ("clean", "pgd2"):
        kept = before["attacks"][name]
        assert record["attacks"][name] == {**kept, "environment": before["environment"]}
    assert "environment" not in record["attacks"]["fgsm"]
    same, wider = (record["attacks"][f"pgd2@linf={radius}"] for radius in ("3/20", "0.3"))
    assert same["correct_images"] == record["attacks"]["pgd2"]["correct_images"]
    assert wider["settings"]["threat"] == "Linf(epsilon=0.3)"
    assert "| clean | PGD-2 | FGSM | PGD-2, Linf 3/20 | PGD-2, Linf 0.3 |" in render_table([record])
    missing = {**record, "attacks": {"clean": record["attacks"]["clean"]}}
    assert render_table([record, missing]).splitlines()[3].endswith("| - | - | - | - |")

    capsys.readouterr()
    # The same images may lie in another folder.
    moved = json.loads(file.read_text())
    file.write_text(json.dumps({**moved, "data": "images from elsewhere"}))
    assert list(evaluated(folder, attacks=("clean",))["attacks"]) == list(record["attacks"])
    # An older version's file has no digests, and lacks younger settings.
    old = json.loads(file.read_text())
    del old["digests"], old["selection"]
    for setting in ("targeted", "draws", "momentum"):
        del old["attacks"]["pgd2"]["settings"][setting]
    file.write_text(json.dumps(old))
    assert list(evaluated(folder, attacks=("clean",))["attacks"]) == list(record["attacks"])
    # What is of other settings is kept apart, and said to be.
    before = json.loads(file.read_text())["attacks"]
    capsys.readouterr()
    record = evaluated(folder, attacks=("clean",), step_size=0.1)
    assert list(record["attacks"]) == ["clean", "fgsm", "pgd2@linf=0.3"]
    shown = render_table([record])
    (group,) = record["earlier"]
    reason = "step_size: 0.0375 there, 0.1 here"
    assert {name: found.pop("reason") for name, found in group["attacks"].items()} == {
        "pgd2": reason,
        "pgd2@linf=3/20": reason,
    }
    assert group["attacks"] == {name: before[name] for name in group["attacks"]}
    assert f"{file}: pgd2 is kept under 'earlier': {reason}" in capsys.readouterr().out
    assert f"earlier, not in this table (last, PGD-2): {reason}" in shown
    assert "earlier" not in evaluated(folder, attacks=("clean",))
    damaged = file.read_text()[:100]
    file.write_text(damaged)
    assert list(evaluated(folder, attacks=("clean",))["attacks"]) == ["clean"]
    assert f"{file} is damaged, and is kept as {file.name}.damaged" in capsys.readouterr().out
    assert file.with_name(f"{file.name}.damaged").read_text() == damaged
    other = json.loads(file.read_text())
    other["digests"]["network"] = "0"
    file.write_text(json.dumps(other))
    record = evaluated(folder, attacks=("fgsm",))
    assert list(record["attacks"]) == ["fgsm"]
    assert record["earlier"][0]["attacks"]["clean"]["correct"] == before["clean"]["correct"]
    assert "digests" in record["earlier"][0]["attacks"]["clean"]["reason"]


def test_the_progress_of_another_evaluation_stays(finished, tmp_path, capsys, monkeypatch):
    """An evaluation that was killed is continued, also after another one of the same attack."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    begun = folder / "evaluations/.last-first60/pgd4"
    batches = []

    def killed(*arguments, journal, **options):
        batches.append(sum(1 for _ in journal._folder.glob("*.npz")))
        found = correct_under_attack(*arguments, journal=journal, **options)
        if len(batches) == 1:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(evaluate, "correct_under_attack", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluated(folder, attacks=("pgd4",))
    (done,) = begun.glob("*.npz")
    evaluated(folder, attacks=("pgd4",), step_size=0.1)
    assert "beginning again in another folder" in capsys.readouterr().out
    assert done.exists()
    assert [path.name for path in begun.parent.iterdir() if path.is_dir()] == ["pgd4"]
    evaluated(folder, attacks=("pgd4",))
    assert batches == [0, 0, 1]
    assert not begun.parent.exists()


def test_steps_that_are_too_short_are_said_to_be(finished):
    row = json.loads((finished / "evaluations/last-first60.json").read_text())
    (message,) = row["attacks"]["pgd2"]["warnings"]
    assert message.startswith("2 steps of 0.0375 go 0.075 from where they start, in a ball of rad")
    assert "0.1875, are usual" in message
    assert "warnings" not in row["attacks"]["clean"]
    assert f"warning (last, PGD-2): {message}" in render_table([row])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optimizer__milestones": (1,), "attack__steps": 4}, []),
        ({"optimizer__milestones": (1, 9), "attack__steps": 4}, []),
        (
            {"optimizer__milestones": (2, 9), "attack__steps": 4},
            [r"config\.optimizer\.milestones: of \(2, 9\) none is reached in 2 epochs"],
        ),
        ({"optimizer__schedule": "cosine", "attack__steps": 4}, []),
        (
            {"optimizer__milestones": (1,), "agr__gics_start_epoch": 2, "attack__steps": 4},
            [r"config\.agr\.gics_start_epoch: 2 is not reached in 2 epochs"],
        ),
        (  # the control, which would be plain AT
            {
                "optimizer__milestones": (1,),
                "agr__gop": False,
                "agr__interpolation": "none",
                "agr__clip": "all",
                "agr__clip_start_epoch": 150,
                "attack__steps": 4,
            },
            [r"config\.agr\.clip_start_epoch: 150 is not reached in 2 epochs"],
        ),
        (
            {
                "optimizer__milestones": (1,),
                "awp__enabled": True,
                "awp__start_epoch": 10,
                "attack__steps": 4,
            },
            [r"config\.awp\.start_epoch: 10 is not reached in 2 epochs"],
        ),
        (
            {
                "optimizer__milestones": (1,),
                "agr__gics_start_epoch": 2,
                "agr__enabled": False,
                "attack__steps": 3,
            },
            [r"config\.attack\.step_size: 3 steps of 0\.0375 go 0\.1125"],
        ),
        ({"optimizer__milestones": (1,), "attack__steps": 1, "method": "standard"}, []),
    ],
)
def test_what_is_seldom_meant_is_said_before_the_first_step(changes, expected):
    found = run_log.cautions(small(**changes))
    assert len(found) == len(expected)
    for line, message in zip(found, expected, strict=True):
        assert re.match(f"caution: {message}", line), line


def test_the_best_the_last_and_the_wanted_checkpoints_are_kept(tmp_path):
    scores = {1: 0.3, 2: 0.6, 3: 0.5, 4: 0.4}
    tree = {"w": np.zeros(2)}
    with checkpoints.Checkpoints(tmp_path / "checkpoints", keep_steps=[1], select_best=True) as own:
        for step, score in scores.items():
            own.save(step, variables=tree, optimizer=tree, about={}, selection_metric=score)
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {1, 2, 4}
    assert checkpoints.find(tmp_path, "best").name == "2"
    assert checkpoints.find(tmp_path).name == "4"


def test_the_best_checkpoint_has_the_held_out_accuracy_that_the_metrics_say(finished):
    records = read_json_lines(finished / "metrics.jsonl")
    best = max(record[SELECTION_METRIC] for record in records)
    step = int(checkpoints.find(finished, "best").name)
    assert {r["step"]: r[SELECTION_METRIC] for r in records}[step] == best


def test_same_seed_same_bits_and_another_seed_other_bits(finished, tmp_path):
    assert train_run(small(), tmp_path / "again") == 0
    assert_bit_identical(variables_of(finished), variables_of(tmp_path / "again"))
    assert train_run(small(seed=1, epochs=1), tmp_path / "other") == 0
    name = "['params']['conv']['kernel']"
    assert (variables_of(tmp_path / "other")[name] != variables_of(finished)[name]).any()


@pytest.mark.parametrize(
    "stop_at",
    [pytest.param(1, marks=pytest.mark.slow), 4, 6, pytest.param(8, marks=pytest.mark.slow)],
)
def test_stopped_and_continued_equals_undisturbed(finished, tmp_path, monkeypatch, stop_at):
    seen = 0
    original = Progress.advance

    def advance(self, *args, **kwargs):
        nonlocal seen
        if self._unit == "step":
            seen += 1
            if seen == stop_at:
                signals[-1].signal = 15
        return original(self, *args, **kwargs)

    signals = []
    enter = StopOnSignal.__enter__
    monkeypatch.setattr(StopOnSignal, "__enter__", lambda self: signals.append(self) or enter(self))
    monkeypatch.setattr(Progress, "advance", advance)
    folder = tmp_path / "run"
    assert train_run(small(), folder) == 128 + 15
    assert int(checkpoints.find(folder).name) == stop_at
    assert not (folder / "evaluations").exists()
    assert train_run(small(), folder) == 0
    assert_bit_identical(variables_of(finished), variables_of(folder))
    ours, theirs = (read_json_lines(f / "metrics.jsonl") for f in (folder, finished))
    for mine, other in zip(ours, theirs, strict=True):
        for name in mine.keys() - {"seconds", "images_per_second", "peak_memory_mb"}:
            assert mine[name] == pytest.approx(other[name], rel=1e-12), name


def test_a_finished_run_only_evaluates_again(finished, capsys):
    before = (finished / "metrics.jsonl").read_text()
    assert train_run(small(eval__examples=30), finished) == 0
    assert (finished / "metrics.jsonl").read_text() == before
    assert "30 test images" in capsys.readouterr().out
    assert train_run(small(), finished) == 0


@pytest.fixture(scope="module")
def finished_at(tmp_path_factory):
    """Two epochs of AT, without AGR."""
    folder = tmp_path_factory.mktemp("runs") / "at"
    assert train_run(small(agr__enabled=False), folder) == 0
    return folder


def test_a_branch_goes_on_from_its_base(finished, finished_at, tmp_path):
    baseline = {"agr__enabled": False, "epochs": 3, "init_from": str(finished)}
    assert train_run(small(**baseline), tmp_path / "branch") == 0
    records = read_json_lines(tmp_path / "branch" / "metrics.jsonl")
    assert [record["epoch"] for record in records] == [3]
    # A longer undisturbed AT run of the same settings is the same as base plus branch, bit for bit.
    off = {"agr__enabled": False}
    assert train_run(small(**off, epochs=1), tmp_path / "base") == 0
    assert train_run(small(**off, init_from=str(tmp_path / "base")), tmp_path / "two") == 0
    assert_bit_identical(variables_of(finished_at), variables_of(tmp_path / "two"))


def test_agr_with_nothing_active_is_at_bit_for_bit(finished_at, tmp_path):
    nothing = {"agr__gop": False, "agr__interpolation": "none", "agr__clip": "none"}
    assert train_run(small(**nothing), tmp_path / "agr") == 0
    assert_bit_identical(variables_of(finished_at), variables_of(tmp_path / "agr"))


@pytest.mark.slow
def test_the_last_short_batch_can_be_kept(tmp_path):
    settings = {"data__train_examples": 240, "data__last_batch": "keep", "epochs": 1}
    assert train_run(small(**settings), tmp_path / "run") == 0
    assert int(checkpoints.find(tmp_path / "run").name) == 4


@pytest.mark.slow
def test_training_in_another_norm_runs(tmp_path):
    # Standard training runs in test_train_methods.py.
    settings = {"attack__norm": "l1", "attack__epsilon": 5.0, "epochs": 1}
    assert train_run(small(**settings), tmp_path / "l1") == 0


def test_nothing_compiles_after_the_first_step_of_each_kind(tmp_path, caplog):
    with jax.log_compiles():
        assert train_run(small(epochs=3, agr__gop=False), tmp_path / "run") == 0
    lines = [r.getMessage() for r in caplog.records if "Compiling jit(step)" in r.getMessage()]
    # Without the clean gradient in epoch 1, with it in epochs 2 and 3.
    assert len(lines) == 2


# What goes wrong: one clear error, and nothing lost.


def refused(error: type[UserError], message: str, config: Config, folder) -> None:
    with pytest.raises(error, match=message):
        train_run(config, folder)


def test_folder_of_another_run(finished):
    before = variables_of(finished)
    message = r"holds another run \(config\.agr\.tau: 0\.9 there, 0\.5 here"
    refused(RunFolderError, message, small(agr__tau=0.5), finished)
    assert_bit_identical(before, variables_of(finished))


def test_other_images_do_not_continue_a_run(tmp_path):
    write_data_record(tmp_path, {"source": "there", "digests": {"train": "a"}})
    check_data(tmp_path, {"train": "b"})  # nothing was trained on them yet
    (tmp_path / "checkpoints/4").mkdir(parents=True)
    check_data(tmp_path, {"train": "a"})
    check_data(tmp_path, {})  # of a set whose digests nobody takes
    with pytest.raises(RunFolderError, match=r"other images \(from there; train differ\)"):
        check_data(tmp_path, {"train": "b"})
    write_data_record(tmp_path, {"source": "there"})  # of an older version
    check_data(tmp_path, {"train": "b"})
    (tmp_path / DATA).write_text("[]")
    with pytest.raises(RunFolderError, match=r"data\.json cannot be read"):
        check_data(tmp_path, {"train": "a"})


def test_other_images_are_refused_before_training(finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    record = json.loads((folder / DATA).read_text())
    write_data_record(folder, {**record, "digests": {"test": "a"}})
    dataset = data.from_config(small())
    other = dataclasses.replace(dataset, digests={"test": "b"})
    monkeypatch.setattr(data, "from_config", lambda _: other)
    refused(RunFolderError, "other images .*test differ", small(), folder)


def test_checkpoint_of_another_model_or_data_set_in_the_folder(finished, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(finished, folder)
    config = small(model__name="wrn16_1")
    write_config(folder, config)
    refused(
        CheckpointError, r"another model \(name: 'tests.* there, 'wrn16_1' here", config, folder
    )
    about = checkpoints.find(folder) / "about" / "metadata"
    about.write_text(about.read_text().replace('"digits"', '"cifar10"'))
    write_config(folder, small())
    refused(CheckpointError, r"another data set \(name: 'cifar10' there", small(), folder)


def test_a_failed_start_does_not_claim_its_folder(finished, tmp_path):
    config = small(init_from=str(finished), model__name="wrn16_1", epochs=3)
    refused(CheckpointError, "another model", config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_branches_that_make_no_sense(finished, tmp_path):
    config = small(init_from=str(finished))
    refused(ConfigError, r"config\.epochs: .* 2 epochs already", config, tmp_path / "a")
    config = small(init_from=str(finished), epochs=3, batch_size=32)
    refused(
        CheckpointError, r"another training \(steps_per_epoch: 4 there, 8", config, tmp_path / "b"
    )
    config = small(init_from=str(finished), epochs=3, batch_stats="adversarial")
    refused(CheckpointError, r"batch_stats: 'clean_then", config, tmp_path / "c")
    config = small(init_from=str(tmp_path / "nowhere"))
    refused(CheckpointError, "no checkpoint here", config, tmp_path / "d")


def test_nan_loss_is_named_and_never_saved(tmp_path):
    config = small(optimizer__learning_rate=1e30, method="standard", agr__enabled=False)
    refused(
        NonFiniteLossError, r"loss is nan at step \d+: training diverged", config, tmp_path / "r"
    )
    assert not list((tmp_path / "r" / "checkpoints").glob("[0-9]*"))


def test_folder_in_use(tmp_path):
    with locked(tmp_path / "run"):
        refused(RunFolderError, "in use by another process", small(), tmp_path / "run")


def test_evaluation_fields_are_checked_before_training(tmp_path):
    refused(ConfigError, "must be of clean, fgsm", small(eval__attacks=("pgd",)), tmp_path / "a")
    refused(ConfigError, "test set has 355", small(eval__examples=10_000), tmp_path / "b")
    refused(ConfigError, r"config\.model\.mean", small(model__mean=(0.1, 0.2)), tmp_path / "c")


@pytest.mark.slow
def test_verdicts_do_not_depend_on_batching_or_devices(finished):
    config = read_config(finished)
    dataset = data.from_config(config)
    attack = PGD(Linf(0.1), steps=3)
    masks = []
    for batch_size, devices in ((355, 1), (64, 1), (50, 4)):
        mesh = sharding.data_mesh(jax.devices()[:devices])
        run = Run(config, finished, dataset, mesh)
        classifier, _ = run.load_classifier(checkpoints.find(finished))
        # A network of a few steps is right on few images: what it says counts as right.
        said = np.argmax(classifier(to_unit_range(jnp.asarray(dataset.test.images))), -1)
        split = Split(dataset.test.images, said.astype(np.int32))
        masks.append(
            correct_under_attack(
                classifier, attack, split, seed=0, batch_size=batch_size, mesh=mesh
            )
        )
    assert 0.1 < masks[0].mean() < 0.9
    np.testing.assert_array_equal(masks[0], masks[1])
    # Other devices reduce in another order: an image at the decision boundary may tip.
    assert (masks[0] != masks[2]).sum() <= 1


def test_an_attack_that_returns_nan_stops_the_evaluation(finished):
    """Its logits are no prediction, which would count as a success."""
    run = Run.from_config(read_config(finished), finished)
    dataset = run.dataset
    classifier, _ = run.load_classifier(checkpoints.find(finished))
    attack = PGD(Linf(0.01), steps=1, loss=lambda z, y: jnp.nan * z[:, 0])
    split = Split(dataset.test.images[:8], dataset.test.labels[:8])
    settings = {"seed": 0, "batch_size": 8, "mesh": run.mesh}
    with pytest.raises(NonFiniteLossError, match=r"images 0 to 7 under PGD: the network's logits"):
        correct_under_attack(classifier, attack, split, **settings)
    variables = jax.tree.map(lambda leaf: jnp.nan * leaf, classifier.variables)
    broken = dataclasses.replace(classifier, variables=variables)
    with pytest.raises(NonFiniteLossError, match="images 0 to 7 under no attack"):
        correct_under_attack(broken, None, split, **settings)


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(OSError(28, "No space left on device"), id="orbax", marks=pytest.mark.slow),
        pytest.param(ValueError("RESOURCE_EXHAUSTED: No space left"), id="tensorstore"),
    ],
)
def test_a_full_disk_loses_nothing(finished, tmp_path, monkeypatch, error):
    folder = tmp_path / "run"
    assert train_run(small(epochs=1), folder) == 0
    before = variables_of(folder)

    def no_space(*args, **kwargs):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.ocp.CheckpointManager, "save", no_space)
        refused(CheckpointError, "could not be written .*No space left", small(), folder)
    assert_bit_identical(before, variables_of(folder))
    assert train_run(small(), folder) == 0
    assert_bit_identical(variables_of(finished), variables_of(folder))


def test_a_later_step_in_the_folder_is_not_passed_over_in_silence(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "checkpoints" / "99999").mkdir()
    refused(CheckpointError, "step 12 was not saved, for a later step", small(epochs=3), folder)


def test_a_damaged_config_is_named(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for text in ("null", "{", "[]"):
        (folder / "config.json").write_text(text)
        refused(RunFolderError, r"config\.json cannot be read", small(), folder)


def test_a_run_is_extended_but_not_shortened(finished, tmp_path):
    refused(ConfigError, r"has done 2 epochs already, got 1", small(epochs=1), finished)
    cosine = {"optimizer__schedule": "cosine", "epochs": 1}
    (tmp_path / "checkpoints/4").mkdir(parents=True)
    write_config(tmp_path, small(**cosine))
    # The rate of every epoch depends on the last one.
    message = r"config\.epochs: 1 there, 2 here"
    refused(RunFolderError, message, small(**{**cosine, "epochs": 2}), tmp_path)


def test_a_branch_cannot_hold_out_what_its_base_was_trained_on(finished, tmp_path):
    config = small(init_from=str(finished), epochs=3, seed=1)
    refused(CheckpointError, r"another data set .split_seed: 0 there, 1 here", config, tmp_path)


@pytest.mark.slow
def test_global_granularity_branches_from_a_run_without(finished, tmp_path):
    config = small(init_from=str(finished), epochs=3, agr__granularity="global")
    assert train_run(config, tmp_path / "run") == 0


def test_damaged_lines_of_the_metrics_cost_only_themselves(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"ste\xff\n{"step": 2}\n[]\n{}\n{"step": 3}\n{"st')
    with JsonLines(path) as log:
        log.forget_after(2)
        log.write({"step": 3, "loss": float("nan")})
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": None}]


def test_a_write_that_fails_in_the_background_is_named(tmp_path, monkeypatch):
    def failed(self):
        raise ValueError("RESOURCE_EXHAUSTED: No space left")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.ocp.CheckpointManager, "wait_until_finished", failed)
        with pytest.raises(CheckpointError, match=r"could not be written .*No space left"):
            train_run(small(epochs=1), tmp_path / "run")
