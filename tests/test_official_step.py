"""Whole training steps in float32 against the official code, within measured float32 noise.

The exact comparison is `float64/test_official_step.py`. Here a ReLU input near zero may fall on
either side of it, so that the gradients of two correct programs differ (golden/README.md). Measured
for this one: norms 1.1e-3, elements 1.9e-2 of the leaf's rms, sums (in which the differences of a
whole leaf add up) 2.8e-2 of its norm, cosines 6.5e-4; the same with either convolution. The forward
pass knows no such jumps: losses 3e-7, logits 1.4e-6 of the largest, statistics 3e-7.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from official_trainer import (
    IMAGENET,
    OFFICIAL_PGD,
    compiled_step,
    images_of,
    initial_state,
    make_trainer,
    nhwc,
    step_errors,
)
from official_weights import draw, to_variables

from agr_jax import losses
from agr_jax.methods import Batch
from agr_jax.models import Classifier, PreActResNet

LIMITS = {
    "norm": 2e-3,
    "sum": 6e-2,
    "first32": 3e-2,
    "spread32": 3e-2,
    "cs": 1e-3,
    "mean_cos": 1e-3,
    "mean_l2dis": 1e-3,
    "mean_norm_adv": 1e-3,
    "mean_norm_clean": 1e-3,
    "loss_clean": 1e-5,
    "loss_adv": 1e-5,
    "logits": 1e-5,
    "bn_mean": 1e-6,
    "bn_var": 1e-6,
    "gop_count": 0,
    "gop_rate": 1e-7,
}


@pytest.fixture(scope="module")
def common(golden):
    return golden("official_step_prn18_k10_common.npz")


@pytest.mark.parametrize(("key", "agr"), [("agr64_", True), ("base64_", False)])
def test_step(golden, common, key, agr):
    trainer = make_trainer(agr=agr, conv="canonical", dtype=jnp.float32)
    state = initial_state(trainer, int(common["weight_seed"]), float(common["lin_gain"]))
    images, labels = images_of(common, "", np.float32)
    batch = Batch(images, nhwc(common["x_adv"], np.float32), labels)
    with jax.default_matmul_precision("float32"):
        result = compiled_step(trainer, agr=agr)(state, batch)
    names = bytes(common["leaf_names_utf8"]).decode().split()
    z = golden("official_step_prn18_k10_AT.npz")
    errors = step_errors(result, z, key, names, agr=agr)
    limits = {name: LIMITS.get(name, LIMITS.get(name.rsplit("_", 1)[-1])) for name in errors}
    assert not {name: error for name, error in errors.items() if not error <= limits[name]}


def test_pgd_reaches_the_official_loss(common):
    weights = draw(int(common["weight_seed"]), float(common["lin_gain"]))
    variables = jax.tree.map(jnp.asarray, to_variables(weights, np.float32))
    network = Classifier(PreActResNet(10, conv="canonical", **IMAGENET), variables)
    images, labels = images_of(common, "", np.float32)
    start = jnp.clip(images + nhwc(common["start_noise"], np.float32), 0, 1)
    with jax.default_matmul_precision("float32"):
        adversarial = OFFICIAL_PGD.from_start(network, images, labels, start)
        logits = jax.jit(network.__call__)
        cross_entropy = losses.cross_entropy(logits(adversarial), labels)
        found = {
            key: logits(points)
            for key, points in (("clean", images), ("adv", nhwc(common["x_adv"], np.float32)))
        }
    # Float32 PGD is chaotic on this network: 8 to 19 % of the pixels differ between two correct
    # programs, but the mean loss reached does not.
    expected = common["pgd64_ce_per_example"]
    print(
        "ce",
        float(cross_entropy.mean() / expected.mean() - 1),
        np.abs(cross_entropy / expected - 1).max(),
    )
    np.testing.assert_allclose(cross_entropy.mean(), expected.mean(), rtol=0.01)
    for key, got in found.items():
        expected = common[f"eval_logits_{key}64"]
        print("logits", np.abs(got - expected).max() / np.abs(expected).max())
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
