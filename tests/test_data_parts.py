"""Parts of a test split that stand for the whole of it."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from test_train import small

from agr_jax import data, measure, sharding
from agr_jax.data.dataset import Split, part_of, representative_order
from agr_jax.data.digits import read_digits
from agr_jax.errors import DataError
from agr_jax.evaluation import evaluate_run, record_files
from agr_jax.evaluation.table import render_table
from agr_jax.runs import Run
from agr_jax.training import train_run


def split_of(labels):
    """A split whose images show their row."""
    labels = np.asarray(labels, np.int32)
    images = np.broadcast_to(
        np.arange(len(labels), dtype=np.uint8)[:, None, None, None], (len(labels), 2, 2, 1)
    )
    return Split(np.ascontiguousarray(images), labels)


def by_class(split):
    """The same examples as an image folder has them."""
    return split.take(np.argsort(split.labels, kind="stable"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one epoch."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert train_run(small(epochs=1), folder) == 0
    return folder


MIXED = split_of(np.random.default_rng(3).integers(0, 3, 60))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.repeat([0, 1, 2], 20), True),
        (np.repeat([2, 0, 1], 20), True),  # an order of the classes of its own
        (np.tile(np.repeat([0, 1, 2], 10), 2), True),  # two folders, one behind the other
        (np.repeat([0, 1], [57, 3]), True),
        (np.arange(10), True),  # one image of each class
        (MIXED.labels, False),
        (np.tile([0, 1, 2], 20), False),
        ([1, 0], False),
        ([0], True),
    ],
)
def test_an_order_by_class_is_seen(labels, expected):
    assert split_of(labels).ordered_by_class is expected


def test_the_sets_of_the_paper_and_digits_keep_their_first_images():
    test = read_digits().test
    assert not test.ordered_by_class
    assert part_of(test, 60).suffix == "-first60"
    assert str(part_of(test, 60)) == "first 60 of 355"
    np.testing.assert_array_equal(part_of(test, 60).rows, np.arange(60))


def test_a_part_of_an_ordered_set_stands_for_it():
    split = by_class(MIXED)
    part = part_of(split, 30)
    assert (str(part), part.suffix) == ("30 drawn with seed 0 of 60", "-drawn30")
    assert len(set(part.rows)) == 30
    assert (np.diff(part.rows) > 0).all()
    counts = np.bincount(split.labels[part.rows], minlength=3)
    assert (counts >= 6).all()
    # The same for everybody, and within every larger part.
    for more in (31, 45, 60):
        assert set(part.rows) <= set(part_of(split, more).rows)
    np.testing.assert_array_equal(part.rows, np.sort(representative_order(split)[:30]))
    whole = part_of(split, 60)
    assert (str(whole), whole.suffix) == ("all 60", "")
    np.testing.assert_array_equal(whole.rows, np.arange(60))


@pytest.mark.parametrize("examples", [0, 61])
def test_a_part_that_cannot_be_is_refused(examples):
    with pytest.raises(DataError, match="at least 1 and at most 60"):
        part_of(MIXED, examples)


def test_an_evaluation_and_a_measurement_of_an_ordered_set(finished, tmp_path):
    """As of an image folder: drawn images, whatever the run's seed is, and files that say so."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    config = small(measure__images=40, measure__points=3, measure__directions=1)
    dataset = data.from_config(config)
    dataset = dataclasses.replace(dataset, test=by_class(dataset.test))
    run = Run(config, folder, dataset, sharding.data_mesh())
    part, images = run.test_part, run.test_split()
    np.testing.assert_array_equal(images.labels, dataset.test.labels[part.rows])
    assert len(set(images.labels)) == 10
    other_seed = dataclasses.replace(config, seed=5)
    other = dataclasses.replace(run, config=other_seed)
    np.testing.assert_array_equal(other.test_part.rows, part.rows)

    (record,) = evaluate_run(run, which=("last",))
    path = folder / "evaluations/last-drawn60.json"
    assert json.loads(path.read_text()) == record
    assert record["selection"] == "60 drawn with seed 0 of 355"
    assert record_files.selection(record, path) == record["selection"]
    assert "of 60 test images (60 drawn with seed 0 of 355)" in render_table([record])
    found = measure.measure_run(run, "landscape")
    assert found["selection"] == "40 drawn with seed 0 of 355"
    found = measure.measure_run(run, "boundary")
    assert "drawn with seed 0" in found["selection"]


def test_a_measurement_of_other_settings_stays_in_the_file(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    config = small(measure__images=20, measure__points=3)
    first = measure.measure_run(Run.from_config(config, folder), "landscape")
    assert first["selection"] == "first 20 of 355"
    assert "earlier" not in measure.measure_run(Run.from_config(config, folder), "landscape")
    wider = small(measure__images=20, measure__points=5)
    second = measure.measure_run(Run.from_config(wider, folder), "landscape")
    assert second["earlier"] == [first]
    path = folder / "measurements/landscape.json"
    path.write_text("{")
    measure.measure_run(Run.from_config(wider, folder), "landscape")
    assert path.with_name("landscape.json.damaged").read_text() == "{"
