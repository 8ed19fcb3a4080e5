"""The networks that come with the package classify as their records say."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from official_archives import SHARED, needs_shared, real_records

from agr_jax import models
from agr_jax.evaluation.packed_bits import decode_mask
from agr_jax.journal import digest
from agr_jax.models.pretrained import read_pretrained, save_pretrained

NAMES = ["cifar10-width16-agr", "cifar10-width16-at", "cifar10-width16-best"]


def test_names():
    assert models.pretrained_names() == NAMES
    with pytest.raises(ValueError, match="unknown network 'x': there are cifar10-width16-agr"):
        models.load_pretrained("x")


@pytest.mark.parametrize("name", NAMES)
def test_they_are_the_networks_that_were_evaluated(name):
    _, record = read_pretrained(name)
    classifier = models.load_pretrained(name)
    whole, fast = record["evaluations"]
    assert [list(each["attacks"]) for each in (whole, fast)] == [["clean", "pgd20"], ["fast"]]
    run = Path(__file__).parents[1] / record["run"]
    for evaluation in (whole, fast):
        assert digest(classifier) == evaluation["digests"]["network"]
        assert evaluation["environment"]["commit"]
        assert evaluation in [
            json.loads(path.read_text()) for path in (run / "evaluations").glob("*.json")
        ]


@needs_shared
@pytest.mark.parametrize(
    "name",
    [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])],
)
def test_they_classify_as_their_records_say(name):
    _, record = read_pretrained(name)
    records = real_records(SHARED / "cifar-10" / "test_batch.npz", 1000)
    table = np.frombuffer(records, np.uint8).reshape(1000, 3073)
    images = table[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) / np.float32(255)
    classifier = models.load_pretrained(name)
    predictions = np.asarray(jax.jit(lambda c, x: c(x).argmax(1))(classifier, images))
    mask = record["evaluations"][0]["attacks"]["clean"]["correct_images"]
    correct = decode_mask(mask, 10_000)[:1000]
    assert ((predictions == table[:, 0]) != correct).sum() <= 1  # a tie may round over


def test_what_is_saved_comes_back(tmp_path, monkeypatch):
    model = models.create("wrn10_1", 3, width=4)
    variables = model.init(jax.random.key(0), np.zeros([1, 8, 8, 1], np.float32))
    record = {"model": {"name": "wrn10_1"}, "image_shape": [8, 8, 1]}
    save_pretrained(tmp_path, "own", model, variables, record)
    monkeypatch.setattr("agr_jax.models.pretrained._FOLDER", str(tmp_path))
    found, about = read_pretrained("own")
    assert about == record
    jax.tree.map(np.testing.assert_array_equal, found, dict(variables))
    other = models.create("wrn10_1", 3, width=8)
    with pytest.raises(ValueError, match="not those of the model"):
        save_pretrained(tmp_path, "own", other, variables, record)
