"""Training on four devices with pmap equals training on the whole batch with jit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agr_jax import agr_transform, clean_and_adversarial_grads

DEVICES, STEPS = 4, 5


@pytest.fixture(scope="module")
def problem():
    """Parameters of a two-layer network, clean images, adversarial images and labels per step."""
    rng = np.random.default_rng(0)
    params = {
        "hidden": {"w": rng.normal(size=(6, 8)) * 0.5, "b": rng.normal(size=8) * 0.1},
        "out": {"w": rng.normal(size=(8, 3)) * 0.5, "b": np.zeros(3)},
    }
    x = rng.uniform(size=(STEPS, 16, 6))
    x_adv = x + 0.5 * rng.choice([-1.0, 1.0], size=x.shape)
    y = rng.integers(0, 3, size=(STEPS, 16))
    return jax.tree.map(jnp.asarray, (params, x, x_adv, y))


def loss(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"][None])
    logits = hidden @ params["out"]["w"] + params["out"]["b"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


AGR = agr_transform(clip_norm=0.3)
SGD = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.5, momentum=0.9))


def step(params, states, batches, average=None):
    """One step; `average` is "gradients", "results" (wrong) or None on a single device."""
    x, x_adv, y = batches
    agr_state, sgd_state = states
    pair, _ = clean_and_adversarial_grads(loss, params, (x, y), (x_adv, y))
    if average == "gradients":
        pair = jax.lax.pmean(pair, "devices")
    combined, agr_state = AGR.update(pair, agr_state)
    if average == "results":
        combined = jax.lax.pmean(combined, "devices")
    updates, sgd_state = SGD.update(combined, sgd_state, params)
    return optax.apply_updates(params, updates), (agr_state, sgd_state)


def init(params):
    return AGR.init(params), SGD.init(params)


@pytest.fixture(scope="module")
def whole_batch(problem):
    params, *data = problem
    states, jitted = init(params), jax.jit(step)
    projected = 0
    for i in range(STEPS):
        params, states = jitted(params, states, [d[i] for d in data])
        projected += float(states[0].projected.sum())
    assert 0 < projected < STEPS * 4  # both branches of AGR occur
    return params, states


def train_with_pmap(problem, average):
    params, *data = problem
    repeat = lambda tree: jax.tree.map(lambda v: jnp.stack([v] * DEVICES), tree)  # noqa: E731
    mapped = jax.pmap(
        lambda *args: step(*args, average=average), axis_name="devices", devices=jax.devices()[:4]
    )
    states, params = repeat(init(params)), repeat(params)
    for i in range(STEPS):
        shards = [d[i].reshape(DEVICES, -1, *d.shape[2:]) for d in data]
        params, states = mapped(params, states, shards)
    return params, states


def largest_difference(one, other):
    differences = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), one, other)
    return max(jax.tree.leaves(differences))


def test_averaging_both_gradients_first_is_the_whole_batch(problem, whole_batch):
    params, states = train_with_pmap(problem, "gradients")
    for device in range(DEVICES):
        of_device = jax.tree.map(lambda v: v[device], (params, states[1]))  # noqa: B023
        # Parameters near 1, other orders of summation: measured 4e-16.
        assert largest_difference(of_device, (whole_batch[0], whole_batch[1][1])) < 1e-12
    assert int(states[0].step[0]) == STEPS


def test_averaging_the_results_is_something_else(problem, whole_batch):
    params, _ = train_with_pmap(problem, "results")
    of_device = jax.tree.map(lambda v: v[0], params)
    assert largest_difference(of_device, whole_batch[0]) > 0.01
