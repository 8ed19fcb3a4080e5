"""Runs of every method in this process: continuing, the moving average, ablations, diagnostics.

On digits with a small network, over four CPU devices.
"""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train import overridden

from agr_jax import data, diagnostics, leaf_names, methods, models, sharding
from agr_jax.attacks import PGD
from agr_jax.config import Config
from agr_jax.data import Split, to_unit_range
from agr_jax.data.batches import epoch_permutation
from agr_jax.diagnostics import DiagnosticsLog
from agr_jax.errors import CheckpointError, RunFolderError
from agr_jax.evaluation.evaluate import evaluate_run
from agr_jax.files import read_json_lines
from agr_jax.methods import Batch
from agr_jax.models import Classifier
from agr_jax.runs import Run, checkpoints
from agr_jax.runs.folder import read_config
from agr_jax.threat import Linf
from agr_jax.training import Trainer, loop, optimizers, train_run
from agr_jax.training.loop import Progress, _validate
from agr_jax.training.signals import StopOnSignal
from configs.base import recipe

TIMES = {"seconds", "images_per_second", "peak_memory_mb"}
AVERAGED = {"averaging__decay": 0.9}
MEASURED = {**AVERAGED, "diagnostics": True}
# The run of AWP changes its method after the first epoch.
RUNS = {
    "trades": ("trades", AVERAGED),
    "mart": ("mart", AVERAGED),
    "awp": ("awp", AVERAGED),
    "avmixup": ("avmixup", MEASURED),
    "standard": ("standard", MEASURED),
    "awp_on_trades": ("trades", {**MEASURED, "awp__enabled": True, "awp__start_epoch": 1}),
}


def small(method: str, **overrides) -> Config:
    """Digits, 256 images, 4 steps an epoch, PGD-2; `agr__gop` is a field of the group `agr`."""
    values = recipe("digits", method, "paper")
    values.model.name = "tests.tiny_network:create"
    values.epochs = 2
    values.batch_size = 64
    values.data.train_examples = 256
    values.data.validation_examples = 60
    values.data.picture = False
    values.attack.steps = 2
    values.agr.gics_start_epoch = 1
    values.eval.examples = 60
    values.eval.attacks = ("clean",)
    return overridden(values, **overrides)


# One step an epoch.
WHOLE = {"batch_size": 256}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """`finished(method, **overrides)`: folder of a run that nothing disturbed, trained once."""

    @functools.cache
    def run(method, **overrides):
        folder = tmp_path_factory.mktemp("runs") / method
        assert train_run(small(method, **overrides), folder) == 0
        return folder

    return run


def trees_of(folder):
    """The trainer of a run, and the trees of its last checkpoint: its items but `about`."""
    config = read_config(folder)
    run = Run.from_config(config, Path())
    dataset, trainer = run.dataset, Trainer.from_run(run)
    everywhere = sharding.replicated(trainer.mesh)
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        jax.eval_shape(lambda: trainer.init(jax.random.key(0), dataset.image_shape)),
    )
    path = checkpoints.find(folder)
    wanted = {"variables": like.variables, "optimizer": like.opt_state, "average": like.average}
    assert (path / "average").is_dir() == (like.average is not None)
    return trainer, {
        item: checkpoints.restore(path, item, tree)
        for item, tree in wanted.items()
        if tree is not None
    }


def arrays(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def saved(folder):
    """Every array of a run's last checkpoint, by item and name."""
    return arrays(trees_of(folder)[1])


def assert_bit_identical(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def relative_difference(left, right):
    """|left - right| / |right| over all arrays."""
    assert left.keys() == right.keys()
    apart = sum(np.sum(np.square(left[name] - right[name])) for name in right)
    return np.sqrt(apart / sum(np.sum(np.square(values)) for values in right.values()))


def metrics_of(folder):
    """The records of `metrics.jsonl` without what the clock says."""
    return [
        {name: value for name, value in record.items() if name not in TIMES}
        for record in read_json_lines(folder / "metrics.jsonl")
    ]


# ---- stopped and continued


def run_until(step, config, folder, monkeypatch):
    """Runs until a SIGTERM arrives in a step, counted from 1 over the run."""
    signals = []
    advance, enter = Progress.advance, StopOnSignal.__enter__

    def counted(self, *args, **kwargs):
        if self._unit == "step" and self._done + 1 == step:
            signals[-1].signal = 15
        return advance(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(StopOnSignal, "__enter__", lambda self: signals.append(self) or enter(self))
        patched.setattr(Progress, "advance", counted)
        assert train_run(config, folder) == 128 + 15
    assert int(checkpoints.find(folder).name) == step


def assert_same_diagnostics(left, right):
    ours, theirs = (diagnostics.read(folder)._asdict() for folder in (left, right))
    assert_bit_identical(*({k: np.asarray(v) for k, v in d.items()} for d in (ours, theirs)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stop_at"),
    [
        *((name, 2) for name in ("trades", "mart", "awp", "avmixup", "standard")),
        # The one that keeps the most from step to step.
        ("awp_on_trades", 3),
        ("awp_on_trades", 6),
    ],
)
def test_stopped_and_continued_equals_undisturbed(finished, tmp_path, monkeypatch, name, stop_at):
    method, overrides = RUNS[name]
    undisturbed, folder = finished(method, **overrides), tmp_path / "run"
    config = small(method, **overrides)
    run_until(stop_at, config, folder, monkeypatch)
    assert train_run(config, folder) == 0
    assert_bit_identical(saved(undisturbed), saved(folder))
    assert metrics_of(folder) == metrics_of(undisturbed)
    assert (folder / "diagnostics").is_dir() == config.diagnostics
    if config.diagnostics:
        assert len(list((folder / "diagnostics").iterdir())) == 3  # an epoch is in two files
        assert diagnostics.read(folder).steps.tolist() == list(range(1, 9))
        assert_same_diagnostics(folder, undisturbed)


@pytest.mark.slow
def test_weights_are_perturbed_from_the_start_epoch_on(finished):
    """Measured after the first update with perturbed weights: the records of an epoch before."""
    method, overrides = RUNS["awp_on_trades"]
    perturbed = metrics_of(finished(method, **overrides))
    plain = metrics_of(finished(method, **AVERAGED))
    assert perturbed[0] == plain[0]
    assert perturbed[1]["trades_kl"] != plain[1]["trades_kl"]


# ---- the moving average


def test_average_equals_a_recomputation():
    """Five steps; with a decay of 0.3 the first three are in the warm-up."""
    config = small("standard", averaging__decay=0.3)
    run = Run.from_config(config, Path())
    dataset, trainer = run.dataset, Trainer.from_run(run)
    state = trainer.init(jax.random.key(0), dataset.image_shape)
    step = jax.jit(trainer.step, static_argnames=("clean_gradient", "batch_size"))
    expected = {k: v.astype(np.float64) for k, v in arrays(state.variables).items()}
    assert_bit_identical(arrays(state.average), arrays(state.variables))
    data = jax.device_put(
        (dataset.train.images, dataset.train.labels, np.arange(256, dtype=np.int32)),
        sharding.replicated(trainer.mesh),
    )
    for decay in (1 / 10, 2 / 11, 3 / 12, 0.3, 0.3):
        state, _ = step(state, *data, jax.random.key(1), clean_gradient=False, batch_size=64)
        now = arrays(state.variables)
        assert any("batch_stats" in name for name in now)
        expected = {k: decay * old + (1 - decay) * now[k] for k, old in expected.items()}
        average = arrays(state.average)
        assert average.keys() == expected.keys()
        for name in average:
            assert average[name].dtype == now[name].dtype
            scale = np.abs(now[name]).max()
            # Rounding of float32, measured: 1.1e-7.
            assert np.abs(average[name] - expected[name]).max() <= 5e-7 * scale, name
            assert np.abs(average[name] - now[name]).max() > 1e-5 * scale, name


def test_without_a_decay_nothing_is_kept(finished):
    folder = finished("standard", **WHOLE, epochs=1)
    config = read_config(folder)
    run = Run.from_config(config, Path())
    trainer = Trainer.from_run(run)
    assert jax.eval_shape(lambda: trainer.init(jax.random.key(0), (8, 8, 1))).average is None
    assert not (checkpoints.find(folder) / "average").exists()
    run = dataclasses.replace(run, folder=folder)
    records = evaluate_run(run)
    assert [record["checkpoint"] for record in records] == ["last", "best"]
    assert not (folder / "evaluations" / "average-first60.json").exists()
    with pytest.raises(CheckpointError, match=r"no moving average .*--config\.averaging\.decay="):
        evaluate_run(run, which=("average",))


def test_a_branch_from_a_base_without_an_average_starts_at_the_base(finished, tmp_path):
    base = finished("standard", **WHOLE, epochs=1)
    config = small("standard", **WHOLE, **AVERAGED, init_from=str(base))
    assert train_run(config, tmp_path / "run") == 0
    before, after = trees_of(base)[1]["variables"], trees_of(tmp_path / "run")[1]
    before, now, average = map(arrays, (before, after["variables"], after["average"]))
    for name, start in before.items():
        scale = np.abs(now[name]).max()
        expected = (2 * start.astype(np.float64) + 9 * now[name]) / 11  # the step before was 1
        # Rounding of float32, measured: 1e-7.
        assert np.abs(average[name] - expected).max() <= 5e-7 * scale, name
        assert np.abs(average[name] - now[name]).max() > 1e-4 * scale, name


def test_a_branch_from_a_base_with_an_average_continues_it(finished, tmp_path):
    base = finished("standard", **WHOLE, **AVERAGED, epochs=1)
    config = small("standard", **WHOLE, **AVERAGED, init_from=str(base))
    assert train_run(config, tmp_path / "branch") == 0
    assert train_run(small("standard", **WHOLE, **AVERAGED), tmp_path / "whole") == 0
    branch = saved(tmp_path / "branch")
    assert any(name.startswith("['average']") for name in branch)
    assert_bit_identical(branch, saved(tmp_path / "whole"))


@pytest.mark.slow
def test_a_branch_may_drop_the_average(finished, tmp_path):
    base = finished("standard", **WHOLE, **AVERAGED, epochs=1)
    assert train_run(small("standard", **WHOLE, init_from=str(base)), tmp_path / "branch") == 0
    assert train_run(small("standard", **WHOLE), tmp_path / "whole") == 0
    assert_bit_identical(saved(tmp_path / "branch"), saved(tmp_path / "whole"))


def test_the_held_out_split_scores_the_average():
    """Two networks of random weights, on labels that are what the averaged one says."""
    config = small("standard", **AVERAGED)
    run = Run.from_config(config, Path())
    dataset, trainer = run.dataset, Trainer.from_run(run)
    one, other = (trainer.init(jax.random.key(i), dataset.image_shape).variables for i in (0, 1))
    images = to_unit_range(jnp.asarray(dataset.validation.images))
    said = Classifier(models.from_config(config, 10), other)(images).argmax(-1)
    validation = Split(dataset.validation.images, np.asarray(said, np.int32))
    run = dataclasses.replace(run, dataset=dataclasses.replace(dataset, validation=validation))
    accuracy = {}
    for average in (None, other):
        state = SimpleNamespace(variables=one, average=average)
        scores = _validate(run, state, config.epochs - 1)
        accuracy[average is None] = scores["validation_clean_accuracy"]
    # Compiled for another batch: an image at the decision boundary may tip.
    assert accuracy[False] >= 1 - 1 / len(said)
    assert accuracy[True] < 0.7


def test_the_best_row_is_an_average_where_one_is_kept(finished):
    folder = finished("standard", **WHOLE, **AVERAGED, epochs=1)
    rows = {
        row: json.loads((folder / f"evaluations/{row}-first60.json").read_text())
        for row in ("last", "best", "average")
    }
    digests = [rows[row]["digests"]["network"] for row in ("last", "best", "average")]
    assert digests[0] != digests[1] == digests[2]
    assert [rows[row]["weights"] for row in ("last", "best")] == ["as trained", "moving average"]


@pytest.mark.slow
def test_the_average_has_a_row_of_its_own(finished, capsys):
    folder = finished("trades", **AVERAGED)
    capsys.readouterr()
    # A finished run is only evaluated again, here on all test images.
    assert train_run(small("trades", **AVERAGED, eval__examples=0), folder) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert [row[0] for row in cells[2:]] == ["last", "best", "average"]
    config = read_config(folder)
    test = data.from_config(config).test
    images = to_unit_range(jnp.asarray(test.images))
    trees = trees_of(folder)[1]
    correct = {}
    for row, item in (("last", "variables"), ("best", None), ("average", "average")):
        record = json.loads((folder / "evaluations" / f"{row}.json").read_text())
        assert record["checkpoint"] == row
        correct[row] = record["attacks"]["clean"]["correct"]
        if item is not None:
            classifier = Classifier(models.from_config(config, 10), trees[item])
            answers = np.asarray(jax.jit(classifier)(images)).argmax(-1)
            # Compiled for another batch: an image at the decision boundary may tip.
            assert abs((answers == test.labels).sum() - correct[row]) <= 1
    assert abs(correct["last"] - correct["average"]) >= 3, "the two networks answer the same"


@pytest.mark.slow
def test_averaged_statistics_fit_the_averaged_network(tmp_path):
    """Nearer to those that the averaged network has on the training set than the latest ones are.

    At the large learning rate, after 200 steps: the average is then behind by some 20 steps. (Of
    BatchNorm's own memory, 5 steps, the averaged statistics are behind it.)
    """
    overrides = {"epochs": 10, "data__train_examples": 0, "eval__every_epochs": 10}
    overrides |= {"model__name": "wrn10_1"}  # of several layers, whose statistics move together
    config = small("at", **overrides, averaging__decay=0.99, checkpoints__every_epochs=10)
    assert train_run(config, tmp_path / "run") == 0
    dataset = data.from_config(config)
    trainer, trees = trees_of(tmp_path / "run")
    averaged, current = trees["average"], trees["variables"]["batch_stats"]
    images, labels = jax.device_put(
        (dataset.train.images, dataset.train.labels), sharding.replicated(trainer.mesh)
    )

    @jax.jit
    def batch_statistics(rows, key):
        """Sum over a clean and an adversarial pass, from running statistics of 0."""
        augment_key, attack_key = jax.random.split(key)
        clean = to_unit_range(trainer.augmentation(augment_key, images[rows]))
        adversarial = trainer.method.adversarial_images(
            Classifier(trainer.model, averaged), clean, labels[rows], attack_key
        )
        nothing = jax.tree.map(jnp.zeros_like, averaged["batch_stats"])
        passes = [trainer.forward(averaged["params"], nothing, x)[1] for x in (clean, adversarial)]
        return jax.tree.map(jnp.add, *passes)

    order = epoch_permutation(jax.random.key(1), 0, len(labels))
    batches = [order[i * 64 : (i + 1) * 64] for i in range(trainer.steps_per_epoch)]
    sums = [batch_statistics(rows, jax.random.key(i)) for i, rows in enumerate(batches)]
    # A pass adds a tenth of the batch's statistics to the running ones.
    exact = jax.tree.map(lambda *s: np.sum(s, 0) / (0.1 * 2 * len(batches)), *sums)
    right = arrays(exact)
    for kind in ("['mean']", "['var']"):
        ours, copied = (
            relative_difference(
                {name: values for name, values in arrays(tree).items() if name.endswith(kind)},
                {name: values for name, values in right.items() if name.endswith(kind)},
            )
            for tree in (averaged["batch_stats"], current)
        )
        print(f"{kind}: averaged {ours:.4f}, latest {copied:.4f} from the exact ones")
        assert ours < copied / 1.5, kind


# ---- label smoothing, the global clip, the order of BatchNorm updates


def cross_entropies(logits, labels, smoothing):
    """`(1 - s) CE + s mean(-log p)`, averaged over the batch."""
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = log_p[np.arange(len(labels)), np.asarray(labels)]
    return np.mean(-(1 - smoothing) * picked - smoothing * log_p.mean(-1))


def test_label_smoothing_is_the_closed_form_in_both_losses():
    smoothing = 0.2
    config = small("at", label_smoothing=smoothing)
    run = Run.from_config(config, Path())
    dataset, trainer = run.dataset, Trainer.from_run(run)
    state = trainer.init(jax.random.key(0), dataset.image_shape)
    rng = np.random.default_rng(0)
    images = to_unit_range(dataset.train.images[:64])
    moved = np.clip(images + rng.choice([-0.15, 0.15], size=images.shape), 0, 1)
    batch = Batch(images, jnp.asarray(moved, jnp.float32), jnp.asarray(dataset.train.labels[:64]))
    # An untrained network is undecided: its smoothed and its plain loss are almost the same.
    params = {**state.params, "fc": jax.tree.map(lambda p: 5 * p, state.params["fc"])}

    @jax.jit
    def losses_and_logits(params, batch):
        varied = state.replace(params=params)
        _, _, _, metrics = trainer.gradients(varied, batch, clean_gradient=False)
        passes = (batch.images, batch.adversarial)
        return metrics, [trainer.forward(params, state.batch_stats, x)[0] for x in passes]

    metrics, logits = losses_and_logits(params, batch)
    for kind, z in zip(("clean", "adversarial"), logits, strict=True):
        expected = cross_entropies(z, batch.labels, smoothing)
        assert abs(expected - cross_entropies(z, batch.labels, 0)) > 0.005 * expected
        # Rounding of float32, measured: 1.4e-7.
        assert float(metrics[f"{kind}_loss"]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_label_smoothing_changes_a_run(finished):
    plain, smoothed = (saved(finished("at", **o)) for o in ({}, {"label_smoothing": 0.2}))
    name = "['variables']['params']['fc']['kernel']"
    assert np.abs(plain[name] - smoothed[name]).max() > 1e-3 * np.abs(plain[name]).max()


def test_global_clip_comes_after_agr_and_before_weight_decay_and_momentum():
    limit, rate, decay, momentum, tau = 0.5, 0.1, 5e-4, 0.9, 0.7
    config = small(
        "at",
        optimizer__clip_global_norm=limit,
        agr__gop=False,
        agr__interpolation="fixed",
        agr__tau=tau,
        agr__interpolate_negative=True,
        agr__gics_start_epoch=0,
        agr__clip="none",
    )
    rng = np.random.default_rng(0)
    draw = lambda scale: {n: scale * rng.normal(size=s) for n, s in (("a", (5, 3)), ("b", 4))}  # noqa: E731
    params, large, other, tiny = draw(10), draw(30), draw(20), draw(1e-3)
    optimizer = optimizers.from_config(config, steps_per_epoch=4)
    float32 = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    state = optimizer.init(float32(params))
    buffer = dict.fromkeys(params, 0.0)
    for g_a, g_c, too_long in ((large, other, True), (tiny, tiny, False)):
        updates, state = optimizer.update(
            float32(g_a), state, float32(params), clean_grads=float32(g_c)
        )
        mixed = {n: tau * g_a[n] + (1 - tau) * g_c[n] for n in params}
        norm = np.sqrt(sum(np.sum(m**2) for m in mixed.values()))
        assert (norm > limit) == too_long
        factor = min(1, limit / norm)
        before = dict(buffer)
        buffer = {n: momentum * buffer[n] + factor * mixed[n] + decay * params[n] for n in params}
        for n in params:
            expected = -rate * buffer[n]
            # Rounding of float32, measured: 1e-7 of the largest entry.
            tolerance = 1e-6 * np.abs(expected).max()
            np.testing.assert_allclose(updates[n], expected, rtol=0, atol=tolerance)
        rest = {n: momentum * before[n] + decay * p for n, p in params.items()}
        squares = sum(np.sum(np.square(-updates[n] / rate - rest[n])) for n in params)
        assert np.sqrt(squares) <= limit * (1 + 1e-5)


@pytest.mark.slow
def test_published_statistics_are_the_same_in_at_and_not_in_mart(finished):
    published = {"batch_stats": "published"}
    at = [saved(finished("at", **o)) for o in ({}, published)]
    assert_bit_identical(*at)
    mart = [saved(finished("mart", **AVERAGED, **o)) for o in ({}, published)]
    assert mart[0].keys() == mart[1].keys()
    for name in mart[0]:
        if "batch_stats" in name:
            assert (mart[0][name] != mart[1][name]).any(), name


# ---- ablations


def as_documented(agr, g_a, g_c, epoch):
    """What an update makes of a tree, in float64, from the tables of `agr_transform`."""
    if agr.granularity == "global":
        flat = {"all": np.concatenate([g_a[n].ravel() for n in g_a])}
        clean = {"all": np.concatenate([g_c[n].ravel() for n in g_a])}
        agr = SimpleNamespace(**{**vars(agr), "granularity": "leaf"})
        result = as_documented(agr, flat, clean, epoch)["all"]
        ends = np.cumsum([g.size for g in g_a.values()])[:-1]
        parts = np.split(result, ends)
        return {n: part.reshape(g_a[n].shape) for n, part in zip(g_a, parts, strict=True)}
    if not agr.enabled:
        return g_a
    starts = []
    if agr.gop:
        starts.append(agr.gop_start_epoch)
    if agr.interpolation != "none":
        starts.append(agr.gics_start_epoch)
    first_clipped = agr.clip_start_epoch if agr.clip_start_epoch >= 0 else min(starts)
    gop = agr.gop and epoch >= agr.gop_start_epoch
    mix = agr.interpolation != "none" and epoch >= agr.gics_start_epoch
    result = {}
    for name, a in g_a.items():
        c = g_c[name]
        product, lengths = np.sum(a * c), np.linalg.norm(a) * np.linalg.norm(c)
        cosine = product / lengths if lengths else 0.0
        weight = {"cosine": cosine, "mean": 0.5, "fixed": 1 - agr.tau, "none": None}
        projected = gop and cosine < 0
        interpolated = mix and not projected and (cosine >= 0 or agr.interpolate_negative)
        out = a
        if projected:
            out = a - product / np.sum(c * c) * c
        elif interpolated:
            out = weight[agr.interpolation] * c + (1 - weight[agr.interpolation]) * a
        clipped = {
            "changed": projected or interpolated,
            "interpolated": interpolated,
            "all": True,
            "none": False,
        }[agr.clip]
        if clipped and epoch >= first_clipped:
            out = out * min(1, agr.clip_norm / np.linalg.norm(out))
        result[name] = out
    return result


ABLATIONS = {
    "paper": {},
    "no_gop": {"gop": False},
    "no_interpolation": {"interpolation": "none"},
    "mean": {"interpolation": "mean"},
    "tau": {"interpolation": "fixed", "tau": 0.3},
    "no_clip": {"clip": "none"},
    "clip_all": {"clip": "all"},
    "clip_changed": {"clip": "changed"},
    "clip_late": {"clip_start_epoch": 3},
    "at_and_clip": {"gop": False, "interpolation": "none", "clip": "all", "clip_start_epoch": 2},
    "global": {"granularity": "global"},
    "mean_of_negative": {"gop": False, "interpolation": "mean", "interpolate_negative": True},
    "baseline": {"enabled": False},
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_do_what_their_fields_say(name):
    starts = {"agr__gop_start_epoch": 1, "agr__gics_start_epoch": 2}
    overrides = {f"agr__{field}": value for field, value in ABLATIONS[name].items()}
    paper, config = small("at", **starts).agr, small("at", **starts, **overrides).agr
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape)  # noqa: E731
    kernel, bias, scale = draw(3, 4), draw(4), draw(5)
    g_a = {"agree": kernel, "conflict": bias, "short": 0.01 * scale, "no_clean": draw(2)}
    g_c = {
        "agree": kernel + 0.7 * draw(3, 4),
        "conflict": -bias + 0.7 * draw(4),
        "short": 0.01 * (scale + draw(5)),
        "no_clean": np.zeros(2),
    }
    transform = optimizers.agr_from_config(config, steps_per_epoch=3)
    float32 = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    changed = False
    for epoch in range(4):
        expected = as_documented(config, g_a, g_c, epoch)
        reference = as_documented(paper, g_a, g_c, epoch)
        changed |= any((expected[n] != reference[n]).any() for n in g_a)
        uses_clean = optimizers.uses_clean_gradient(config, epoch)
        depends = as_documented(config, g_a, {n: -g for n, g in g_c.items()}, epoch)
        assert uses_clean == any((expected[n] != depends[n]).any() for n in g_a)
        for step in (3 * epoch, 3 * epoch + 2):  # the first and the last of the epoch
            for clean in [g_c] if uses_clean else [g_c, None]:
                state = transform.init(g_a)._replace(step=jnp.asarray(step, jnp.int32))
                clean_grads = None if clean is None else float32(clean)
                updates, _ = transform.update(float32(g_a), state, clean_grads=clean_grads)
                for n, g in g_a.items():
                    # Rounding of float32, measured: 1.8e-7 of the largest entry.
                    tolerance = 1e-6 * np.abs(g).max()
                    np.testing.assert_allclose(updates[n], expected[n], rtol=0, atol=tolerance)
    assert changed == (name != "paper")


# So strong an attack that some gradients conflict from the first steps on. L2 has no sign, which
# would make large differences of rounding ones (5e-4 in the momentum, on another processor).
STRONG = {"attack__norm": "l2", "attack__epsilon": 2.4, "attack__step_size": 1.2}


@pytest.mark.slow
def test_at_with_a_clip_takes_no_clean_gradient(finished):
    fields = {**ABLATIONS["at_and_clip"], "clip_start_epoch": 1, "clip_norm": 0.02}
    overrides = {f"agr__{field}": value for field, value in fields.items()}
    clipped = metrics_of(finished("at", **STRONG, **overrides))
    baseline = metrics_of(finished("at", **STRONG, agr__enabled=False))
    assert clipped[0].keys() == baseline[0].keys()
    assert not {"cosine", "projected", "clean_norm"} & clipped[1].keys()
    loss = "adversarial_loss"
    # Two programs, whose rounding may differ; measured: 0 and 3e-4.
    assert clipped[0][loss] == pytest.approx(baseline[0][loss], rel=1e-6)
    assert clipped[1][loss] != pytest.approx(baseline[1][loss], rel=1e-4)


# ---- diagnostics


@pytest.mark.parametrize("agr", [True, False], ids=["agr", "baseline"])
def test_diagnostics_have_a_row_for_every_step(finished, agr):
    folder = finished("at", **STRONG, diagnostics=True, agr__enabled=agr)
    measured = diagnostics.read(folder)
    _, trees = trees_of(folder)
    assert measured.names == leaf_names(trees["variables"]["params"])
    assert measured.steps.tolist() == list(range(1, 9))
    assert len(list((folder / "diagnostics").iterdir())) == 2  # one for each epoch
    for values in (measured.cosine, measured.clean_norm, measured.adversarial_norm):
        assert values.shape == (8, len(measured.names))
        assert values.dtype == np.float32
        assert np.isfinite(values).all()
        assert len(np.unique(values)) > 0.9 * values.size  # no row and no leaf twice
    assert (np.abs(measured.cosine) <= 1).all()
    assert (measured.clean_norm > 0).all()
    conflicting = measured.cosine < 0
    assert conflicting.any()
    # With AGR GOP acts from epoch 0 on; in the baseline nothing does.
    np.testing.assert_array_equal(measured.projected, conflicting & agr)
    (cosine,) = [v for key, v in arrays(trees["optimizer"]).items() if key.endswith("cosine")]
    np.testing.assert_array_equal(measured.cosine[-1], cosine)
    for epoch, record in enumerate(read_json_lines(folder / "metrics.jsonl")):
        rows = slice(4 * epoch, 4 * epoch + 4)
        for field in ("cosine", "projected", "clean_norm", "adversarial_norm"):
            mean = getattr(measured, field)[rows].mean(dtype=np.float64)
            # The means over the leaves are taken in float32.
            assert record[field] == pytest.approx(mean, rel=1e-6, abs=1e-6), field
        assert record["conflicting"] == pytest.approx(conflicting[rows].mean(), abs=1e-6)


@pytest.mark.slow
def test_diagnostics_do_not_change_the_baseline(finished):
    """Up to the rounding of another program; AGR changes it by much more.

    Over one epoch of four steps: in the second one, without diagnostics too, weights that begin one
    unit in the last place apart come 6e-3 apart.
    """
    on = {**STRONG, "epochs": 1, "agr__gop_start_epoch": 0, "agr__gics_start_epoch": 0}
    off = {**on, "agr__enabled": False}
    runs = [finished("at", **o) for o in ({**off, "diagnostics": True}, off, on)]
    assert "cosine" in metrics_of(runs[0])[0]
    assert "cosine" not in metrics_of(runs[1])[0]

    def trained(folder):
        _, trees = trees_of(folder)
        return {**trees["variables"], "momentum": optax.tree.get(trees["optimizer"], "trace")}

    measured, without, agr = map(trained, runs)
    for name in ("params", "batch_stats", "momentum"):
        one, other, changed = (arrays(tree[name]) for tree in (measured, without, agr))
        rounding, change = relative_difference(one, other), relative_difference(changed, other)
        print(f"{name}: {rounding:.1e} from the run without diagnostics, {change:.1e} with AGR")
        # Measured: 2e-8, 5e-8 and 5e-7; with AGR 0.02, 0.02 and 0.8.
        assert rounding <= 1e-5
        assert change >= 1e-3


@pytest.mark.slow
def test_diagnostics_of_steps_whose_checkpoint_failed_are_repeated(finished, tmp_path, monkeypatch):
    method, overrides = RUNS["standard"]
    config, folder = small(method, **overrides), tmp_path / "run"
    assert train_run(small(method, **overrides, epochs=1), folder) == 0

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.ocp.CheckpointManager, "save", no_space)
        with pytest.raises(CheckpointError, match="No space left"):
            train_run(config, folder)
    assert diagnostics.read(folder).steps.tolist() == list(range(1, 9))
    run_until(6, config, folder, monkeypatch)
    assert diagnostics.read(folder).steps.tolist() == list(range(1, 7))
    assert train_run(config, folder) == 0
    assert_same_diagnostics(folder, finished(method, **overrides))


def row(step):
    leaves = np.arange(2, dtype=np.float32) + step
    fields = diagnostics.LeafDiagnostics._fields[2:]
    return {f"leaf_{name}": 100 * i + leaves for i, name in enumerate(fields)}


def write_diagnostics(run, *files):
    log = DiagnosticsLog(run / "diagnostics", ["a", "b"])
    for steps in files:
        for step in steps:
            log.add(step, row(step))
        log.write()
    return log


@pytest.mark.parametrize("last", [0, 3, 4, 6, 8, 100])
def test_later_steps_are_forgotten_within_a_file_too(tmp_path, last):
    log = write_diagnostics(tmp_path, range(1, 5), range(5, 9))
    log.write()  # nothing was added since
    log.forget_after(last)
    if last == 0:
        assert list((tmp_path / "diagnostics").iterdir()) == []
        return
    measured = diagnostics.read(tmp_path)
    steps = list(range(1, min(last, 8) + 1))
    assert measured.names == ("a", "b")
    assert measured.steps.tolist() == steps
    for field in measured._fields[2:]:
        expected = np.stack([row(step)[f"leaf_{field}"] for step in steps])
        np.testing.assert_array_equal(getattr(measured, field), expected)
    write_diagnostics(tmp_path, range(steps[-1] + 1, 10))
    assert diagnostics.read(tmp_path).steps.tolist() == list(range(1, 10))


def test_forgetting_steps_loses_none_on_a_full_disk(tmp_path, monkeypatch):
    log = write_diagnostics(tmp_path, range(1, 5))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(diagnostics, "write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        log.forget_after(2)
    assert diagnostics.read(tmp_path).steps.tolist() == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_damaged_diagnostics_file_is_named(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished("standard", **MEASURED), folder)
    path = folder / "diagnostics" / "steps-000000005-000000008.npz"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no archive"):
        path.write_bytes(content)
        with pytest.raises(RunFolderError, match=rf"{path} cannot be read: "):
            diagnostics.read(folder)
    np.savez(path, names=np.array(["a"]))
    with pytest.raises(RunFolderError, match=rf"{path} cannot be read: .*steps"):
        diagnostics.read(folder)
    with pytest.raises(RunFolderError, match=rf"{path} cannot be read: "):
        train_run(small("standard", **MEASURED, epochs=3), folder)


def test_a_run_without_diagnostics_says_how_to_write_them(finished):
    with pytest.raises(RunFolderError, match=r"no diagnostics \(--config\.diagnostics=True"):
        diagnostics.read(finished("standard", **WHOLE, epochs=1))


# ---- validation


@pytest.mark.parametrize("method", ["at", "trades", "mart", "awp", "avmixup", "standard"])
def test_the_held_out_split_meets_the_same_attack_whatever_the_method(monkeypatch, method):
    """PGD on the cross-entropy from a random start; TRADES and MART train against another."""
    config = small(method)
    run = Run.from_config(config, Path())
    seen = []

    def record(classifier, attack, split, **options):
        seen.append(attack)
        assert split is run.dataset.validation
        return np.ones(60, bool)

    monkeypatch.setattr(loop, "correct_under_attack", record)
    nothing = SimpleNamespace(average=None, variables={})
    scores = _validate(run, nothing, epoch=1)
    expected = PGD(Linf(0.15), steps=2, step_size=0.0375, random_start=True)
    assert dict(zip(scores, seen, strict=True)) == {
        "validation_clean_accuracy": None,
        checkpoints.SELECTION_METRIC: expected,
    }
    same = methods.training_attack(config.attack) == expected
    assert same == (method not in ("trades", "mart"))


@pytest.mark.parametrize("method", ["at", "standard", "own"])
def test_the_best_checkpoint_is_chosen_by_what_the_method_is_for(monkeypatch, tmp_path, method):
    """A network that never saw an attack is near chance under one in every epoch."""
    clean, robust = (0.5, 0.9, 0.7), (0.3, 0.1, 0.2)
    scores = iter(zip(clean, robust, strict=True))

    def validate(*arguments):
        found = next(scores)
        return dict(
            zip(("validation_clean_accuracy", checkpoints.SELECTION_METRIC), found, strict=True)
        )

    monkeypatch.setattr(loop, "_validate", validate)
    config = small("standard" if method == "own" else method, epochs=3)
    if method == "own":  # it is asked, whatever it is called
        monkeypatch.setattr(
            methods.AdversarialTraining, "is_adversarial", property(lambda self: False)
        )
        config = small("at", epochs=3)
    assert train_run(config, tmp_path / "run") == 0
    best = checkpoints.find(tmp_path / "run", "best")
    per_epoch = int(checkpoints.find(tmp_path / "run").name) // 3
    assert int(best.name) == per_epoch * (1 if method == "at" else 2)
    record = json.loads((tmp_path / "run/evaluations/best-first60.json").read_text())
    assert record["epoch"] == (1 if method == "at" else 2)


def test_a_clean_score_counts_more_than_one_under_attack(tmp_path):
    """A run without an attack goes on whose first checkpoints an earlier version scored."""
    tree = {"w": np.zeros(2)}
    for metric, score, step in (
        (checkpoints.SELECTION_METRIC, 0.8, 1),
        (checkpoints.CLEAN_SELECTION_METRIC, 0.6, 2),
        (checkpoints.CLEAN_SELECTION_METRIC, 0.5, 3),
    ):
        with checkpoints.Checkpoints(
            tmp_path / "checkpoints", select_best=True, metric=metric
        ) as own:
            own.save(step, variables=tree, optimizer=tree, about={}, selection_metric=score)
    assert checkpoints.find(tmp_path, "best").name == "2"


def test_a_perturbed_method_is_adversarial_if_the_method_is():
    for method, expected in (("at", True), ("standard", False)):
        inner = methods.from_config(small(method))
        assert inner.is_adversarial is expected
        perturbed = methods.AdversarialWeightPerturbation(inner)
        assert perturbed.is_adversarial is expected
