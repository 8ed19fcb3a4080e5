"""The networks that come with the package classify as their records say."""

import jax
import numpy as np
import pytest
from official_archives import SHARED, needs_shared, real_records

from agr_jax import models
from agr_jax.models.pretrained import read_pretrained, save_pretrained


def test_names_and_sizes():
    assert models.pretrained_names() == ["cifar10-width16-agr", "cifar10-width16-at"]
    with pytest.raises(ValueError, match="unknown network 'x': there are cifar10-width16-agr"):
        models.load_pretrained("x")


@needs_shared
@pytest.mark.parametrize("name", ["cifar10-width16-at", "cifar10-width16-agr"])
def test_they_are_as_accurate_as_their_records_say(name):
    _, record = read_pretrained(name)
    records = real_records(SHARED / "cifar-10" / "test_batch.npz", 1000)
    table = np.frombuffer(records, np.uint8).reshape(1000, 3073)
    images = table[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) / np.float32(255)
    classifier = models.load_pretrained(name)
    predictions = np.asarray(jax.jit(lambda c, x: c(x).argmax(1))(classifier, images))
    correct = int((predictions == table[:, 0]).sum())
    evaluation = record["evaluation"]
    assert evaluation["examples"] == 1000
    assert abs(correct - evaluation["attacks"]["clean"]["correct"]) <= 1  # a tie may round over
    assert set(evaluation["attacks"]) >= {"pgd20", "autoattack"}
    assert evaluation["environment"]["commit"]


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
