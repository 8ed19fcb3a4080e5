"""What would look like robustness without being it: each is attacked rightly, said, or refused."""

import dataclasses
import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec

from agr_jax import losses, methods, models
from agr_jax.attacks import (
    EvaluationWarning,
    apgd,
    autoattack,
    cw_inf,
    cw_l2,
    fab,
    fgsm,
    mim,
    pgd,
    spsa,
    square,
)
from agr_jax.config import AttackConfig
from agr_jax.sharding import data_mesh, replicated
from agr_jax.threat import L1, L2, Linf, image_keys

KEY = jax.random.key(0)
LINF, BALL = Linf(0.1), L2(0.5)
GRADIENT_ATTACKS = {
    "fgsm": fgsm(LINF),
    "pgd": pgd(LINF, steps=3),
    "restarts": pgd(LINF, steps=2, restarts=2),
    "mim": mim(LINF, steps=3),
    "cw_inf": cw_inf(LINF, steps=3),
    "apgd": apgd(LINF, steps=5),
    "apgd targets": apgd(LINF, targets=2, steps=5),
    "fab": fab(LINF, targets=2, steps=3),
    "fab of all": fab(LINF, targets=0, steps=3),
    "cw_l2": cw_l2(BALL, steps=5, searches=2),
}
ATTACKS = {
    **GRADIENT_ATTACKS,
    "spsa": spsa(LINF, steps=2, samples=8),
    "square": square(LINF, queries=10),
}
by_attack = pytest.mark.parametrize("name", ATTACKS)


def images_of(*shape, seed=1):
    return jax.random.uniform(jax.random.key(seed), shape)


def linear(weights, x):
    return (x.reshape(len(x), -1) - 0.5) @ weights


@pytest.fixture(scope="module")
def network():
    weights = jax.random.normal(jax.random.key(2), (16, 5)) / 4
    return jax.tree_util.Partial(linear, weights)


# ---- what a network returns


@by_attack
def test_one_logit_is_refused_with_the_way_out(name):
    images, labels = images_of(4, 2, 2, 3), jnp.array([0, 1, 0, 1])
    one = jax.tree_util.Partial(linear, jnp.ones((12, 1)))
    with pytest.raises(ValueError, match=r"two logits \[0, z\]"):
        ATTACKS[name](one, images, labels, KEY)


def test_the_way_out_for_one_logit_attacks_both_classes():
    weights = jax.random.normal(jax.random.key(5), (12, 1))
    images = images_of(64, 2, 2, 3)

    def two(x):
        z = linear(weights, x)
        return jnp.concatenate([jnp.zeros_like(z), z], axis=1)

    labels = two(images).argmax(1)
    adversarial = pgd(Linf(0.2))(two, images, labels, KEY)
    moved = 0.2 * jnp.abs(weights).sum()  # at most, by the box
    robust = two(adversarial).argmax(1) == labels
    certain = jnp.abs(linear(weights, images)[:, 0]) > moved
    assert set(np.unique(labels)) == {0, 1}
    assert bool(robust[certain].all())
    assert float(robust.mean()) < 0.15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: (z, z), "got a tuple: pass a function that returns the logits alone"),
        (lambda z: {"logits": z}, "got a dict"),
        (lambda z: z[:2], r"got shape \(2, 5\) for 3 images"),
        (lambda z: z[:, :, None], r"got shape \(3, 5, 1\)"),
        (lambda z: z.argmax(1), r"one for each image, shape \(3,\)"),
        (lambda z: jnp.round(z).astype(int), "got dtype int32"),
    ],
)
@pytest.mark.parametrize("name", ["fgsm", "apgd", "fab", "square", "spsa", "autoattack"])
def test_other_outputs_are_refused(network, name, change, message):
    attacks = {**ATTACKS, "autoattack": autoattack(LINF, version="fast")}
    with pytest.raises(ValueError, match=message):
        attacks[name](lambda x: change(network(x)), images_of(3, 4, 4, 1), jnp.arange(3), KEY)


@pytest.mark.parametrize("make", [fgsm, pgd, apgd, spsa])
def test_a_loss_that_is_a_mean_is_refused(network, make):
    attack = make(LINF, loss=lambda z, y: losses.cross_entropy(z, y).mean())
    with pytest.raises(ValueError, match=r"\.loss must return one value for each image.*its mean"):
        attack(network, images_of(3, 4, 4, 1), jnp.arange(3), KEY)


def test_pixels_of_bytes_are_refused(network):
    pixels = np.full([2, 4, 4, 1], 200, np.uint8)
    for attack in (fgsm(LINF), autoattack(LINF, version="fast")):
        with pytest.raises(ValueError, match=r"dtype uint8; divide (pixels )?by 255"):
            attack(network, pixels, np.arange(2), KEY)
    model = models.PreActResNet(2, blocks=(1,), width=4)
    variables = jax.jit(model.init)(KEY, jnp.zeros((1, 4, 4, 1)))
    with pytest.raises(ValueError, match="dtype uint8; divide pixels by 255"):
        models.Classifier(model, variables)(jnp.asarray(pixels))


@pytest.mark.parametrize("threat", [Linf(8), L2(128), L1(2000)], ids=str)
@pytest.mark.parametrize("make", [pgd, apgd, lambda t: autoattack(t, version="fast")])
def test_a_radius_in_pixels_is_said(network, threat, make):
    with pytest.warns(EvaluationWarning, match="covers the whole box.* divided by 255"):
        make(threat)(network, images_of(3, 4, 4, 1), jnp.arange(3), KEY)


@pytest.mark.parametrize("key", [0, 1.5, np.zeros(3), np.zeros(2, np.int32), None, "seed"])
def test_what_is_no_key_is_refused(network, key):
    images, labels = images_of(2, 4, 4, 1), jnp.arange(2)
    for attack in (pgd(LINF), apgd(LINF), square(LINF), autoattack(LINF, version="fast")):
        with pytest.raises(ValueError, match="key must be one key"):
            attack(network, images, labels, key)


# ---- gradients that say nothing


def stopped(network):
    return lambda x: network(jax.lax.stop_gradient(x)) + 0 * x.mean()


@pytest.mark.parametrize("name", GRADIENT_ATTACKS)
def test_a_zero_gradient_is_counted(network, name):
    images = images_of(6, 4, 4, 1)
    labels = network(images).argmax(1)
    with pytest.warns(EvaluationWarning, match=r"zero for 6 of 6 images.*square") as found:
        GRADIENT_ATTACKS[name](stopped(network), images, labels, KEY)
    assert found[0].filename == __file__  # where it was called

    def halved(x):  # blind in the dark
        dark = x.mean((1, 2, 3)) < 0.3
        return jnp.where(dark[:, None], stopped(network)(x), network(x))

    images = images.at[:2].multiply(0.2).at[2:].set(0.5 + 0.5 * images[2:])
    labels = halved(images).argmax(1)
    with pytest.warns(EvaluationWarning, match=r"zero for 2 of 6 images"):
        GRADIENT_ATTACKS[name](halved, images, labels, KEY)


def test_a_flat_estimate_is_counted(network):
    images = images_of(3, 4, 4, 1)

    def quantised(x):
        return network(jnp.round(x))

    with pytest.warns(EvaluationWarning, match="SPSA.* zero for [1-3] of 3"):
        spsa(LINF, steps=1, samples=2, delta=1e-4)(quantised, images, jnp.arange(3), KEY)


@pytest.mark.parametrize("name", GRADIENT_ATTACKS)
def test_nothing_is_said_of_a_network_that_can_be_seen(network, name):
    images = images_of(6, 4, 4, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GRADIENT_ATTACKS[name](network, images, network(images).argmax(1), KEY)
        # Within `jit` nothing is known of values.
        attack = functools.partial(GRADIENT_ATTACKS[name], stopped(network))
        jax.jit(attack)(images, network(images).argmax(1), KEY)


# ---- saturation


@functools.cache
def trained():
    """A network of two layers, with large margins on what it was trained on."""
    k = jax.random.split(jax.random.key(0), 4)
    labels = jax.random.randint(k[1], (256,), 0, 10)
    centres = jax.random.uniform(k[0], (10, 8, 8, 1))[labels]
    noise = jax.random.uniform(k[2], (256, 8, 8, 1)) - 0.5
    images = jnp.clip(centres * 0.5 + 0.25 + 0.25 * noise, 0, 1)
    weights = [
        jax.random.normal(k[3], (64, 128)) / 8,
        jnp.zeros((1, 128)),
        jax.random.normal(k[0], (128, 10)) * 0.05,
        jnp.zeros((1, 10)),
    ]

    def logits_fn(weights, x):
        hidden = jax.nn.relu((x.reshape(len(x), -1) - 0.5) @ weights[0] + weights[1])
        return hidden @ weights[2] + weights[3]

    @jax.jit
    def train(weights):
        def step(weights, _):
            loss = lambda w: losses.cross_entropy(logits_fn(w, images), labels).mean()  # noqa: E731
            return [w - 0.5 * g for w, g in zip(weights, jax.grad(loss)(weights), strict=True)], 0

        return jax.lax.scan(step, weights, None, length=600)[0]

    return train(weights), logits_fn, images, labels


IN_TRAINING = AttackConfig("linf", 0.16, 0.04, 10, "cross_entropy", True, 0.0, True)
SATURATING = {
    "fgsm": fgsm(Linf(0.16)),
    "mim": mim(Linf(0.16)),
    "pgd": pgd(Linf(0.16), steps=10, step_size=0.04),
    "pgd L2": pgd(L2(1.0), steps=10),
    "pgd L1": pgd(L1(20.0), steps=10),
    "targeted": pgd(Linf(0.16), steps=10, targeted=True),
    "apgd": apgd(Linf(0.16), steps=10),
    "apgd L2": apgd(L2(1.0), steps=10),
    "apgd L1": apgd(L1(20.0), steps=10),
    "spsa": spsa(Linf(0.16), steps=4, samples=32, learning_rate=0.05, loss=losses.cross_entropy),
    "training": methods.training_attack(IN_TRAINING),
    "validation": methods.validation_attack(IN_TRAINING),
}


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("pgd", "apgd", "mim", "training")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in SATURATING
    ],
)
def test_multiplied_logits_have_the_same_verdicts(name):
    counts = {}
    weights, logits_fn, images, labels = trained()
    for scale in (1.0, 3.0, 6.0, 100.0):  # which changes no decision
        network = jax.tree_util.Partial(
            lambda scale, w, x: scale * logits_fn(w, x), jnp.float32(scale), weights
        )
        asked = (labels + 1) % 10 if name == "targeted" else labels
        adversarial = SATURATING[name](network, images, asked, KEY)
        reached = network(adversarial).argmax(1) == asked
        counts[scale] = int((~reached if name == "targeted" else reached).sum())
    # Draws and steps are the same. Larger logits weigh the likeliest of the wrong classes more,
    # which may help, but no attack is weaker.
    assert max(counts.values()) <= counts[1.0] + 3, counts
    assert counts[1.0] < 0.95 * 256


def test_log_odds_are_those_of_the_cross_entropy():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 7)) * 4, rng.integers(0, 7, 50)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    p = probabilities[np.arange(50), labels]
    found = losses.log_odds(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
    np.testing.assert_allclose(found, np.log1p(-p) - np.log(p), rtol=2e-4, atol=2e-4)
    # The gradient never fades, and its entries sum to 0.
    far = jnp.array([[500.0, 0.0, 1.0]])
    gradient = jax.grad(lambda z: losses.log_odds(z, jnp.array([0]))[0])(far)
    np.testing.assert_allclose(gradient, [[-1.0, 0.2689414, 0.7310586]], rtol=1e-5)
    faded = jax.grad(lambda z: losses.cross_entropy(z, jnp.array([0]))[0])(far)
    assert not np.asarray(faded).any()


def test_draws_of_a_saturated_network_are_weighted_as_the_mean_cross_entropy_is():
    """In float32 at margins where every draw's cross-entropy has no gradient."""
    images = jnp.full((1, 1, 1, 2), 0.5)
    directions = jnp.array([[1.0, 0.2], [0.1, 1.0]])

    def logits(x, which, offset):
        margin = 200 * (x.reshape(1, 2) @ directions[which]) + offset[which]
        return jnp.stack([margin, jnp.zeros_like(margin)], 1)

    def randomised(x, key):
        return logits(x, jax.random.bernoulli(key).astype(int), jnp.array([100.0, 130.0]))

    attack = pgd(L2(0.01), steps=1, step_size=0.01, random_start=False, draws=16)
    moved = (attack(randomised, images, jnp.array([0]), KEY) - images).ravel()
    # The draw of the smaller margin has all of the weight: exp(-220) against exp(-240).
    expected = -0.01 * directions[0] / jnp.linalg.norm(directions[0])
    np.testing.assert_allclose(moved, expected, atol=1e-6)


# ---- short gradients


@pytest.mark.parametrize("size", [1.0, 1e-13, 1e-20, 1e-30, 1e-36])
@pytest.mark.parametrize("threat", [L2(1.0), L1(1.0, sparsity=None), L1(1.0), Linf(1.0)], ids=str)
def test_a_step_is_of_unit_length(threat, size):
    gradient = size * jax.random.normal(KEY, (3, 4, 4, 2))
    step = threat.ascent(gradient)
    np.testing.assert_allclose(threat.distance(step, jnp.zeros_like(step)), 1, rtol=1e-5)
    np.testing.assert_allclose(step, threat.ascent(gradient / size), atol=1e-5)
    assert not np.asarray(threat.ascent(jnp.zeros_like(gradient))).any()


@pytest.mark.parametrize("threat", [LINF, BALL, L1(2.0)], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        pgd,
        lambda t: mim(t, steps=3),
        functools.partial(apgd, steps=20),
        functools.partial(fab, targets=2, steps=20),
        functools.partial(fab, targets=0, steps=20),
    ],
    ids=["pgd", "mim", "apgd", "fab", "fab of all"],
)
def test_the_scale_of_the_logits_does_not_matter(network, threat, make):
    images = images_of(32, 4, 4, 1)
    labels = network(images).argmax(1)
    robust = []
    for scale in (1.0, 1e-12, 1e-20):
        scaled = jax.tree_util.Partial(
            lambda scale, net, x: scale * net(x), jnp.float32(scale), network
        )
        adversarial = make(threat)(scaled, images, labels, KEY)
        robust.append(int((network(adversarial).argmax(1) == labels).sum()))
    assert robust[0] < 30
    assert max(robust) - min(robust) <= 1, robust


# ---- ties


def test_a_tie_is_decided_by_the_prediction():
    """Square goes on at a tie that is predicted rightly, and stops at one that is not."""
    images = jnp.full((2, 4, 4, 1), 0.5)
    labels = jnp.array([0, 1])

    def tied(x):  # until the mean brightness has risen, both are equal
        bright = jnp.where(x.mean((1, 2, 3)) > 0.55, 1.0, 0.0)
        return jnp.stack([jnp.ones(len(x)), jnp.ones(len(x)) + bright, 0 * bright, 0 * bright], 1)

    assert tied(images).argmax(1).tolist() == [0, 0]
    adversarial = square(Linf(0.1), queries=300)(tied, images, labels, KEY)
    assert tied(adversarial).argmax(1).tolist()[0] == 1
    np.testing.assert_array_equal(adversarial[1], images[1])  # misclassified without an attack


@pytest.mark.slow
def test_quantised_heads_have_the_verdicts_of_their_predictions():
    weights = jax.random.normal(KEY, (36, 5)) / 3
    images = images_of(64, 6, 6, 1)

    def rounded(x):
        return jnp.round(20 * linear(weights, x)) / 20

    def untied(x):  # the same predictions
        return rounded(x) - 1e-4 * jnp.arange(5.0)[None]

    labels = rounded(images).argmax(1)
    np.testing.assert_array_equal(untied(images).argmax(1), labels)
    left = [
        int((rounded(square(Linf(0.05), queries=800)(each, images, labels, KEY)).argmax(1)
             == labels).sum())
        for each in (rounded, untied)
    ]  # fmt: skip
    assert abs(left[0] - left[1]) <= 4, left


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_dlr_has_a_bounded_gradient_at_ties(scale):
    """All ways in which four logits can tie, with any of them as the label and the target."""
    ties = [
        ([*values, -1.0], *classes)
        for values in itertools.product((0.0, 1.0), repeat=4)
        for classes in itertools.permutations(range(5), 2)
    ]
    logits, labels, targets = (jnp.array(each) for each in zip(*ties, strict=True))
    logits, bound = scale * logits, 4 / (scale * jnp.finfo(jnp.float32).eps)
    for loss in (losses.dlr, lambda z, y: losses.targeted_dlr(z, y, targets)):
        gradient = jax.grad(lambda z, loss=loss: loss(z, labels).sum())(logits)
        assert float(jnp.abs(gradient).max()) <= bound
        untied = jnp.sort(logits, 1)
        clear = np.asarray(untied[:, -1] - untied[:, -3]) > 0.5 * scale
        assert float(jnp.abs(gradient)[clear].max()) <= 8 / scale


# ---- batches


def train_mode(x):
    """BatchNorm in training mode."""
    normalised = (x - x.mean(0, keepdims=True)) / (x.std(0, keepdims=True) + 1e-3)
    return linear(jax.random.normal(KEY, (16, 5)), normalised + 0.5)


def dropout_by_place(x):
    """Dropout with one key: what is dropped is a matter of an image's place in the batch."""
    kept = jax.random.bernoulli(KEY, 0.5, x.shape)
    return linear(jax.random.normal(KEY, (16, 5)), jnp.where(kept, x, 0.5))


@pytest.mark.parametrize("network", [train_mode, dropout_by_place])
def test_a_network_that_depends_on_the_batch_is_said(network):
    images, labels = images_of(6, 4, 4, 1), jnp.arange(6) % 5
    with pytest.raises(ValueError, match=r"other images of its batch, or on its place"):
        autoattack(LINF).evaluate(network, images, labels, KEY, progress=False)
    for attack in (pgd(LINF, steps=2), apgd(LINF, steps=3), square(LINF, queries=5)):
        for _ in range(2):  # looked at once, said each time
            with pytest.warns(EvaluationWarning, match="evaluation mode.*train=False"):
                attack(network, images, labels, KEY)


@pytest.mark.parametrize(
    "kind",
    ["rbg", *(pytest.param(k, marks=pytest.mark.slow) for k in ("unsafe_rbg", "threefry2x32"))],
)
def test_draws_do_not_depend_on_the_batch_for_any_kind_of_key(network, kind):
    key = jax.random.key(3, impl=kind)
    images = images_of(6, 4, 4, 1)
    labels = network(images).argmax(1)
    keys = image_keys(key, 6)
    for attack in (pgd(BALL, steps=2), square(LINF, queries=20), spsa(LINF, steps=2, samples=4)):
        together = attack(network, images, labels, key)
        alone = [
            attack(network, images[i : i + 2], labels[i : i + 2], keys[i : i + 2])
            for i in (0, 2, 4)
        ]
        np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-6)
    own = jax.random.split(key, 6)
    together = pgd(BALL, steps=2)(network, images, labels, own)
    alone = pgd(BALL, steps=2)(network, images[3:5], labels[3:5], own[3:5])
    np.testing.assert_allclose(together[3:5], alone, atol=1e-6)
    raw = pgd(BALL, steps=2)(network, images, labels, jax.random.key_data(key))
    if kind != "unsafe_rbg":  # which has the same words
        np.testing.assert_allclose(raw, pgd(BALL, steps=2)(network, images, labels, key))


@pytest.mark.slow
def test_one_unlucky_draw_loses_no_image():
    """A network that nothing moves, wrong in 20 % of its draws."""
    images, labels = images_of(60, 4, 4, 1), jnp.zeros(60, int)

    def randomised(x, key):
        wrong = jax.random.bernoulli(key, 0.2, (len(x),))
        return jax.nn.one_hot(jnp.where(wrong, 1, 0), 5) + 0 * x.mean((1, 2, 3))[:, None]

    def evaluate(**settings):
        with warnings.catch_warnings():  # it has no gradient, which is said
            warnings.simplefilter("ignore", EvaluationWarning)
            attack = autoattack(LINF, version="rand", **settings)
            return attack.evaluate(randomised, images, labels, KEY, progress=False)

    result = evaluate()
    assert result.robust_accuracy >= 0.98
    assert abs(result.one_draw - 0.8) < 0.05
    assert result.as_dict()["verdict_draws"] == 20
    assert "one draw" in str(result)
    published = evaluate(verdict_draws=1)
    assert 0.3 < published.robust_accuracy < 0.75  # 0.8 three times over


# ---- layouts, devices, radii


@pytest.mark.slow
def test_layouts_that_square_cannot_search(network):
    calls = []

    def flat_network(x):
        calls.append(x.shape)
        return network(x)

    for images in (images_of(3, 16), images_of(3, 4, 4)):
        with pytest.raises(ValueError, match=r"Square needs .*attacks=\(\"apgd-ce\""):
            autoattack(LINF)(flat_network, images, jnp.arange(3), KEY)
        assert not calls  # before any work
        autoattack(LINF, version="fast")(network, images, jnp.arange(3), KEY)
    channels_first = images_of(3, 1, 8, 8)
    weights = jax.random.normal(KEY, (64, 5))
    with pytest.raises(ValueError, match="channels first"):
        autoattack(LINF)(functools.partial(linear, weights), channels_first, jnp.arange(3), KEY)
    fast = autoattack(LINF, version="fast")
    fast(functools.partial(linear, weights), channels_first, jnp.arange(3), KEY)


@by_attack
def test_within_shard_map_as_it_is_by_default(network, name):
    mesh = Mesh(np.array(jax.devices()[:2]), ("rows",))
    images = images_of(4, 4, 4, 1)
    labels = network(images).argmax(1)
    keys = jax.random.split(KEY, 4)
    attack = ATTACKS[name]
    if name == "square":
        pytest.skip("each device's loop ends by itself")
    rows = PartitionSpec("rows")
    split = jax.shard_map(
        functools.partial(attack, network), mesh=mesh, in_specs=rows, out_specs=rows
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EvaluationWarning)
        expected = attack(network, images, labels, keys)
    np.testing.assert_allclose(jax.jit(split)(images, labels, keys), expected, atol=1e-5)


class FlaxConvolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), (2, 2))(x))
        return nn.Dense(5)(x.mean((1, 2)))


def test_foreign_convolutions_within_shard_map():
    """There they are rewritten too."""
    model, images = FlaxConvolutions(), images_of(4, 8, 8, 1)
    variables = jax.jit(model.init)(KEY, images)
    network = functools.partial(model.apply, variables)
    labels, rows = network(images).argmax(1), PartitionSpec("rows")
    keys, attack = jax.random.split(KEY, 4), pgd(LINF, steps=3, restarts=2)
    split = jax.shard_map(
        functools.partial(attack, network),
        mesh=Mesh(np.array(jax.devices()[:2]), ("rows",)),
        in_specs=rows,
        out_specs=rows,
    )
    expected = attack(network, images, labels, keys)
    np.testing.assert_allclose(jax.jit(split)(images, labels, keys), expected, atol=1e-5)


@pytest.mark.parametrize(
    "norm", [Linf, *(pytest.param(norm, marks=pytest.mark.slow) for norm in (L2, L1))]
)
def test_a_radius_may_be_an_argument(network, norm, compilations):
    images = images_of(4, 4, 4, 1)
    labels = network(images).argmax(1)
    makers = {
        "pgd": lambda t: pgd(t, steps=3),
        "mim": lambda t: mim(t, steps=3),
        "fgsm": fgsm,
        "apgd": lambda t: apgd(t, steps=5),
        "fab": lambda t: fab(t, targets=2, steps=3),
        "square": lambda t: square(t, queries=10),
        "spsa": lambda t: spsa(t, steps=2, samples=4),
    }
    for name, make in makers.items():
        traced = jax.jit(lambda r, make=make: make(norm(r))(network, images, labels, KEY))
        for radius in (0.1, 0.3):
            outside = make(norm(radius))(network, images, labels, KEY)
            np.testing.assert_allclose(traced(radius), outside, atol=1e-5, err_msg=name)
        compilations.clear()
        make(norm(0.2))(network, images, labels, KEY)
        assert not compilations, name


@pytest.mark.slow
def test_devices_of_the_callers_own(network):
    images = images_of(10, 4, 4, 1)
    labels = network(images).argmax(1)
    attack = autoattack(LINF, version="fast", batch_size=4)

    def evaluate(on):
        return attack.evaluate(network, images, labels, KEY, progress=False, on=on).robust

    devices = jax.devices()[:2]
    own = jax.make_mesh((2,), ("batch",), devices=devices)
    expected = evaluate(None)
    for on in (devices, own, Mesh(np.array(devices)[:, None], ("a", "b"))):
        np.testing.assert_array_equal(evaluate(on), expected)
    # Weights that lie on the devices already, as those of a run do.
    placed = data_mesh(devices)
    network = jax.device_put(network, replicated(placed))
    np.testing.assert_array_equal(evaluate(placed), expected)


# ---- distances


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_points_of_a_distance_are_misclassified_at_a_second_look(seed):
    """Also by a program of another order of sums."""
    k = jax.random.split(jax.random.key(seed), 3)
    hidden, out = jax.random.normal(k[0], (108, 32)) / 10, jax.random.normal(k[1], (32, 10)) / 3
    images = images_of(64, 6, 6, 3, seed=seed)

    def network(x):
        return jax.nn.relu((x.reshape(len(x), -1) - 0.5) @ hidden) @ out

    labels = network(images).argmax(1)
    found = [
        fab(L2(0.5), targets=1, steps=60).nearest(network, images, labels, KEY),
        fab(LINF, targets=0, steps=20).nearest(network, images, labels, KEY),
        cw_l2(L2(0.5), steps=60, searches=4).nearest(network, images, labels),
    ]
    for points, distance in found:
        reached = np.isfinite(distance)
        assert reached.sum() > 40
        for look in (network, jax.jit(network)):
            assert (look(points).argmax(1) != labels)[reached].all()
        alone = jnp.concatenate([network(points[i : i + 1]) for i in range(8)])
        assert (alone.argmax(1) != labels[:8])[reached[:8]].all()


def test_settings_are_compared_as_before():
    """What an attack is did not change with how it is called."""
    assert pgd(LINF) == pgd(Linf(0.1))
    assert hash(pgd(LINF)) == hash(pgd(Linf(0.1)))
    assert dataclasses.replace(pgd(LINF), steps=3).steps == 3
