"""Whole training steps against the official code's float64 twin, every stored number to 1e-5."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from official_trainer import (
    IMAGENET,
    PUBLISHED_PGD,
    compiled_step,
    images_of,
    initial_state,
    make_trainer,
    nhwc,
    perturbation_errors,
    step_errors,
)
from official_weights import (
    draw,
    in_torch_layout,
    path_of,
    state_dict_shapes,
    statistics,
    to_variables,
    torch_name_of,
)

from agr_jax import losses
from agr_jax.methods import Batch
from agr_jax.models import Classifier, PreActResNet

TOLERANCE = 1e-5  # golden/README.md; an independent derivation reaches 1e-7


@pytest.fixture(scope="module")
def common(golden):
    return golden("official_step_prn18_k10_common.npz")


@pytest.fixture(scope="module")
def names(common):
    return bytes(common["leaf_names_utf8"]).decode().split()


def check(errors):
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    assert not wrong


def test_the_weights_are_the_golden_ones(common, names):
    weights = draw(int(common["weight_seed"]), float(common["lin_gain"]))
    variables = to_variables(weights, np.float64)
    assert len(jax.tree.leaves(variables["params"])) == len(names) == 56
    for i, name in enumerate(names):
        leaf = in_torch_layout(variables["params"], name).ravel()
        assert leaf.size == common["leaf_sizes"][i]
        np.testing.assert_array_equal(leaf[:8], common["w_first8"][i, : leaf.size])
        np.testing.assert_allclose(np.linalg.norm(leaf), common["w_norm"][i], rtol=1e-6)
        np.testing.assert_allclose(leaf.sum(), common["w_sum"][i], atol=1e-6 * leaf.size**0.5)
    for kind, key in (("running_mean", "init_bn_mean"), ("running_var", "init_bn_var")):
        np.testing.assert_array_equal(statistics(variables["batch_stats"], kind), common[key])


def test_names_map_in_both_directions(names):
    for name, _ in state_dict_shapes():
        assert torch_name_of(path_of(name)) == name
    learnt = [name for name, _ in state_dict_shapes() if path_of(name)[0] == "params"]
    assert learnt == names


@pytest.fixture(scope="module")
def take_step(golden, common):
    """One step of a method from the golden weights, on the stored adversarial images."""

    def take(method, *, agr, **overrides):
        z = golden(f"official_step_prn18_k10_{method}.npz")
        trainer = make_trainer(
            agr=agr, conv="plain", dtype=jnp.float64, method=method, z=z, **overrides
        )
        state = initial_state(trainer, int(common["weight_seed"]), float(common["lin_gain"]))
        images, labels = images_of(common, "", np.float64)
        batch = Batch(images, nhwc(common["x_adv"], np.float64), labels)
        return compiled_step(trainer, agr=agr)(state, batch), z

    return take


@pytest.mark.parametrize(
    ("method", "agr"),
    [
        # Three steps of AT, with AGR, are below; the other losses alone are in test_losses.py.
        *(
            pytest.param(method, True, marks=pytest.mark.slow)
            for method in ("trades", "mart", "Avmixup")
        ),
        *(
            pytest.param(method, False, marks=pytest.mark.slow)
            for method in ("AT", "trades", "mart", "Avmixup")
        ),
    ],
)
def test_step(take_step, names, method, agr):
    result, z = take_step(method, agr=agr)
    check(step_errors(result, z, "agr64_" if agr else "base64_", names))


@pytest.mark.slow
def test_awp_baseline(take_step, names):
    result, z = take_step("awp", agr=False)
    check(step_errors(result, z, "base64_", names))
    check(perturbation_errors(result, z, "base64_", names, gamma=0.01))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("clean_gradient_at", "key", "forward"),
    # The stored clean pass is that at w.
    [("unperturbed", "cleanw64_", "agr64_"), ("perturbed", "cleanwv64_", "")],
)
def test_awp_with_agr(take_step, names, clean_gradient_at, key, forward):
    result, z = take_step("awp", agr=True, clean_gradient_at=clean_gradient_at)
    check(step_errors(result, z, key, names, forward=forward))
    check(perturbation_errors(result, z, "agr64_", names, gamma=0.01))


@pytest.mark.slow  # one step of each kind is held above
def test_three_agr_steps_in_a_row(golden, names):
    trainer = make_trainer(agr=True, conv="plain", dtype=jnp.float64)
    step = compiled_step(trainer, agr=True)
    z = golden("official_steps3_prn18_k10_AT.npz")
    state = initial_state(trainer, int(z["weight_seed"]), float(z["lin_gain"]))
    for number in range(3):
        images, labels = images_of(z, f"s{number}_", np.float64)
        batch = Batch(images, nhwc(z[f"s{number}_x_adv"], np.float64), labels)
        result = step(state, batch)
        check(step_errors(result, z, f"s{number}64_", names))
        state = result.state
    assert int(state.step) == 3


@pytest.mark.slow
def test_pgd_reproduces_every_pixel(common):
    weights = draw(int(common["weight_seed"]), float(common["lin_gain"]))
    variables = jax.tree.map(jnp.asarray, to_variables(weights, np.float64))
    model = PreActResNet(
        10, conv="canonical", dtype=jnp.float64, param_dtype=jnp.float64, **IMAGENET
    )
    network = Classifier(model, variables)
    images, labels = images_of(common, "", np.float64)
    start = jnp.clip(images + nhwc(common["start_noise"], np.float64), 0, 1)
    adversarial = PUBLISHED_PGD.from_start(network, images, labels, start)

    expected = np.asarray(nhwc(common["pgd64_x_adv"], np.float64))
    # Steps are 2/255: a pixel that took another path is off by at least that; 1e-7 is the rounding
    # of the stored float32.
    worst = np.abs(adversarial - expected).max()
    assert worst <= 1e-7
    logits = functools.partial(jax.jit(lambda network, x: network(x)), network)
    cross_entropy = losses.cross_entropy(logits(adversarial), labels)
    np.testing.assert_allclose(cross_entropy, common["pgd64_ce_per_example"], rtol=TOLERANCE)
    for key, points in (("clean", images), ("adv", nhwc(common["x_adv"], np.float64))):
        expected = common[f"eval_logits_{key}64"]
        error = np.abs(logits(points) - expected).max() / np.abs(expected).max()
        assert error <= TOLERANCE
