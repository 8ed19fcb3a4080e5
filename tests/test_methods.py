"""Training methods on a tiny network: passes, attacks, perturbed weights, mixtures, configs.

The losses and gradients themselves are compared with derivations in `float64/test_methods.py` and
with the published code in `test_official_step.py`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agr_jax import losses, methods, sharding
from agr_jax.attacks import PGD
from agr_jax.config import from_config_dict
from agr_jax.data import Augmentation
from agr_jax.errors import ConfigError
from agr_jax.methods import (
    MART,
    TRADES,
    AdversarialTraining,
    AdversarialWeightPerturbation,
    AVmixup,
    Batch,
    StandardTraining,
    divergence_from,
)
from agr_jax.methods.awp import weight_perturbation
from agr_jax.threat import L1, L2, Linf
from agr_jax.training.step import Trainer, TrainState
from configs.base import recipe

SHAPE = (4, 4, 3)
PIXELS, HIDDEN, CLASSES, BATCH = 48, 6, 5, 8
KEY = jax.random.key(3)
ATTACK = PGD(Linf(0.1), steps=10, step_size=0.02)
# TRADES' and MART's own starts: near the image.
KL_ATTACK = dataclasses.replace(
    ATTACK, loss=divergence_from, targets="clean_logits", random_start=False, start_noise=0.001
)
NEAR_ATTACK = dataclasses.replace(ATTACK, random_start=False, start_noise=0.001)

AT = AdversarialTraining(ATTACK)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, jnp.float32)  # noqa: E731
    return {
        "first": {"kernel": draw(PIXELS, HIDDEN), "bias": draw(HIDDEN)},
        "last": {"kernel": draw(HIDDEN, CLASSES), "bias": draw(CLASSES)},
    }


@pytest.fixture(scope="module")
def batch():
    """On a grid of 1/256, so that sums and differences of images are exact."""
    rng = np.random.default_rng(1)
    images = rng.integers(30, 226, size=(BATCH, *SHAPE)) / 256
    adversarial = images + rng.integers(-25, 26, size=images.shape) / 256
    labels = rng.integers(0, CLASSES, size=BATCH)
    arrays = (jnp.asarray(a, jnp.float32) for a in (images, adversarial))
    return Batch(*arrays, jnp.asarray(labels), KEY)


def logits_of(params, images):
    first, last = params["first"], params["last"]
    flat = images.reshape(len(images), -1)
    hidden = jnp.tanh(flat @ first["kernel"] + first["bias"][None])
    return hidden @ last["kernel"] + last["bias"][None]


def forward(params, batch_stats, images):
    """Its "running statistics" are a list of what was seen: the images, and with which weights."""
    passes = batch_stats["passes"]
    row = jnp.stack([images.mean(), params["first"]["kernel"].sum()])
    seen = batch_stats["seen"].at[passes].set(row)
    return logits_of(params, images), {"passes": passes + 1, "seen": seen}


NOTHING_SEEN = {"passes": jnp.zeros([], jnp.int32), "seen": jnp.zeros([8, 2])}


def adversarial_gradient(method, params, batch):
    """Value, outcome and gradient of the adversarial loss."""
    compute = jax.value_and_grad(method.adversarial_loss, 1, has_aux=True)
    return jax.jit(lambda p: compute(forward, p, NOTHING_SEEN, batch))(params)


# ---- the passes that count in the running statistics


class Network:
    """What the trainer asks of a Linen module."""

    def apply(self, variables, images, *, train, mutable):
        assert train
        assert mutable == ["batch_stats"]
        logits, stats = forward(variables["params"], variables["batch_stats"], images)
        return logits, {"batch_stats": stats}


def take_gradients(method, params, batch, *, batch_stats, clean_gradient=True):
    """`Trainer.gradients` from a fresh state."""
    trainer = Trainer(
        model=Network(),
        method=method,
        optimizer=optax.with_extra_args_support(optax.sgd(0.1)),
        augmentation=Augmentation(),
        batch_size=BATCH,
        steps_per_epoch=1,
        batch_stats=batch_stats,
        mesh=sharding.data_mesh(jax.devices()[:1]),
    )

    @jax.jit
    def run(params):
        state = TrainState(jnp.zeros([], jnp.int32), params, NOTHING_SEEN, None)
        return trainer.gradients(state, batch, clean_gradient=clean_gradient)

    return run(params)


def passes(batch_stats, images, points):
    """The recorded passes by name, such as `["clean", "adversarial at w + v"]`."""
    found = []
    for mean, kernel_sum in np.asarray(batch_stats["seen"])[: int(batch_stats["passes"])]:
        image = [name for name, value in images.items() if abs(value.mean() - mean) < 1e-6]
        point = [
            name
            for name, value in points.items()
            if abs(value["first"]["kernel"].sum() - kernel_sum) < 1e-5
        ]
        assert len(image) == len(point) == 1
        found.append(image[0] + point[0])
    return found


AT_W_AND_V = AdversarialWeightPerturbation(AT, gamma=0.1)
IN_TURN = ["clean", "adversarial"]


@pytest.mark.parametrize(
    ("method", "batch_stats", "expected"),
    [
        (AT, "published", IN_TURN),
        (AT, "clean_then_adversarial", IN_TURN),
        (AT, "adversarial", ["adversarial"]),
        (TRADES(KL_ATTACK), "published", IN_TURN),
        (TRADES(KL_ATTACK), "clean_then_adversarial", IN_TURN),
        (TRADES(KL_ATTACK), "adversarial", ["adversarial"]),
        (AT_W_AND_V, "published", ["clean", "adversarial at w + v"]),
        (AT_W_AND_V, "clean_then_adversarial", ["clean", "adversarial at w + v"]),
        (AT_W_AND_V, "adversarial", ["adversarial at w + v"]),
        (
            dataclasses.replace(AT_W_AND_V, clean_gradient_at="perturbed"),
            "clean_then_adversarial",
            ["clean at w + v", "adversarial at w + v"],
        ),
        (
            MART(ATTACK, published_statistics=True),
            "published",
            ["clean", "clean", "adversarial", "adversarial"],
        ),
        (MART(ATTACK), "clean_then_adversarial", IN_TURN),
        (MART(ATTACK), "adversarial", ["adversarial"]),
        (
            AVmixup(ATTACK, published_statistics=True, hard_labels=True),
            "published",
            ["clean", "adversarial", "mixed"],
        ),
        (AVmixup(ATTACK), "clean_then_adversarial", ["clean", "mixed"]),
        (AVmixup(ATTACK), "adversarial", ["mixed"]),
        (StandardTraining(), "adversarial", ["clean"]),
    ],
)
def test_passes_count_in_the_running_statistics_in_order(
    params, batch, method, batch_stats, expected
):
    mixed = AVmixup(ATTACK).mixed_images(batch)
    images = {"clean": batch.images, "adversarial": batch.adversarial, "mixed": mixed}
    perturbed = AT_W_AND_V.gradient_points(forward, params, NOTHING_SEEN, batch)[1]
    for clean_gradient in (True, False):
        _, _, after, metrics = take_gradients(
            method, params, batch, batch_stats=batch_stats, clean_gradient=clean_gradient
        )
        assert passes(after, images, {"": params, " at w + v": perturbed}) == expected
        assert ("clean_loss" in metrics) == (clean_gradient or batch_stats != "adversarial")


@pytest.mark.parametrize("method", [AT, TRADES(ATTACK), MART(ATTACK), AVmixup(ATTACK)])
def test_what_the_losses_report(params, batch, method):
    (loss, outcome), _ = adversarial_gradient(method, params, batch)
    images = method.mixed_images(batch) if isinstance(method, AVmixup) else batch.adversarial
    np.testing.assert_allclose(outcome.logits, logits_of(params, images), atol=1e-6)
    terms = outcome.terms or {}
    if isinstance(method, TRADES):
        total = terms.pop("trades_cross_entropy") + 6 * terms.pop("trades_kl")
        np.testing.assert_allclose(loss, total, rtol=1e-6)
    if isinstance(method, MART):
        total = terms.pop("mart_bce") + 6 * terms.pop("mart_kl")
        np.testing.assert_allclose(loss, total, rtol=1e-6)
    if isinstance(method, AVmixup):
        targets = np.asarray(method.mixed_labels(batch, CLASSES), np.float64)
        entropy = -(targets * np.log(targets)).sum(1).mean()
        np.testing.assert_allclose(terms.pop("avmixup_kl"), loss - entropy, rtol=1e-5)
    assert not terms
    clean, outcome = method.clean_loss(forward, params, NOTHING_SEEN, batch)
    np.testing.assert_allclose(outcome.logits, logits_of(params, batch.images), atol=1e-6)
    expected = losses.cross_entropy(outcome.logits, batch.labels).mean()
    np.testing.assert_allclose(clean, expected, rtol=1e-6)


# ---- the attacks of TRADES and MART


@pytest.mark.parametrize("attack", [KL_ATTACK, NEAR_ATTACK], ids=["trades", "mart"])
def test_the_attack_starts_near_the_image(params, attack):
    images = jnp.asarray(np.random.default_rng(2).uniform(0.2, 0.8, size=(1000, *SHAPE)))
    images, labels = images.astype(jnp.float32), jnp.zeros(len(images), jnp.int32)
    here = dataclasses.replace(attack, steps=1, step_size=1e-12)
    start = here(lambda x: logits_of(params, x), images, labels, KEY)
    noise = (np.asarray(start, np.float64) - images) / 0.001
    # Four standard errors of 48,000 normal draws.
    assert abs(noise.mean()) < 4 / noise.size**0.5
    assert abs(noise.std() - 1) < 4 / (2 * noise.size) ** 0.5
    assert abs((np.abs(noise) > 2).mean() - 0.0455) < 4 * (0.0455 / noise.size) ** 0.5
    # Independent from image to image and from channel to channel.
    for shifted in (np.roll(noise, 1, axis=0), np.roll(noise, 1, axis=3)):
        assert abs((noise * shifted).mean()) < 4 / noise.size**0.5
    other = here(lambda x: logits_of(params, x), images, labels, jax.random.key(4))
    assert (np.asarray(other) != start).mean() > 0.9


def divergence(clean, other):
    """KL(softmax(clean) || softmax(other)) in NumPy float64."""
    log_p, log_q = (
        a - np.log(np.exp(a).sum(1, keepdims=True))
        for a in (np.asarray(clean, np.float64), np.asarray(other, np.float64))
    )
    return (np.exp(log_p) * (log_p - log_q)).sum(1)


def test_divergence_from_is_that_of_the_clean_prediction():
    rng = np.random.default_rng(5)
    clean, other = (jnp.asarray(2 * rng.normal(size=(6, 4)), jnp.float32) for _ in range(2))
    got = divergence_from(other, clean)  # an attack passes the candidates first
    np.testing.assert_allclose(got, divergence(clean, other), rtol=1e-5)
    assert (np.abs(got - divergence(other, clean)) > 1e-2).all()


def test_the_attack_raises_the_divergence_in_ball_and_box(params):
    rng = np.random.default_rng(6)
    images = jnp.asarray(np.clip(rng.uniform(-0.3, 1.3, size=(32, *SHAPE)), 0, 1), jnp.float32)
    labels = jnp.asarray(rng.integers(0, CLASSES, size=32))
    network = lambda x: logits_of(params, x)  # noqa: E731
    adversarial = KL_ATTACK(network, images, labels, KEY)
    assert float(adversarial.min()) >= 0
    assert float(adversarial.max()) <= 1
    # Rounding of x + u - x, 6e-8 a pixel.
    assert (Linf(0.1).distance(adversarial, images) <= 0.1 + 1e-6).all()
    # Far above what the corners of the ball give by chance, and the labels play no part.
    reached = divergence(network(images), network(adversarial))
    corners = jnp.clip(images + jnp.asarray(rng.choice([-0.1, 0.1], images.shape), jnp.float32), 0)
    by_chance = divergence(network(images), network(jnp.minimum(corners, 1)))
    assert np.median(reached / by_chance) > 3
    assert (reached > by_chance).mean() > 0.9
    np.testing.assert_array_equal(adversarial, KL_ATTACK(network, images, 0 * labels, KEY))


def test_a_step_follows_the_derivative_of_the_divergence():
    # On a linear network d KL(p || q) / d image = W (q - p), with p at the image itself.
    rng = np.random.default_rng(7)
    weights = rng.normal(size=(PIXELS, CLASSES))
    images = rng.uniform(0.3, 0.7, size=(16, *SHAPE))
    start = images + rng.uniform(-0.2, 0.2, size=images.shape)
    attack = dataclasses.replace(KL_ATTACK, threat=Linf(0.5), steps=1, step_size=0.01)
    float32 = [jnp.asarray(a, jnp.float32) for a in (weights, images, start)]
    got = attack.from_start(
        lambda x: x.reshape(len(x), -1) @ float32[0],
        float32[1],
        jnp.zeros(16, jnp.int32),
        float32[2],
    )

    p, q = (
        np.exp(z) / np.exp(z).sum(1, keepdims=True)
        for z in (a.reshape(16, -1) @ weights for a in (images, start))
    )
    forwards = (q - p) @ weights.T
    ratio = np.log(q / p)
    backwards = (q * (ratio - (q * ratio).sum(1, keepdims=True))) @ weights.T  # of KL(q || p)
    sure = (np.abs(forwards) > 1e-5).reshape(got.shape)
    assert sure.mean() > 0.99
    expected = start + 0.01 * np.sign(forwards).reshape(got.shape)
    np.testing.assert_allclose(np.asarray(got)[sure], expected[sure], atol=1e-6)
    # The other divergence would have stepped elsewhere.
    assert (np.sign(forwards) != np.sign(backwards)).mean() > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"random_start": True}, r"start_noise needs random_start=False.*start_noise 0\.001"),
        ({"targets": "clean"}, "targets must be 'labels' or 'clean_logits', got 'clean'"),
        ({"start_noise": -0.001}, r"start_noise must be at least 0, got -0\.001"),
        ({"start_noise": float("nan")}, "start_noise must be at least 0, got nan"),
        ({"start_noise": float("inf")}, "start_noise must be at least 0, got inf"),
    ],
)
def test_pgd_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(KL_ATTACK, **options)


# ---- AWP


def norm(leaf):
    return np.linalg.norm(np.asarray(leaf, np.float64).ravel())


def weight_trees(scale=1.0):
    """Weights of every shape that a network has, and a gradient of the given scale."""
    rng = np.random.default_rng(8)
    shapes = {"conv": (3, 3, 4, 5), "linear": (7, 3), "bias": (3,), "scalar": ()}
    weights = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    gradient = {
        name: jnp.asarray(scale * rng.normal(size=s), jnp.float32) for name, s in shapes.items()
    }
    return weights, gradient


# Beyond 1e-19 and 1e19 the squares leave float32.
@pytest.mark.parametrize("scale", [1.0, 1e-10, 1e-30, 1e-34, 1e30, 1e37])
def test_a_kernel_is_perturbed_by_its_own_length_along_the_gradient(scale):
    weights, gradient = weight_trees(scale)
    v = jax.jit(weight_perturbation)(weights, gradient)
    for name in ("conv", "linear"):
        assert v[name].dtype == jnp.float32
        np.testing.assert_allclose(norm(v[name]), norm(weights[name]), rtol=1e-6)
        direction = np.asarray(gradient[name], np.float64) / norm(gradient[name])
        np.testing.assert_allclose(v[name] / norm(v[name]), direction, rtol=1e-5)
    for name in ("bias", "scalar"):
        np.testing.assert_array_equal(v[name], np.zeros_like(weights[name]))


def test_a_zero_gradient_or_a_zero_kernel_perturbs_nothing():
    weights, gradient = weight_trees()
    nothing = jax.tree.map(jnp.zeros_like, gradient)
    for w, g in ((weights, nothing), (nothing, gradient), (nothing, nothing)):
        for leaf in jax.tree.leaves(weight_perturbation(w, g)):
            np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_perturbation_keeps_the_dtype_of_the_weights(dtype):
    weights, gradient = (jax.tree.map(lambda a: a.astype(dtype), t) for t in weight_trees(1e-3))
    v = weight_perturbation(weights, gradient)
    assert {leaf.dtype for leaf in jax.tree.leaves(v)} == {jnp.dtype(dtype)}
    # Half the spacing of the dtype.
    tolerance = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(norm(v["conv"]), norm(weights["conv"]), rtol=tolerance)


@pytest.mark.parametrize("inner", [AT, TRADES(KL_ATTACK), MART(ATTACK), AVmixup(ATTACK)])
@pytest.mark.parametrize("gamma", [0.01, 0.3])
def test_gradient_points(params, batch, inner, gamma):
    before = jax.tree.map(np.array, params)
    method = AdversarialWeightPerturbation(inner, gamma=gamma)
    clean, perturbed = method.gradient_points(forward, params, NOTHING_SEEN, batch)
    assert clean is params
    jax.tree.map(np.testing.assert_array_equal, params, before)
    for layer, leaves in params.items():
        moved = np.asarray(perturbed[layer]["kernel"], np.float64) - leaves["kernel"]
        # w + gamma v is rounded: half the spacing of an entry of w, over gamma.
        np.testing.assert_allclose(norm(moved) / norm(leaves["kernel"]), gamma, rtol=1e-6)
        np.testing.assert_array_equal(perturbed[layer]["bias"], leaves["bias"])
    both = dataclasses.replace(method, clean_gradient_at="perturbed")
    clean, adversarial = both.gradient_points(forward, params, NOTHING_SEEN, batch)
    assert clean is adversarial
    jax.tree.map(np.testing.assert_array_equal, clean, perturbed)
    assert inner.gradient_points(forward, params, NOTHING_SEEN, batch) == (params, params)


@pytest.mark.parametrize("inner", [AT, TRADES(KL_ATTACK), MART(ATTACK), AVmixup(ATTACK)])
def test_the_perturbation_raises_the_loss_as_the_gradient_says(params, batch, inner):
    gamma = 1e-3
    method = AdversarialWeightPerturbation(inner, gamma=gamma)
    (loss, _), gradient = adversarial_gradient(inner, params, batch)
    _, perturbed = method.gradient_points(forward, params, NOTHING_SEEN, batch)
    raised = inner.adversarial_loss(forward, perturbed, NOTHING_SEEN, batch)[0] - loss
    slope = sum(norm(params[layer]["kernel"]) * norm(gradient[layer]["kernel"]) for layer in params)
    # The second order in gamma.
    np.testing.assert_allclose(raised, gamma * slope, rtol=0.02)


@pytest.mark.parametrize("clean_gradient_at", ["unperturbed", "perturbed"])
def test_the_trainer_takes_each_gradient_at_its_point(params, batch, clean_gradient_at):
    inner = TRADES(KL_ATTACK)
    method = AdversarialWeightPerturbation(inner, gamma=0.1, clean_gradient_at=clean_gradient_at)
    pair, points, _, metrics = take_gradients(
        method, params, batch, batch_stats="clean_then_adversarial"
    )
    clean_point, adversarial_point = method.gradient_points(forward, params, NOTHING_SEEN, batch)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # noqa: E731
    jax.tree.map(close, points.clean, clean_point)
    jax.tree.map(close, points.adversarial, adversarial_point)
    (loss, _), expected = adversarial_gradient(inner, adversarial_point, batch)
    jax.tree.map(close, pair.adversarial, expected)
    np.testing.assert_allclose(metrics["adversarial_loss"], loss, rtol=1e-5)
    clean_loss = lambda p: inner.clean_loss(forward, p, NOTHING_SEEN, batch)[0]  # noqa: E731
    loss, expected = jax.value_and_grad(clean_loss)(clean_point)
    jax.tree.map(close, pair.clean, expected)
    np.testing.assert_allclose(metrics["clean_loss"], loss, rtol=1e-5)
    # The points are apart by more than the tolerance.
    elsewhere = params if clean_gradient_at == "perturbed" else adversarial_point
    assert abs(clean_loss(elsewhere) - loss) > 1e-3 * loss


# ---- AVmixup


@dataclasses.dataclass(frozen=True, eq=False)
class GivenShare(AVmixup):
    """AVmixup with a share of its own for every example instead of a random one."""

    share: Any = 0.0

    def clean_share(self, batch):
        return jnp.broadcast_to(jnp.asarray(self.share, jnp.float32), batch.labels.shape)


def test_the_share_is_uniform_and_from_the_batchs_key(batch):
    many = batch._replace(labels=jnp.zeros(20000, jnp.int32))
    share = np.asarray(AVmixup(ATTACK).clean_share(many))
    assert share.dtype == np.float32
    counts = np.histogram(share, bins=10, range=(0, 1))[0]
    assert counts.sum() == 20000
    # Five standard errors of a binomial draw of one bin in ten.
    assert (np.abs(counts - 2000) < 5 * (20000 * 0.1 * 0.9) ** 0.5).all()
    np.testing.assert_array_equal(share, AVmixup(ATTACK).clean_share(many))
    other = AVmixup(ATTACK).clean_share(many._replace(key=jax.random.key(9)))
    assert (np.asarray(other) != share).mean() > 0.99


def test_images_and_labels_are_mixed_example_by_example(batch):
    method = AVmixup(ATTACK, gamma=1.0, clean_label=1.0, vertex_label=0.4)
    share = np.asarray(method.clean_share(batch), np.float64)
    assert np.ptp(share) > 0.5
    images, adversarial = (np.asarray(a, np.float64) for a in batch[:2])
    u = share.reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(
        method.mixed_images(batch), u * images + (1 - u) * adversarial, atol=1e-6
    )
    one_hot = np.eye(CLASSES)[np.asarray(batch.labels)]
    vertex = np.where(one_hot == 1, 0.4, 0.15)  # 0.6 over the other four
    expected = share[:, None] * one_hot + (1 - share[:, None]) * vertex
    np.testing.assert_allclose(method.mixed_labels(batch, CLASSES), expected, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [2, 5, 200])
def test_soft_labels_sum_to_one(batch, classes, smoothing):
    method = AVmixup(ATTACK, clean_label=0.5, vertex_label=0.7, label_smoothing=smoothing)
    labels = batch.labels % classes
    targets = np.asarray(method.mixed_labels(batch._replace(labels=labels), classes), np.float64)
    assert targets.shape == (BATCH, classes)
    np.testing.assert_allclose(targets.sum(1), 1, rtol=2e-6)
    assert targets.min() >= 0
    share = np.asarray(method.clean_share(batch), np.float64)
    on_label = (1 - smoothing) * (0.5 * share + 0.7 * (1 - share)) + smoothing / classes
    got = targets[np.arange(BATCH), np.asarray(labels)]
    np.testing.assert_allclose(got, on_label, rtol=2e-6)
    others = np.delete(targets[0], int(labels[0]))
    np.testing.assert_allclose(others, others[0])


def test_at_the_image_soft_labels_are_one_hot(batch):
    method = GivenShare(ATTACK, clean_label=1.0, vertex_label=0.1, share=1.0)
    one_hot = np.eye(CLASSES, dtype=np.float32)[np.asarray(batch.labels)]
    np.testing.assert_array_equal(method.mixed_labels(batch, CLASSES), one_hot)
    np.testing.assert_array_equal(method.mixed_images(batch), batch.images)


@pytest.mark.parametrize("hard_labels", [True, False])
def test_at_the_adversarial_image_it_is_at(params, batch, hard_labels):
    method = GivenShare(
        ATTACK, gamma=1.0, clean_label=0.3, vertex_label=1.0, hard_labels=hard_labels, share=0.0
    )
    np.testing.assert_array_equal(method.mixed_images(batch), batch.adversarial)
    found = []
    for either in (method, AT):
        # Not jitted: fused, sums may be taken in another order.
        compute = jax.value_and_grad(either.adversarial_loss, 1, has_aux=True)
        (loss, outcome), gradient = compute(forward, params, NOTHING_SEEN, batch)
        found.append((loss, outcome.logits, outcome.batch_stats, gradient))
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize("gamma", [2.0, 5.0])
def test_the_vertex_is_clipped_to_the_box(batch, gamma):
    images = jnp.clip(batch.images, 0.02, 0.98).at[0].set(0.99).at[1].set(0.01)
    adversarial = jnp.clip(batch.adversarial, 0, 1).at[0].set(1.0).at[1].set(0.0)
    given = batch._replace(images=images, adversarial=adversarial)
    vertex = GivenShare(ATTACK, gamma=gamma, share=0.0).mixed_images(given)
    wide = [np.asarray(a, np.float64) for a in (images, adversarial)]
    free = wide[0] + gamma * (wide[1] - wide[0])
    assert free.min() < 0
    assert free.max() > 1
    np.testing.assert_allclose(vertex, np.clip(free, 0, 1), atol=1e-6)
    np.testing.assert_array_equal(vertex[0], np.ones(SHAPE))
    np.testing.assert_array_equal(vertex[1], np.zeros(SHAPE))
    # What is mixed is the clipped vertex: half of the way to it.
    half = GivenShare(ATTACK, gamma=gamma, share=0.5).mixed_images(given)
    np.testing.assert_allclose(half, (wide[0] + np.clip(free, 0, 1)) / 2, atol=1e-6)


def test_hard_labels_ignore_the_weights(params, batch):
    hard = AVmixup(ATTACK, clean_label=0.5, vertex_label=0.7, hard_labels=True)
    other = dataclasses.replace(hard, clean_label=0.1, vertex_label=0.2)
    (loss, outcome), gradient = adversarial_gradient(hard, params, batch)
    (other_loss, _), other_gradient = adversarial_gradient(other, params, batch)
    np.testing.assert_array_equal(loss, other_loss)
    jax.tree.map(np.testing.assert_array_equal, gradient, other_gradient)
    logits = logits_of(params, hard.mixed_images(batch))
    expected = losses.cross_entropy(logits, batch.labels).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert outcome.terms is None
    # Soft labels do heed them.
    soft = [dataclasses.replace(m, hard_labels=False) for m in (hard, other)]
    values = [adversarial_gradient(m, params, batch)[0][0] for m in soft]
    assert abs(values[0] - values[1]) > 1e-3


@pytest.mark.parametrize("hard_labels", [True, False])
def test_avmixup_needs_a_key(params, batch, hard_labels):
    method = AVmixup(ATTACK, hard_labels=hard_labels)
    with pytest.raises(ValueError, match=r"Batch\.key must be a key, got None"):
        method.adversarial_loss(forward, params, NOTHING_SEEN, batch._replace(key=None))


# ---- methods by their configs

DIGITS_ATTACK = PGD(Linf(0.15), steps=10, step_size=0.0375)
DIGITS_NEAR = dataclasses.replace(DIGITS_ATTACK, random_start=False, start_noise=0.001)
DIGITS_KL = dataclasses.replace(DIGITS_NEAR, loss=divergence_from, targets="clean_logits")
PUBLISHED_ATTACK = dataclasses.replace(DIGITS_ATTACK, box_every_step=False)


@pytest.mark.parametrize(
    ("name", "profile", "expected"),
    [
        ("standard", "paper", StandardTraining()),
        ("at", "paper", AdversarialTraining(DIGITS_ATTACK)),
        ("trades", "paper", TRADES(DIGITS_KL, beta=6.0)),
        ("mart", "paper", MART(DIGITS_NEAR, beta=6.0)),
        ("awp", "paper", AdversarialWeightPerturbation(AdversarialTraining(DIGITS_ATTACK))),
        ("avmixup", "paper", AVmixup(DIGITS_ATTACK, 2.0, 1.0, 0.1)),
        ("at", "official", AdversarialTraining(PUBLISHED_ATTACK)),
        ("trades", "official", TRADES(PUBLISHED_ATTACK, beta=6.0)),
        ("mart", "official", MART(PUBLISHED_ATTACK, beta=6.0, published_statistics=True)),
        ("awp", "official", AdversarialWeightPerturbation(AdversarialTraining(PUBLISHED_ATTACK))),
        (
            "avmixup",
            "official",
            AVmixup(PUBLISHED_ATTACK, 2.0, 0.5, 0.7, hard_labels=True, published_statistics=True),
        ),
        ("at", "best", AdversarialTraining(DIGITS_ATTACK, label_smoothing=0.1)),
        ("trades", "best", TRADES(DIGITS_KL, beta=6.0, label_smoothing=0.1)),
        ("mart", "best", MART(DIGITS_NEAR, beta=6.0)),
        (
            "awp",
            "best",
            AdversarialWeightPerturbation(AdversarialTraining(DIGITS_ATTACK, label_smoothing=0.1)),
        ),
        ("avmixup", "best", AVmixup(DIGITS_ATTACK, 2.0, 1.0, 0.1)),
    ],
)
def test_methods_of_the_recipes(name, profile, expected):
    method = methods.from_config(from_config_dict(recipe("digits", name, profile)))
    assert type(method) is type(expected)
    assert method == expected


def test_the_expected_defaults():
    # The comparisons above lean on them.
    published = AVmixup(ATTACK)
    assert (published.gamma, published.clean_label, published.vertex_label) == (2.0, 1.0, 0.1)
    assert (TRADES(ATTACK).beta, MART(ATTACK).beta) == (6.0, 6.0)
    awp = AdversarialWeightPerturbation(AT)
    assert (awp.gamma, awp.clean_gradient_at) == (0.01, "unperturbed")
    assert (published.hard_labels, published.published_statistics) == (False, False)
    assert (ATTACK.loss, ATTACK.targets) == (losses.cross_entropy, "labels")
    assert (ATTACK.random_start, ATTACK.box_every_step, ATTACK.start_noise) == (True, True, 0)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("trades", {"trades": {"beta": 2.5}}, TRADES(DIGITS_KL, beta=2.5)),
        ("mart", {"mart": {"beta": 5.0}}, MART(DIGITS_NEAR, beta=5.0)),
        (
            "mart",
            {"label_smoothing": 0.2},
            MART(DIGITS_NEAR, label_smoothing=0.2),
        ),
        (
            "avmixup",
            {"avmixup": {"gamma": 1.5, "clean_label": 0.9, "vertex_label": 0.3}},
            AVmixup(DIGITS_ATTACK, 1.5, 0.9, 0.3),
        ),
        ("standard", {"label_smoothing": 0.2}, StandardTraining(label_smoothing=0.2)),
        (
            "awp",
            {"awp": {"gamma": 0.005, "clean_gradient_at": "perturbed"}},
            AdversarialWeightPerturbation(AdversarialTraining(DIGITS_ATTACK), 0.005, "perturbed"),
        ),
        ("trades", {"awp": {"enabled": True}}, AdversarialWeightPerturbation(TRADES(DIGITS_KL))),
        (
            "at",
            {"attack": {"norm": "l2", "epsilon": 0.5, "step_size": 0.1, "steps": 7}},
            AdversarialTraining(PGD(L2(0.5), steps=7, step_size=0.1)),
        ),
        (
            "at",
            {"attack": {"norm": "l1", "random_start": False}},
            AdversarialTraining(dataclasses.replace(DIGITS_NEAR, threat=L1(0.15), start_noise=0.0)),
        ),
    ],
)
def test_fields_of_a_config_reach_the_method(name, changes, expected):
    values = recipe("digits", name, "paper")
    values.update(changes)
    assert methods.from_config(from_config_dict(values)) == expected


def test_weights_are_perturbed_from_the_start_epoch_on():
    values = recipe("digits", "awp", "paper")
    values.awp.start_epoch = 3
    config = from_config_dict(values)
    for epoch in (0, 2):
        assert methods.from_config(config, epoch) == AdversarialTraining(DIGITS_ATTACK)
    for epoch in (3, 4, None):
        assert isinstance(methods.from_config(config, epoch), AdversarialWeightPerturbation)
    values.awp.enabled = False
    off = from_config_dict(values)
    assert methods.from_config(off, 5) == AdversarialTraining(DIGITS_ATTACK)


def test_two_starts_of_an_attack_are_refused():
    values = recipe("digits", "at", "paper")
    values.attack.start_noise = 0.001
    with pytest.raises(ConfigError, match=r"config\.attack\.start_noise: 0\.001 needs .*=False"):
        methods.from_config(from_config_dict(values))


@pytest.mark.parametrize("name", ["at", "trades", "mart", "awp", "avmixup"])
def test_checkpoints_are_selected_under_the_same_attack(name):
    config = from_config_dict(recipe("digits", name, "paper"))
    assert methods.validation_attack(config.attack) == DIGITS_ATTACK


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nonsense",
            r"config\.method: must be one of at, trades, mart, avmixup, standard, "
            r"or MODULE:FUNCTION of your own, got 'nonsense'",
        ),
        ("tradse", r"config\.method: .*did you mean 'trades'"),
        ("awp", r"config\.method: must be one of"),  # a group of its own
        ("my_package:", r"config\.method: must be one of"),
        (":create", r"config\.method: must be one of"),
        ("my-package:create", r"config\.method: must be one of"),
    ],
)
def test_unknown_methods_are_refused(name, message):
    values = recipe("digits", "at", "paper")
    values.method = name
    with pytest.raises(ConfigError, match=message):
        from_config_dict(values)


def test_a_name_that_was_never_checked_is_refused_too():
    config = from_config_dict(recipe("digits", "at", "paper"))
    with pytest.raises(ConfigError, match=r"config\.method: no such method 'nonsense'"):
        methods.from_config(dataclasses.replace(config, method="nonsense"))


def create_own(config):
    return TRADES(methods.training_attack(config.attack), beta=config.trades.beta + 1)


def create_nothing(config):
    return None


def create_unequal(config):
    """Two of these are never equal: each has a function of its own."""
    attack = dataclasses.replace(
        methods.training_attack(config.attack), loss=lambda z, y: 2 * losses.cross_entropy(z, y)
    )
    return methods.AdversarialTraining(attack)


@dataclasses.dataclass(frozen=True)
class Weighted(methods.AdversarialTraining):
    weights: object = None


def create_unhashable(config):
    return Weighted(methods.training_attack(config.attack), weights=[1.0, 2.0])


class Sharp(methods.AdversarialTraining):
    def gradient_points(self, forward, params, batch_stats, batch):
        return params, jax.tree.map(lambda w: 1.01 * w, params)


def create_sharp(config):
    return Sharp(methods.training_attack(config.attack))


def own(function, **awp):
    values = recipe("digits", "at", "paper")
    values.method = f"{__name__}:{function}"
    values.awp.update(awp)
    return from_config_dict(values)


def test_a_method_of_your_own():
    expected = TRADES(DIGITS_ATTACK, beta=7.0)
    assert methods.from_config(own("create_own")) == expected
    perturbed = methods.from_config(own("create_own", enabled=True, gamma=0.02))
    assert perturbed == AdversarialWeightPerturbation(expected, gamma=0.02)


def test_a_method_of_your_own_is_the_same_in_every_epoch():
    """Else every epoch would compile the step again."""
    config = own("create_unequal")
    assert create_unequal(config) != create_unequal(config)
    assert methods.from_config(config, 0) is methods.from_config(config, 1)
    assert methods.from_config(own("create_unequal"), 2) is methods.from_config(config, 1)
    assert methods.from_config(dataclasses.replace(config, seed=1)) != methods.from_config(config)


def test_what_awp_cannot_heed_is_refused():
    assert methods.from_config(own("create_sharp")) == create_sharp(own("create_sharp"))
    with pytest.raises(ConfigError, match=r"config\.awp\.enabled: Sharp says itself where"):
        methods.from_config(own("create_sharp", enabled=True))
    with pytest.raises(ValueError, match=r"label_smoothing \(0\.1\) belongs to the method"):
        AdversarialWeightPerturbation(AT, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:create", "cannot import 'no_such_module:create': No module named"),
        (f"{__name__}.within:create", "cannot import .* is not a package"),
        (f"{__name__}:create_other", "cannot import .* has no attribute 'create_other'"),
        (f"{__name__}:create_nothing", r"must return an agr_jax\.methods\.Method, got NoneType"),
        (f"{__name__}:create_unhashable", r"returns cannot be hashed \(unhashable type: 'list'"),
        ("builtins:str", r"builtins:str must return an agr_jax\.methods\.Method, got str"),
    ],
)
def test_wrong_methods_of_your_own_are_refused(name, message):
    values = recipe("digits", "at", "paper")
    values.method = name
    with pytest.raises(ConfigError, match=rf"config\.method: .*{message}"):
        methods.from_config(from_config_dict(values))
