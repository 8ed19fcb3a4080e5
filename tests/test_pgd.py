"""PGD and FGSM: closed forms on linear networks, and the contract of an attack."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agr_jax import losses, models
from agr_jax.attacks import fgsm, mim, pgd
from agr_jax.threat import L1, L2, Linf

SHAPE = (5, 4, 3, 2)
PIXELS = 24
THREATS = [Linf(0.1), L2(0.3), L1(1.0, sparsity=0.75), L1(1.0, sparsity=None)]
by_threat = pytest.mark.parametrize("threat", THREATS, ids=str)


@pytest.fixture(scope="module")
def weights():
    """Of a linear classifier with two classes."""
    return jnp.asarray(np.random.default_rng(0).normal(size=(PIXELS, 2)), jnp.float32)


@pytest.fixture(scope="module")
def linear(weights):
    return lambda images: images.reshape(len(images), -1) @ weights


@pytest.fixture(scope="module")
def images():
    """In [0, 1], with many pixels on the border."""
    values = np.random.default_rng(1).uniform(-0.5, 1.5, size=SHAPE)
    values[2, 0] = 0.98
    return jnp.asarray(np.clip(values, 0, 1), jnp.float32)


@pytest.fixture(scope="module")
def inner_images():
    """So far from the border that no ball reaches it."""
    return jnp.asarray(np.random.default_rng(2).uniform(0.4, 0.6, size=SHAPE), jnp.float32)


LABELS = jnp.asarray([0, 1, 0, 1, 1])
KEY = jax.random.key(0)


def slope(weights):
    """Gradient of the margin of every example, [batch, pixels]."""
    difference = np.asarray(weights[:, 1] - weights[:, 0])
    return np.where(np.asarray(LABELS)[:, None] == 0, difference, -difference)


def gain(linear, images, adversarial):
    """By how much the attack raised the margin."""
    margin = losses.margin
    return margin(linear(adversarial), LABELS) - margin(linear(images), LABELS)


# ---- closed forms: the largest margin in the ball is the dual norm of its slope times epsilon


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.margin])
def test_linf_reaches_the_maximum(linear, weights, inner_images, random_start, loss):
    attack = pgd(Linf(0.1), steps=10, random_start=random_start, loss=loss)
    got = gain(linear, inner_images, attack(linear, inner_images, LABELS, KEY))
    np.testing.assert_allclose(got, 0.1 * np.abs(slope(weights)).sum(1), rtol=1e-4)


def test_linf_reaches_the_maximum_inside_the_box(linear, weights, images):
    adversarial = pgd(Linf(0.1), steps=10)(linear, images, LABELS, KEY)
    direction = np.sign(slope(weights)).reshape(SHAPE)
    np.testing.assert_allclose(adversarial, np.clip(images + 0.1 * direction, 0, 1), atol=1e-6)


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.margin])
def test_targeted_reaches_the_class(inner_images, loss):
    """Each of three classes of a linear network, at the corner of the ball that favours it."""
    weights = jnp.eye(3, PIXELS).T  # each class has a pixel of its own
    logits_fn = jax.tree_util.Partial(lambda w, x: 20 * x.reshape(len(x), -1) @ w, weights)
    attack = pgd(Linf(0.2), steps=10, loss=loss, targeted=True)
    for target in range(3):
        targets = jnp.full(len(inner_images), target)
        adversarial = attack(logits_fn, inner_images, targets, KEY)
        assert logits_fn(adversarial).argmax(1).tolist() == targets.tolist()
        moved = (adversarial - inner_images).reshape(len(inner_images), -1)
        np.testing.assert_allclose(moved[:, target], 0.2, atol=1e-6)
        if loss is losses.cross_entropy:  # which lowers both other classes
            others = np.delete(np.asarray(moved[:, :3]), target, axis=1)
            np.testing.assert_allclose(others, -0.2, atol=1e-6)


@pytest.mark.parametrize("random_start", [False, True])
def test_l2_reaches_the_maximum(linear, weights, inner_images, random_start):
    # Each step turns the perturbation towards the slope; 60 steps leave less than 1e-4.
    attack = pgd(L2(0.3), steps=60, step_size=0.1, random_start=random_start)
    got = gain(linear, inner_images, attack(linear, inner_images, LABELS, KEY))
    np.testing.assert_allclose(got, 0.3 * np.linalg.norm(slope(weights), axis=1), rtol=1e-4)


def test_l1_moves_the_steepest_pixel(linear, weights, inner_images):
    attack = pgd(L1(0.3, sparsity=0.99), steps=10, random_start=False)
    adversarial = attack(linear, inner_images, LABELS, KEY)
    got = gain(linear, inner_images, adversarial)
    np.testing.assert_allclose(got, 0.3 * np.abs(slope(weights)).max(1), rtol=1e-4)
    changed = np.abs(adversarial - inner_images).reshape(5, -1) > 1e-6
    np.testing.assert_array_equal(changed.sum(1), 1)


def test_the_dense_l1_step_is_weaker(linear, weights, inner_images):
    attack = pgd(L1(0.3, sparsity=None), steps=1, step_size=0.3, random_start=False)
    got = gain(linear, inner_images, attack(linear, inner_images, LABELS, KEY))
    steep = slope(weights)
    expected = 0.3 * (steep**2).sum(1) / np.abs(steep).sum(1)
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    assert (expected < 0.3 * np.abs(steep).max(1)).all()


def test_fgsm(linear, weights, images):
    adversarial = fgsm(Linf(0.1))(linear, images, LABELS, KEY)
    direction = np.sign(slope(weights)).reshape(SHAPE)
    np.testing.assert_allclose(adversarial, np.clip(images + 0.1 * direction, 0, 1), atol=1e-6)
    assert fgsm(Linf(0.0))(linear, images, LABELS, KEY) is images


def test_step_size_and_number_of_steps(linear, inner_images):
    # Three steps of 0.01 from the image are 0.03 away; the default is 2.5 epsilon over the steps.
    near = pgd(Linf(0.1), steps=3, step_size=0.01, random_start=False)
    adversarial = near(linear, inner_images, LABELS, KEY)
    np.testing.assert_allclose(np.abs(adversarial - inner_images), 0.03, atol=1e-6)
    one = dataclasses.replace(pgd(Linf(0.1), steps=5), random_start=False)
    explicit = dataclasses.replace(one, step_size=0.05)
    np.testing.assert_array_equal(
        one(linear, inner_images, LABELS, KEY), explicit(linear, inner_images, LABELS, KEY)
    )


# ---- the contract


@by_threat
@pytest.mark.parametrize("box_every_step", [True, False])
def test_stays_in_ball_and_box(linear, images, threat, box_every_step):
    attack = pgd(threat, steps=5, box_every_step=box_every_step)
    adversarial = attack(linear, images, LABELS, KEY)
    assert adversarial.dtype == images.dtype
    assert adversarial.shape == images.shape
    assert float(adversarial.min()) >= 0
    assert float(adversarial.max()) <= 1
    # Rounding of x + u - x, 6e-8 a pixel.
    assert (threat.distance(adversarial, images) <= threat.epsilon + 2e-6).all()
    assert (gain(linear, images, adversarial) > 0).all()


def test_the_box_matters_only_at_the_border(images, inner_images):
    # The loss rises with every pixel up to 1.005, outside the box, and falls beyond it.
    def kinked(points):
        flat = points.reshape(len(points), -1)
        return jnp.stack([jnp.zeros(len(flat)), -jnp.abs(flat - 1.005).sum(1)], axis=1)

    def run(points, **options):
        attack = pgd(Linf(0.1), steps=6, step_size=0.04, random_start=False, **options)
        return attack(kinked, points, jnp.zeros(5, jnp.int32), KEY)

    clipped, free = run(images), run(images, box_every_step=False)
    # At 1 both end where they began; at 0.98 the clipped attack reaches 1 and stays, while the
    # other goes to 1.02 and back three times.
    bright = np.asarray(images == 1)
    assert bright.any()
    np.testing.assert_array_equal(clipped[bright], 1)
    np.testing.assert_allclose(free[bright], 1, atol=1e-6)
    near = np.asarray((images > 0.975) & (images < 0.995))
    assert near.any()
    np.testing.assert_array_equal(clipped[near], 1)
    np.testing.assert_allclose(free[near], images[near], atol=1e-6)
    assert float(free.min()) >= 0
    assert float(free.max()) <= 1
    assert (Linf(0.1).distance(free, images) <= 0.1 + 1e-6).all()
    np.testing.assert_array_equal(run(inner_images), run(inner_images, box_every_step=False))


def test_random_start(linear, inner_images):
    def run(key, **options):
        attack = pgd(Linf(0.1), steps=1, step_size=0.01, **options)
        return attack(linear, inner_images, LABELS, jax.random.key(key))

    assert not np.array_equal(run(0), run(1))
    np.testing.assert_array_equal(run(0), run(0))
    np.testing.assert_array_equal(run(0, random_start=False), run(1, random_start=False))


def test_from_start_continues_from_the_given_points(linear, inner_images):
    attack = pgd(Linf(0.1), steps=3, step_size=0.01)
    start = Linf(0.1).random_start(KEY, inner_images)
    given = attack.from_start(linear, inner_images, LABELS, start)
    np.testing.assert_allclose(attack(linear, inner_images, LABELS, KEY), given, atol=1e-7)
    from_image = attack.from_start(linear, inner_images, LABELS, inner_images)
    without = dataclasses.replace(attack, random_start=False)
    np.testing.assert_array_equal(without(linear, inner_images, LABELS, KEY), from_image)
    assert not np.array_equal(given, from_image)


@by_threat
def test_one_key_stands_for_one_per_image(linear, images, threat):
    attack = pgd(threat, steps=2, step_size=0.01)
    keys = jax.random.split(KEY, len(images))
    together = attack(linear, images, LABELS, keys)
    np.testing.assert_array_equal(attack(linear, images, LABELS, KEY), together)
    alone = [
        attack(linear, images[i : i + 1], LABELS[i : i + 1], keys[i : i + 1])[0] for i in range(5)
    ]
    # The products of a batch of one are added up in another order.
    np.testing.assert_allclose(together, np.stack(alone), rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="one key or one per image"):
        attack(linear, images, LABELS, keys[:3])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrow_floats_are_refused(linear, inner_images, dtype):
    """Their rounding moves a pixel by up to 6 % of 8/255, out of the ball."""
    for attack in (pgd(Linf(0.1)), fgsm(Linf(0.1))):
        with pytest.raises(ValueError, match=r"must be float32 or float64, got .*float16"):
            attack(linear, inner_images.astype(dtype), LABELS, KEY)


@pytest.mark.parametrize("bad", [-0.01, 1.01, float("nan"), float("inf")])
def test_values_outside_the_box_are_refused(linear, images, bad):
    broken = images.at[3, 1, 2, 0].set(bad)
    for attack in (pgd(Linf(0.1)), fgsm(Linf(0.1))):
        with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
            attack(linear, broken, LABELS, KEY)
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        pgd(Linf(0.1)).from_start(linear, broken, LABELS, images)


def test_other_dtypes_and_shapes_are_refused(linear, images):
    attack = pgd(Linf(0.1))
    with pytest.raises(ValueError, match=r"images must be floats in \[0, 1\], got dtype uint8"):
        attack(linear, (images * 255).astype(jnp.uint8), LABELS, KEY)
    with pytest.raises(ValueError, match="labels must be integers of shape"):
        attack(linear, images, LABELS.astype(jnp.float32), KEY)
    for labels in (LABELS[:4], LABELS[:, None], jax.nn.one_hot(LABELS, 2, dtype=jnp.int32)):
        with pytest.raises(ValueError, match=r"labels must be integers of shape \(5,\)"):
            attack(linear, images, labels, KEY)


@pytest.mark.parametrize(
    ("field", "value"), [("steps", 0), ("step_size", 0.0), ("step_size", -1.0)]
)
def test_settings_are_checked(field, value):
    with pytest.raises(ValueError, match=f"PGD.{field} must be"):
        pgd(Linf(0.1), **{field: value})


def test_works_inside_jit_and_passes_no_gradient(linear, images):
    attack = pgd(Linf(0.1), steps=2)
    traced = jax.jit(lambda x, y, k: attack(linear, x, y, k))
    plain = attack(linear, images, LABELS, KEY)
    np.testing.assert_allclose(traced(images, LABELS, KEY), plain, atol=1e-6)
    gradient = jax.grad(lambda x: attack(linear, x, LABELS, KEY).sum())(images)
    np.testing.assert_array_equal(gradient, 0)


# ---- plain functions and pytrees


def test_a_second_checkpoint_compiles_nothing(images, weights, compilations):
    def apply(variables, points):
        return points.reshape(len(points), -1) @ variables["w"]

    attack = pgd(Linf(0.1), steps=19)  # as no other test
    first = attack(jax.tree_util.Partial(apply, {"w": weights}), images, LABELS, KEY)
    assert compilations
    other = -weights
    compilations.clear()
    second = attack(jax.tree_util.Partial(apply, {"w": other}), images, LABELS, KEY)
    plain = attack(lambda points: apply({"w": weights}, points), images, LABELS, KEY)
    again = pgd(Linf(0.1), steps=19)(functools.partial(apply, {"w": weights}), images, LABELS, KEY)
    wider = pgd(Linf(0.2), steps=19)(functools.partial(apply, {"w": weights}), images, LABELS, KEY)
    assert not compilations
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, plain)
    np.testing.assert_array_equal(first, again)
    assert float(jnp.abs(wider - images).max()) > 0.15


def test_a_classifier_is_found_by_its_content(images, compilations):
    model = models.PreActResNet(2, blocks=(1,), width=4)
    checkpoints = [model.init(jax.random.key(seed), images) for seed in range(2)]
    attack = pgd(Linf(0.1), steps=2)
    results = [attack(models.Classifier(model, checkpoints[0]), images, LABELS, KEY)]
    compilations.clear()
    results.append(attack(models.Classifier(model, checkpoints[1]), images, LABELS, KEY))
    plain = attack(lambda points: model.apply(checkpoints[0], points), images, LABELS, KEY)
    assert not compilations
    assert not np.array_equal(*results)
    np.testing.assert_array_equal(plain, results[0])


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.3)], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_momentum_as_published(threat, momentum):
    """Algorithm 1 of Dong et al. in float64, with the gradient of a small network written out."""
    rng = np.random.default_rng(3)
    hidden, out = rng.normal(size=(PIXELS, 8)), 2 * rng.normal(size=(8, 2))
    images = rng.uniform(0, 1, SHAPE).astype(np.float32)
    clean = images.reshape(len(images), -1).astype(np.float64)
    labels, steps = np.asarray(LABELS), 7
    step_size = threat.epsilon / steps

    points, total = clean.copy(), np.zeros_like(clean)
    for _ in range(steps):
        features = np.tanh(points @ hidden)
        logits = features @ out
        softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        softmax[np.arange(len(labels)), labels] -= 1
        gradient = ((softmax @ out.T) * (1 - features**2)) @ hidden.T
        total = momentum * total + gradient / np.abs(gradient).sum(1, keepdims=True)
        if isinstance(threat, Linf):
            points = points + step_size * np.sign(total)
            points = np.clip(points, clean - threat.epsilon, clean + threat.epsilon)
        else:
            points = points + step_size * total / np.linalg.norm(total, axis=1, keepdims=True)
            moved = points - clean
            length = np.linalg.norm(moved, axis=1, keepdims=True)
            points = clean + moved * np.minimum(1, threat.epsilon / length)
        points = np.clip(points, 0, 1)

    weights = jnp.asarray(hidden, jnp.float32), jnp.asarray(out, jnp.float32)
    network = jax.tree_util.Partial(
        lambda w, x: jnp.tanh(x.reshape(len(x), -1) @ w[0]) @ w[1], weights
    )
    found = mim(threat, steps, momentum=momentum)(network, jnp.asarray(images), LABELS, KEY)
    np.testing.assert_allclose(np.asarray(found).reshape(clean.shape), points, atol=2e-6)


def test_momentum_changes_the_outcome_and_must_be_finite(weights, images):
    network = jax.tree_util.Partial(
        lambda w, x: jnp.sin(30 * x.reshape(len(x), -1) @ w),
        weights,  # whose gradient turns
    )
    plain, kept = (
        pgd(Linf(0.1), 10, 0.03, random_start=False, momentum=momentum)(
            network, images, LABELS, KEY
        )
        for momentum in (0.0, 1.0)
    )
    assert (np.asarray(plain) != np.asarray(kept)).any()
    with pytest.raises(ValueError, match=r"PGD\.momentum must be at least 0, got -1"):
        pgd(Linf(0.1), momentum=-1)


# ---- a randomised network


@pytest.fixture(scope="module")
def noisy(weights):
    """Each draw adds to the linear network noise of more than its own size."""

    def logits_fn(images, key):
        noise = 5 * jax.random.normal(key, weights.shape)
        return images.reshape(len(images), -1) @ (weights + noise)

    return logits_fn


def share_of_right_moves(weights, images, adversarial):
    """Where the slope of the mean network is clear, how often a pixel goes along it."""
    clear = np.abs(slope(weights)) > 0.5
    moved = np.asarray(adversarial - images).reshape(len(images), -1)
    return (np.sign(moved) == np.sign(slope(weights)))[clear].mean()


def test_draws_follow_the_mean_network(weights, noisy, inner_images):
    """The noise of a pixel's slope is 7: that of the mean of 2,500 draws 0.14."""
    attack = pgd(Linf(0.1), 1, 0.1, random_start=False, loss=losses.margin, draws=2500)
    adversarial = attack(noisy, inner_images, LABELS, KEY)
    np.testing.assert_allclose(np.abs(adversarial - inner_images), 0.1, atol=1e-6)
    assert share_of_right_moves(weights, inner_images, adversarial) == 1
    one = dataclasses.replace(attack, draws=1)
    shares = [
        share_of_right_moves(weights, inner_images, one(noisy, inner_images, LABELS, key))
        for key in jax.random.split(KEY, 8)
    ]
    assert 0.4 < np.mean(shares) < 0.75


def test_each_step_has_its_own_draws(weights, noisy, inner_images):
    """One draw repeated would be right as rarely as one step: 400 different ones average out."""
    attack = pgd(Linf(0.1), 400, 0.001, random_start=False, loss=losses.margin, draws=1)
    adversarial = attack(noisy, inner_images, LABELS, KEY)
    assert share_of_right_moves(weights, inner_images, adversarial) > 0.9


def test_no_key_is_drawn_from_twice(linear, inner_images):
    seen = []

    def recording(images, key):
        jax.debug.callback(lambda data: seen.append(tuple(data.tolist())), jax.random.key_data(key))
        return linear(images)

    jax.block_until_ready(
        pgd(Linf(0.1), steps=2, draws=3, restarts=2)(recording, inner_images, LABELS, KEY)
    )
    jax.effects_barrier()
    assert len(seen) == 2 * (2 * 3 + 1)  # and one that says whether the restart succeeded
    assert len(set(seen)) == len(seen)


@pytest.mark.slow
def test_draws_with_other_settings(noisy, inner_images):
    for fields in ({"targets": "clean_logits", "loss": losses.kl_divergence}, {"momentum": 1.0}):
        for restarts in (1, 2):
            attack = pgd(Linf(0.1), steps=2, draws=3, restarts=restarts, **fields)
            adversarial = attack(noisy, inner_images, LABELS, KEY)
            assert 0 < np.abs(adversarial - inner_images).max() <= 0.1 + 1e-6
    with pytest.raises(ValueError, match=r"from_start takes no key .* got 2"):
        pgd(Linf(0.1), draws=2).from_start(noisy, inner_images, LABELS, inner_images)
