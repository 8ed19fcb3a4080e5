"""Losses and gradients of the methods in float64 against derivations in plain NumPy.

A tanh network of two layers; the derivatives of every loss with respect to the logits, and
backpropagation through the network, are worked out by hand below from the papers' equations.
Nothing of the library or of JAX is used for them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agr_jax import sharding
from agr_jax.attacks import PGD
from agr_jax.data import Augmentation
from agr_jax.methods import (
    MART,
    TRADES,
    AdversarialTraining,
    AdversarialWeightPerturbation,
    AVmixup,
    Batch,
)
from agr_jax.threat import Linf
from agr_jax.training.step import Trainer, TrainState

PIXELS, HIDDEN, CLASSES, BATCH = 12, 7, 5, 9
ATTACK = PGD(Linf(0.1))


# ---- the network and its backpropagation


def draw_network(rng, gain):
    """Weights; `gain` makes the predictions surer."""
    return {
        "W1": rng.normal(size=(PIXELS, HIDDEN)),
        "b1": rng.normal(size=HIDDEN),
        "W2": gain * rng.normal(size=(HIDDEN, CLASSES)),
        "b2": rng.normal(size=CLASSES),
    }


def run(w, x):
    """Logits, and what backpropagation needs."""
    flat = x.reshape(len(x), -1)
    hidden = np.tanh(flat @ w["W1"] + w["b1"])
    return hidden @ w["W2"] + w["b2"], (flat, hidden)


def backpropagate(w, seen, d_logits):
    """Gradient with respect to the weights, from that with respect to the logits."""
    flat, hidden = seen
    d_sum = (d_logits @ w["W2"].T) * (1 - hidden**2)  # tanh' = 1 - tanh^2
    return {
        "W1": flat.T @ d_sum,
        "b1": d_sum.sum(0),
        "W2": hidden.T @ d_logits,
        "b2": d_logits.sum(0),
    }


def added(one, other):
    return {name: one[name] + other[name] for name in one}


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def smoothed(y, share):
    """One-hot labels, `share` of them spread evenly over all classes."""
    return (1 - share) * np.eye(CLASSES)[y] + share / CLASSES


# ---- losses: the value, and the gradient with respect to the weights


def cross_entropy(w, x, targets):
    """-1/B sum t log p; d/dz = (p - t)/B, as the targets sum to 1."""
    z, seen = run(w, x)
    p = softmax(z)
    value = -(targets * np.log(p)).sum(1).mean()
    return value, backpropagate(w, seen, (p - targets) / len(x))


def trades(w, x, x_adv, targets, *, beta):
    """Zhang et al. 2019: CE(z(x), y) + beta/B sum KL(p || q)."""
    (z, seen), (z_adv, seen_adv) = run(w, x), run(w, x_adv)
    p, q = softmax(z), softmax(z_adv)
    ratio = np.log(p / q)
    kl = (p * ratio).sum(1)
    value = -(targets * np.log(p)).sum(1).mean() + beta * kl.mean()
    # dp_k/dz_j = p_k (1[j=k] - p_j), so d KL/dz_j = p_j (ratio_j - KL).
    d_z = (p - targets + beta * p * (ratio - kl[:, None])) / len(x)
    # KL depends on q through -sum p log q alone.
    d_z_adv = beta * (q - p) / len(x)
    return value, added(backpropagate(w, seen, d_z), backpropagate(w, seen_adv, d_z_adv))


def mart(w, x, x_adv, y, targets, *, beta):
    """Wang et al. 2020 with the constants of their code: BCE(x') + beta (1 - p_y) KL(p || q)."""
    (z, seen), (z_adv, seen_adv) = run(w, x), run(w, x_adv)
    p, q = softmax(z), softmax(z_adv)
    rows, label = np.arange(len(x)), np.eye(CLASSES)[y]

    # Boosted cross-entropy: -log q_y - log(1.0001 - m + 1e-12), m the best of the other classes.
    other = np.where(label == 1, -1, q).argmax(1)
    m = q[rows, other]
    room = 1.0001 - m + 1e-12
    boosted = -(targets * np.log(q)).sum(1) - np.log(room)
    d_m = m[:, None] * (np.eye(CLASSES)[other] - q)
    d_boosted = q - targets + d_m / room[:, None]

    # Weighted divergence: omega S, omega = 1.0000001 - p_y, S = sum p (log p - log(q + 1e-12)).
    omega = 1.0000001 - p[rows, y]
    ratio = np.log(p) - np.log(q + 1e-12)
    S = (p * ratio).sum(1)
    d_omega = -p[rows, y][:, None] * (label - p)
    d_S = p * (ratio - S[:, None])
    share = p * q / (q + 1e-12)
    d_S_adv = q * share.sum(1, keepdims=True) - share

    value = boosted.mean() + beta * (omega * S).mean()
    d_z = beta * (S[:, None] * d_omega + omega[:, None] * d_S) / len(x)
    d_z_adv = (d_boosted + beta * omega[:, None] * d_S_adv) / len(x)
    return value, added(backpropagate(w, seen, d_z), backpropagate(w, seen_adv, d_z_adv))


def perturbed(w, gradient, gamma):
    """Wu et al. 2020, as published: a proxy's ascending SGD step, rescaled kernel by kernel."""
    result = dict(w)
    for name in ("W1", "W2"):
        proxy = w[name] + 0.01 * gradient[name]
        step = proxy - w[name]
        v = np.linalg.norm(w[name]) / (np.linalg.norm(step) + 1e-20) * step
        result[name] = w[name] + gamma * v
    return result


# ---- the same through the library


def to_params(w):
    return {
        "first": {"kernel": jnp.asarray(w["W1"]), "bias": jnp.asarray(w["b1"])},
        "last": {"kernel": jnp.asarray(w["W2"]), "bias": jnp.asarray(w["b2"])},
    }


def from_params(params):
    first, last = params["first"], params["last"]
    return {"W1": first["kernel"], "b1": first["bias"], "W2": last["kernel"], "b2": last["bias"]}


def forward(params, batch_stats, images):
    first, last = params["first"], params["last"]
    flat = images.reshape(len(images), -1)
    hidden = jnp.tanh(flat @ first["kernel"] + first["bias"][None])
    return hidden @ last["kernel"] + last["bias"][None], batch_stats


def library(method, w, batch):
    """Value and gradient of the method's adversarial loss."""
    compute = jax.jit(
        lambda p: jax.value_and_grad(method.adversarial_loss, 1, has_aux=True)(
            forward, p, {}, batch
        )
    )
    (value, _), gradient = compute(to_params(w))
    return value, from_params(gradient)


def check(got, expected):
    value, gradient = got
    expected_value, expected_gradient = expected
    np.testing.assert_allclose(value, expected_value, rtol=1e-9)
    check_trees(gradient, expected_gradient)


def check_trees(got, expected):
    for name, leaf in expected.items():
        assert got[name].dtype == jnp.float64
        # Entries near zero have the rounding of the largest ones.
        atol = 1e-13 * np.abs(leaf).max()
        np.testing.assert_allclose(got[name], leaf, rtol=1e-9, atol=atol, err_msg=name)


@dataclasses.dataclass
class Case:
    """A network and a batch in NumPy."""

    w: dict
    x: np.ndarray
    x_adv: np.ndarray
    y: np.ndarray

    @property
    def batch(self):
        return Batch(*(jnp.asarray(a) for a in (self.x, self.x_adv, self.y)), jax.random.key(0))


GAINS = (0.3, 1.0, 10.0)


def draw_case(gain):
    rng = np.random.default_rng(int(10 * gain))
    x = rng.uniform(size=(BATCH, 2, 2, 3))
    x_adv = np.clip(x + rng.uniform(-0.3, 0.3, size=x.shape), 0, 1)
    return Case(draw_network(rng, gain), x, x_adv, rng.integers(0, CLASSES, size=BATCH))


@pytest.fixture(scope="module", params=GAINS, ids="gain {}".format)
def case(request):
    return draw_case(request.param)


def test_the_cases_cover_what_the_losses_tell_apart():
    doubts = []
    for case in map(draw_case, GAINS):
        p = softmax(run(case.w, case.x)[0])
        assert 0 < (p.argmax(1) == case.y).sum() < BATCH  # correct and misclassified
        doubts.append(1 - p.max(1).mean())
    assert doubts[0] > 0.4
    assert doubts[-1] < 0.1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_adversarial_training(case, smoothing):
    method = AdversarialTraining(ATTACK, label_smoothing=smoothing)
    targets = smoothed(case.y, smoothing)
    check(library(method, case.w, case.batch), cross_entropy(case.w, case.x_adv, targets))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("beta", [6.0, 1.5])
def test_trades(case, beta, smoothing):
    method = TRADES(ATTACK, beta=beta, label_smoothing=smoothing)
    expected = trades(case.w, case.x, case.x_adv, smoothed(case.y, smoothing), beta=beta)
    check(library(method, case.w, case.batch), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("beta", [6.0, 1.5])
def test_mart(case, beta, smoothing):
    method = MART(ATTACK, beta=beta, label_smoothing=smoothing)
    expected = mart(case.w, case.x, case.x_adv, case.y, smoothed(case.y, smoothing), beta=beta)
    check(library(method, case.w, case.batch), expected)
    # The published statistics change no loss.
    twice = dataclasses.replace(method, published_statistics=True)
    check(library(twice, case.w, case.batch), expected)


@pytest.mark.parametrize("method", [TRADES(ATTACK), MART(ATTACK)], ids=["trades", "mart"])
def test_gradients_are_central_differences(case, method):
    loss = jax.jit(lambda p: method.adversarial_loss(forward, p, {}, case.batch)[0])
    _, gradient = library(method, case.w, case.batch)
    h = 1e-5
    for name, leaf in case.w.items():
        got = np.asarray(gradient[name])
        slope = np.empty_like(leaf)
        for index in np.ndindex(leaf.shape):
            nudge = np.zeros_like(leaf)
            nudge[index] = h
            up, down = (loss(to_params(case.w | {name: leaf + s * nudge})) for s in (1, -1))
            slope[index] = (up - down) / (2 * h)
        # Rounding of the loss over h, and h^2 times its third derivative: 1.4e-9 of the largest.
        np.testing.assert_allclose(got, slope, rtol=0, atol=3e-9 * np.abs(got).max())


# ---- AWP through the trainer


class Network:
    """What the trainer asks of a Linen module."""

    def apply(self, variables, images, *, train, mutable):
        assert train
        logits, stats = forward(variables["params"], variables["batch_stats"], images)
        return logits, {"batch_stats": stats}


NUMPY_LOSSES = {
    "at": lambda w, c: cross_entropy(w, c.x_adv, smoothed(c.y, 0)),
    "trades": lambda w, c: trades(w, c.x, c.x_adv, smoothed(c.y, 0), beta=6.0),
    "mart": lambda w, c: mart(w, c.x, c.x_adv, c.y, smoothed(c.y, 0), beta=6.0),
}
METHODS = {"at": AdversarialTraining(ATTACK), "trades": TRADES(ATTACK), "mart": MART(ATTACK)}


@pytest.mark.parametrize("clean_gradient_at", ["unperturbed", "perturbed"])
@pytest.mark.parametrize("inner", METHODS)
def test_adversarial_weight_perturbation(case, inner, clean_gradient_at):
    gamma = 0.05
    method = AdversarialWeightPerturbation(METHODS[inner], gamma, clean_gradient_at)
    trainer = Trainer(
        model=Network(),
        method=method,
        optimizer=optax.with_extra_args_support(optax.sgd(0.1)),
        augmentation=Augmentation(),
        batch_size=BATCH,
        steps_per_epoch=1,
        batch_stats="clean_then_adversarial",
        mesh=sharding.data_mesh(jax.devices()[:1]),
    )
    state = TrainState(jnp.zeros([], jnp.int32), to_params(case.w), {}, None)
    pair, points, _, metrics = jax.jit(
        lambda state, batch: trainer.gradients(state, batch, clean_gradient=True)
    )(state, case.batch)

    _, gradient = NUMPY_LOSSES[inner](case.w, case)
    attacked = perturbed(case.w, gradient, gamma)
    check_trees(from_params(points.adversarial), attacked)
    expected = NUMPY_LOSSES[inner](attacked, case)
    check((metrics["adversarial_loss"], from_params(pair.adversarial)), expected)

    clean_point = attacked if clean_gradient_at == "perturbed" else case.w
    check_trees(from_params(points.clean), clean_point)
    expected = cross_entropy(clean_point, case.x, smoothed(case.y, 0))
    check((metrics["clean_loss"], from_params(pair.clean)), expected)


# ---- AVmixup


@pytest.mark.parametrize("hard_labels", [False, True])
@pytest.mark.parametrize(
    "weights", [(2.0, 1.0, 0.1, 0.0), (2.0, 0.5, 0.7, 0.0), (1.3, 0.9, 0.2, 0.1)]
)
def test_avmixup(case, weights, hard_labels):
    gamma, clean_label, vertex_label, smoothing = weights
    method = AVmixup(
        ATTACK,
        gamma,
        clean_label,
        vertex_label,
        hard_labels=hard_labels,
        label_smoothing=smoothing,
    )
    u = np.asarray(method.clean_share(case.batch))  # the random numbers are the library's
    vertex = np.clip(case.x + gamma * (case.x_adv - case.x), 0, 1)
    mixed = np.stack([s * x + (1 - s) * v for s, x, v in zip(u, case.x, vertex, strict=True)])

    def on_the_label(weight):
        others = (1 - weight) / (CLASSES - 1)
        return np.where(np.eye(CLASSES)[case.y] == 1, weight, others)

    soft = u[:, None] * on_the_label(clean_label) + (1 - u[:, None]) * on_the_label(vertex_label)
    targets = np.eye(CLASSES)[case.y] if hard_labels else soft
    targets = (1 - smoothing) * targets + smoothing / CLASSES
    expected = cross_entropy(case.w, mixed, targets)
    check(library(method, case.w, case.batch), expected)
