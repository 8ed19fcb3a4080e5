"""What every attack promises: ball, box, shape, dtype, any batch, any number of classes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agr_jax import attacks, losses, methods, sharding
from agr_jax.attacks import (
    EvaluationWarning,
    apgd,
    autoattack,
    cw_inf,
    fab,
    fgsm,
    ifgsm,
    mim,
    pgd,
    spsa,
    square,
)
from agr_jax.threat import L1, L2, Linf

THREATS = {"Linf": Linf(0.06), "L2": L2(0.3), "L1": L1(2.0)}
ATTACKS = {
    "fgsm": fgsm,
    "ifgsm": ifgsm,
    "pgd": lambda threat: pgd(threat, steps=5),
    "restarts": lambda threat: pgd(threat, steps=3, restarts=3),
    "cw": lambda threat: cw_inf(threat, steps=5),
    "mim": lambda threat: mim(threat, steps=5),
    "apgd": lambda threat: apgd(threat, steps=12, restarts=2),
    "apgd-first": lambda threat: apgd(threat, steps=12, stop_when_fooled=True),
    "apgd-margin-targets": lambda threat: apgd(
        threat, loss=losses.targeted_margin, targets=9, steps=8
    ),
    "fab": lambda threat: fab(threat, targets=0, steps=8, restarts=2),
    "fab-t": lambda threat: fab(threat, steps=8),
    "square": lambda threat: square(threat, queries=60),
    "spsa": lambda threat: spsa(threat, steps=3, samples=10, directions_at_once=3),
}
# These have promises of their own: test_autoattack.py, test_carlini_wagner.py.
ELSEWHERE = {attacks.AutoAttack, attacks.CarliniWagnerL2}


def is_an_attack(value):
    return isinstance(value, type) and "threat" in getattr(value, "__dataclass_fields__", {})


PUBLIC = {name: value for name in attacks.__all__ if is_an_attack(value := getattr(attacks, name))}
LISTED = {type(make(THREATS["Linf"])) for make in ATTACKS.values()}
# An attack that nobody listed is tested with its default settings.
ATTACKS |= {name: value for name, value in PUBLIC.items() if value not in LISTED | ELSEWHERE}
by_attack = pytest.mark.parametrize("name", ATTACKS)
by_threat = pytest.mark.parametrize("norm", THREATS)


def network(shape, num_classes, seed=0):
    """A small network with a hidden layer, for images of any shape."""
    keys = jax.random.split(jax.random.key(seed), 2)
    pixels = int(np.prod(shape))
    hidden = jax.random.normal(keys[0], (pixels, 16)) / pixels**0.5
    out = jax.random.normal(keys[1], (16, num_classes))
    return jax.tree_util.Partial(
        lambda weights, x: jnp.tanh(4 * (x.reshape(len(x), -1) - 0.5) @ weights[0]) @ weights[1],
        (hidden, out),
    )


def examples(batch, shape, num_classes):
    rng = np.random.default_rng(0)
    images = np.clip(rng.uniform(-0.2, 1.2, (batch, *shape)), 0, 1).astype(np.float32)
    logits_fn = network(shape, num_classes)
    labels = np.array(jnp.argmax(logits_fn(images), 1), np.int32)
    labels[0] = (labels[0] + 1) % num_classes  # one image is misclassified without an attack
    return logits_fn, jnp.asarray(images), jnp.asarray(labels)


def check(threat, images, adversarial):
    assert adversarial.shape == images.shape
    assert adversarial.dtype == images.dtype
    assert float(adversarial.min()) >= 0
    assert float(adversarial.max()) <= 1
    distance = np.asarray(threat.distance(adversarial, images))
    assert (distance <= threat.epsilon * (1 + 1e-5)).all(), distance


@by_attack
# Linf is below, at a certified bound; L1 has the most code of its own.
@pytest.mark.parametrize("norm", [pytest.param("L2", marks=pytest.mark.slow), "L1"])
def test_ball_box_and_dtype_on_an_odd_batch(name, norm):
    threat = THREATS[norm]
    logits_fn, images, labels = examples(7, (6, 5, 3), 10)
    attack = ATTACKS[name](threat)
    adversarial = attack(logits_fn, images, labels, jax.random.key(0))
    check(threat, images, adversarial)
    robust = jnp.argmax(logits_fn(adversarial), 1) == labels
    assert int(robust.sum()) <= 6  # the misclassified image stays so
    assert not bool(robust[0]) or name in ("fgsm", "ifgsm", "pgd", "restarts", "cw", "spsa")


@pytest.mark.slow
@by_attack
@pytest.mark.parametrize(("num_classes", "batch"), [(2, 1), (3, 2)])
def test_few_classes_and_small_batches(name, num_classes, batch):
    logits_fn, images, labels = examples(batch, (4, 4, 1), num_classes)
    check(
        THREATS["Linf"],
        images,
        ATTACKS[name](THREATS["Linf"])(logits_fn, images, labels, jax.random.key(0)),
    )


@by_attack
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_are_refused(name, dtype):
    """Their rounding would leave the ball."""
    logits_fn, images, labels = examples(3, (4, 4, 2), 5)
    wide = jax.tree_util.Partial(lambda f, x: f(x.astype(jnp.float32)), logits_fn)
    with pytest.raises(ValueError, match=r"float32 or float64, got .*float16"):
        ATTACKS[name](Linf(0.06))(wide, images.astype(dtype), labels, jax.random.key(0))


@pytest.mark.slow
@by_attack
def test_draws_do_not_depend_on_the_batch(name):
    """With one key for each image, an image's result is the same alone and among others."""
    logits_fn, images, labels = examples(6, (5, 5, 2), 4)
    keys = jax.random.split(jax.random.key(3), 6)
    attack = ATTACKS[name](THREATS["L2"])
    together = attack(logits_fn, images, labels, keys)
    apart = jnp.concatenate(
        [
            attack(logits_fn, images[i : i + 2], labels[i : i + 2], keys[i : i + 2])
            for i in (0, 2, 4)
        ]
    )
    np.testing.assert_allclose(together, apart, atol=2e-5)


@pytest.mark.slow
@by_attack
def test_inside_jit_and_twice(name):
    logits_fn, images, labels = examples(3, (4, 4, 1), 5)
    attack = ATTACKS[name](THREATS["Linf"])
    direct = attack(logits_fn, images, labels, jax.random.key(0))
    inside = jax.jit(attack)(logits_fn, images, labels, jax.random.key(0))
    np.testing.assert_allclose(direct, inside, atol=1e-6)
    np.testing.assert_array_equal(direct, attack(logits_fn, images, labels, jax.random.key(0)))


def test_images_may_be_constants_of_a_traced_program():
    logits_fn, images, labels = examples(3, (4, 4, 1), 5)
    attack, key = ATTACKS["pgd"](THREATS["Linf"]), jax.random.key(0)
    found = jax.jit(lambda key: attack(logits_fn, images, labels, key))(key)
    np.testing.assert_allclose(found, attack(logits_fn, images, labels, key), atol=1e-6)
    outside = 2 + images
    with pytest.raises(ValueError, match="got values from"):
        jax.jit(lambda key: attack(logits_fn, outside, labels, key))(key)


@by_attack
def test_wrong_inputs_are_named(name):
    logits_fn, images, labels = examples(3, (4, 4, 1), 5)
    attack, key = ATTACKS[name](THREATS["Linf"]), jax.random.key(0)
    with pytest.raises(ValueError, match=r"in \[0, 1\].*uint8"):
        attack(logits_fn, (images * 255).astype(jnp.uint8), labels, key)
    with pytest.raises(ValueError, match=r"\[0, 1\], got values from 0\.0 to 255"):
        attack(logits_fn, images * 255, labels, key)
    with pytest.raises(ValueError, match="nan"):
        attack(logits_fn, images.at[0, 0].set(jnp.nan), labels, key)
    with pytest.raises(ValueError, match=r"labels must be integers of shape \(3,\)"):
        attack(logits_fn, images, labels[:2], key)
    with pytest.raises(ValueError, match="labels must be integers"):
        attack(logits_fn, images, labels.astype(jnp.float32), key)
    for wrong in (labels.at[0].set(5), labels.at[0].set(-1)):
        with pytest.raises(
            ValueError, match=r"labels must lie in \[0, 5\), .* got (-1 to|\d to 5)"
        ):
            attack(logits_fn, images, wrong, key)
    with pytest.raises(ValueError, match="no images"):
        attack(logits_fn, images[:0], labels[:0], key)


def test_a_call_traces_a_network_once():
    logits_fn, images, labels = examples(3, (4, 4, 1), 5)
    traces = []

    def counted(x):
        traces.append(x)
        return logits_fn(x)

    attack = pgd(Linf(0.1), steps=2)
    for call in range(3):
        attack(counted, images, labels, jax.random.key(call))
        assert len(traces) == call + 1


def blind(x):
    """Logits that are finite, with a gradient that is NaN at every image; class 1 is largest."""
    zero = x.mean((1, 2, 3)) - x.mean((1, 2, 3))
    largest = 1 + jnp.where(zero == 0, 0.0, jnp.sqrt(zero))
    return jnp.stack([0 * zero, largest, zero - 1, zero - 2], 1)


@pytest.mark.parametrize("name", ["pgd", "restarts", "apgd", "fab", "square"])
def test_a_gradient_of_nan_is_no_success(name):
    """NaN logits would be a prediction of class 0. PGD gives NaN back, which says what it is."""
    images, labels = jnp.full([2, 4, 4, 1], 0.5), jnp.ones(2, jnp.int32)
    assert bool(jnp.isnan(jax.grad(lambda x: blind(x).sum())(images)).all())
    attack = functools.partial(ATTACKS[name](Linf(0.1)), blind, images, labels, jax.random.key(0))
    if name == "square":
        adversarial = attack()
    else:
        with pytest.warns(EvaluationWarning, match="(NaN|zero) for 2 of 2 images"):
            adversarial = attack()
    if name in ("pgd", "restarts"):
        assert bool(jnp.isnan(adversarial).all())
    else:
        check(Linf(0.1), images, adversarial)
        np.testing.assert_array_equal(blind(adversarial).argmax(1), labels)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: apgd(Linf(0.1), steps=0), r"APGD\.steps .* got 0"),
        (lambda: apgd(Linf(0.1), large_radii=True), r"APGD\.large_radii is for L1"),
        (lambda: apgd(L1(1.0), steps=2, large_radii=True), r"APGD\.steps .* radii .* got 2"),
        (lambda: apgd(L1(1.0), steps=4, large_radii=True), r"APGD\.steps .* radii .* got 4"),
        (lambda: apgd(0.1), r"APGD\.threat must be"),
        (lambda: apgd(Linf(0.1), rho=2), r"APGD\.rho"),
        (lambda: fab(Linf(0.1), restarts=0), r"FAB\.restarts"),
        (lambda: fab("Linf"), r"FAB\.threat"),
        (lambda: square(Linf(0.1), queries=0), r"Square\.queries"),
        (lambda: square(Linf(0.1), initial_share=0), r"Square\.initial_share"),
        (lambda: square(8 / 255), r"Square\.threat"),
        (lambda: spsa(Linf(0.1), samples=3), r"SPSA\.samples must be even"),
        (lambda: spsa(Linf(0.1), delta=0), r"SPSA\.delta"),
        (lambda: spsa(Linf(0.1), steps=0), r"SPSA\.steps"),
        (lambda: pgd(Linf(0.1), restarts=0), r"PGD\.restarts"),
        (lambda: pgd(Linf(0.1), targeted=True, targets="clean_logits"), r"PGD\.targeted"),
        (lambda: pgd(8 / 255), r"PGD\.threat must be a threat model .*, got 0\.03"),
        (lambda: fgsm(8 / 255), r"FGSM\.threat"),
        (lambda: mim(8 / 255), r"PGD\.threat"),
        (lambda: spsa(8 / 255), r"SPSA\.threat"),
        (lambda: ifgsm(Linf(0.1), steps=0), r"PGD\.steps must be at least 1, got 0"),
        (lambda: pgd(Linf(0.1), restarts=2, random_start=False), r"every restart is the same"),
        (lambda: autoattack(0.1), r"AutoAttack\.threat"),
        (lambda: autoattack(Linf(0.1), version="best"), r"AutoAttack\.version .* got 'best'"),
        (lambda: autoattack(Linf(0.1), attacks=("square",)), r'goes with version="custom"'),
        (lambda: autoattack(Linf(0.1), version="custom"), r'goes with version="custom"'),
        (lambda: autoattack(Linf(0.1), version="custom", attacks=("pgd",)), r"different ones of"),
        (lambda: autoattack(Linf(0.1), batch_size=0), r"AutoAttack\.batch_size"),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- oracles


def linear(num_classes=3, shape=(4, 4, 2), seed=1):
    weights = np.random.default_rng(seed).normal(size=(int(np.prod(shape)), num_classes))
    weights = jnp.asarray(weights, jnp.float32)
    logits_fn = jax.tree_util.Partial(lambda w, x: x.reshape(len(x), -1) @ w, weights)
    images = jnp.asarray(np.random.default_rng(2).uniform(0.45, 0.55, (5, *shape)), jnp.float32)
    labels = jnp.argmax(logits_fn(images), 1)
    return logits_fn, np.array(weights, np.float64), images, labels


def boundary_distances(weights, images, labels, dual):
    """Distance to the nearest other class, in closed form away from the box."""
    logits = np.asarray(images, np.float64).reshape(len(images), -1) @ weights
    best = []
    for row, label in zip(logits, np.asarray(labels), strict=True):
        slopes = weights - weights[:, [label]]
        gaps = row[label] - row
        lengths = np.linalg.norm(slopes, dual, axis=0)
        best.append(
            min(g / n for j, (g, n) in enumerate(zip(gaps, lengths, strict=True)) if j != label)
        )
    return np.asarray(best)


@pytest.mark.parametrize(("threat", "dual"), [(Linf(0.1), 1), (L2(0.5), 2), (L1(3.0), np.inf)])
@pytest.mark.parametrize("targets", [0, 9])
def test_fab_finds_the_boundary_of_a_linear_network(threat, dual, targets):
    logits_fn, weights, images, labels = linear()
    attack = fab(threat, targets=targets, overshoot=1.0001, steps=30)
    _, distance = attack.nearest(logits_fn, images, labels, jax.random.key(0))
    exact = boundary_distances(weights, images, labels, dual)
    np.testing.assert_allclose(distance, exact, rtol=1e-3)
    # With an overshoot of a ten-thousandth the point lies that far beyond the boundary.
    np.testing.assert_allclose(distance, 1.0001 * exact, rtol=1e-4)


@pytest.mark.parametrize(("threat", "dual"), [(Linf(0.1), 1), (L2(0.5), 2), (L1(3.0), np.inf)])
def test_fab_steps_over_the_boundary_and_back(threat, dual):
    """Two steps in closed form, as multiples of the distance to the boundary: all on one line."""
    logits_fn, weights, images, labels = linear(num_classes=2)
    # Nearer to the boundary, so that no step meets the box.
    slope = weights[:, 1] - weights[:, 0]
    gap = np.asarray(images, np.float64).reshape(len(images), -1) @ slope
    images -= jnp.asarray(0.9 * np.outer(gap, slope / (slope @ slope)).reshape(images.shape))
    exact = boundary_distances(weights, images, labels, dual)
    first = 1.05
    back = 0.9 * first  # where the second step begins, its distance to the boundary `left`
    left = 1 - back
    pull = min(left / (left + 1), 0.1)
    second = (1 - pull) * (back + 1.05 * left) + pull * 1.05
    for steps, expected in ((1, first), (2, second)):
        attack = fab(threat, targets=0, steps=steps, overshoot=1.05, backward=0.9, alpha_max=0.1)
        _, distance = attack.nearest(logits_fn, images, labels, jax.random.key(0))
        np.testing.assert_allclose(distance, expected * exact, rtol=1e-4)


def test_apgd_shortens_steps_that_find_nothing_better():
    """The maximum lies inside the ball: the loss rises at every other step, the best stays."""

    def peak(images):
        return jnp.stack([jnp.zeros(len(images)), -jnp.abs(images.ravel() - 0.51)], 1)

    images, labels = jnp.full([1, 1, 1, 1], 0.5), jnp.zeros(1, jnp.int32)
    attack = apgd(Linf(0.1), steps=100, loss=losses.margin, rho=0.1)
    run = attack.trajectory(peak, images, labels, images)
    # A checkpoint halves the step unless the last one did: at every second of the eight.
    assert np.unique(run.step_size).tolist() == np.float32([0.025, 0.05, 0.1, 0.2]).tolist()
    np.testing.assert_allclose(run.best_loss, 0, atol=1e-3)


@pytest.mark.parametrize(("threat", "dual"), [(Linf(0.1), 1), (L2(0.3), 2), (L1(0.3), np.inf)])
def test_apgd_reaches_the_maximum_of_a_linear_network(threat, dual):
    logits_fn, weights, images, _ = linear(num_classes=2)
    if isinstance(threat, L1):
        # Two thirds of the pixels that the best point moves, rounded up, move in a step: never
        # fewer than two. So two pixels are made the steepest ones.
        weights[:2] = [[2.0, -2.0], [-2.0, 2.0]]
        logits_fn = jax.tree_util.Partial(
            lambda w, x: x.reshape(len(x), -1) @ w, jnp.asarray(weights, jnp.float32)
        )
    labels = jnp.asarray([0, 1, 0, 1, 0])
    attack = apgd(threat, loss=losses.margin)
    start = threat.project(images + 0.01, images)
    run = attack.trajectory(logits_fn, images, labels, start)
    gain = np.asarray(run.best_loss - losses.margin(logits_fn(images), labels))
    exact = threat.epsilon * np.linalg.norm(weights[:, 1] - weights[:, 0], dual)
    np.testing.assert_allclose(gain, exact, rtol=1e-4)


def certified_margin(layers, images, labels, epsilon):
    """Largest margin that interval arithmetic allows in an L-infinity ball."""
    flat = np.asarray(images, np.float64).reshape(len(images), -1)
    low, high = np.clip(flat - epsilon, 0, 1), np.clip(flat + epsilon, 0, 1)
    for index, (weight, bias) in enumerate(layers):
        positive, negative = np.maximum(weight, 0), np.minimum(weight, 0)
        low, high = low @ positive + high @ negative + bias, high @ positive + low @ negative + bias
        if index == 0:
            low, high = np.maximum(low, 0), np.maximum(high, 0)
    rows = np.arange(len(labels))
    others = high.copy()
    others[rows, labels] = -np.inf
    return others.max(1) - low[rows, labels]


@by_attack
def test_no_attack_goes_beyond_a_certified_bound(name):
    rng = np.random.default_rng(5)
    layers = [
        (rng.normal(size=(32, 12)) / 8, 0.1 * rng.normal(size=12)),
        (rng.normal(size=(12, 4)), 0.1 * rng.normal(size=4)),
    ]
    weights = [(jnp.asarray(w, jnp.float32), jnp.asarray(b, jnp.float32)) for w, b in layers]

    def forward(layers, x):
        (first, bias), (second, other) = layers
        return jax.nn.relu(x.reshape(len(x), -1) @ first + bias[None]) @ second + other[None]

    logits_fn = jax.tree_util.Partial(forward, weights)
    images = jnp.asarray(rng.uniform(0, 1, (40, 4, 4, 2)), jnp.float32)
    labels = jnp.argmax(logits_fn(images), 1)
    epsilon = 0.01
    bound = certified_margin(layers, images, np.asarray(labels), epsilon)
    attack = ATTACKS[name](Linf(epsilon))
    adversarial = attack(logits_fn, images, labels, jax.random.key(0))
    check(Linf(epsilon), images, adversarial)
    margin = losses.margin(logits_fn(adversarial), labels)
    assert (np.asarray(margin) <= bound + 1e-5).all()
    assert (bound < 0).sum() >= 10  # some images are certified, so that the test can fail
    assert (bound > 0).sum() >= 5


@pytest.mark.parametrize(
    "norm", [pytest.param(n, marks=[] if n == "Linf" else pytest.mark.slow) for n in THREATS]
)
@pytest.mark.parametrize("name", ["pgd", "apgd-first", "fab", "fab-t", "square"])
def test_devices_share_nothing_but_the_end_of_a_loop(name, norm):
    """A batch on two devices: no image's data crosses, whatever the compiler makes of indexing."""
    on = sharding.data_mesh(jax.devices()[:2])
    logits_fn, images, labels = examples(8, (4, 4, 3), 10)
    keys = jax.random.split(jax.random.key(0), 8)
    batch = jax.device_put((images, labels, keys), sharding.batch_sharding(on))
    weights = jax.device_put(logits_fn, sharding.replicated(on))
    attack = ATTACKS[name](THREATS[norm])
    program = jax.jit(attack).trace(weights, *batch).lower().compile().as_text()
    assert "partition_count=2" in program or "num_partitions=2" in program
    assert shapes_of_collectives(program) <= {"pred[]"}
    # Were there others, they would be seen.
    mean = jax.jit(lambda images: images.mean(0)).lower(batch[0]).compile().as_text()
    assert shapes_of_collectives(mean) == {"f32[4,4,3]"}


def shapes_of_collectives(program):
    collective = r"= (\S+?)(?:\{.*?\})? (?:all-reduce|all-gather|all-to-all|collective-permute)"
    return set(re.findall(collective + r"(?:-start)?\(", program))


def in_two_directions(images):
    """One pixel: the loss rises to both sides of 0.5, and only beyond 0.72 it is fooled."""
    away = images.ravel() - 0.5
    rise = jnp.where(away > 0, away**2, 0.1 * away**2)
    return jnp.stack([jnp.full_like(away, 0.05), rise], 1)


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        (pgd(Linf(0.3), steps=4, step_size=0.15), 1 / 2),
        (pgd(Linf(0.3), steps=4, step_size=0.15, restarts=4), 1 - 1 / 2**4),
        (pgd(Linf(0.3), steps=4, step_size=0.15, restarts=4, targeted=True), 1 - 1 / 2**4),
        (apgd(Linf(0.3), steps=12), 1 / 2),
        (apgd(Linf(0.3), steps=12, restarts=4), 1 - 1 / 2**4),
    ],
)
def test_every_restart_is_another_chance(attack, expected):
    """A start falls on either side, and the attack stays on its side."""
    images = jnp.full([600, 1, 1, 1], 0.5)
    labels = jnp.full(600, int(getattr(attack, "targeted", False)))
    adversarial = attack(in_two_directions, images, labels, jax.random.key(0))
    share = float((adversarial > 0.72).mean())
    assert abs(share - expected) <= 4 * (expected * (1 - expected) / 600) ** 0.5


@pytest.mark.parametrize("attack", [pgd, apgd])
def test_a_later_restart_of_higher_loss_does_not_replace_a_success(attack):
    """To the left a success of low cross-entropy, to the right a failure of a higher one."""

    def two_sides(images):
        away = images.ravel() - 0.5
        none = jnp.full_like(away, -50.0)
        right = -0.001 * (0.4 - away)  # two classes just below the label: log odds of log 2
        left = -5 * away - 1.45  # one class that overtakes the label at the ball's very border
        others = jnp.where(away > 0, jnp.stack([right, right]), jnp.stack([none, left]))
        return jnp.stack([0 * away, *others], 1)

    images, labels = jnp.full([200, 1, 1, 1], 0.5), jnp.zeros(200, jnp.int32)
    found = attack(Linf(0.3), steps=12, restarts=5)(two_sides, images, labels, jax.random.key(0))
    fooled = two_sides(found).argmax(1) != labels
    assert abs(float(fooled.mean()) - (1 - 1 / 2**5)) <= 4 * (1 / 2**5 / 200) ** 0.5


def test_fabs_restarts_are_further_chances():
    """From below 0.5 the boundary seems to lie below: only a start above finds the one above."""
    images, labels = jnp.full([600, 1, 1, 1], 0.45), jnp.zeros(600, int)
    shares = [
        float(
            (
                fab(Linf(0.3), targets=0, steps=30, restarts=restarts)(
                    in_two_directions, images, labels, jax.random.key(0)
                )
                > 0.72
            ).mean()
        )
        for restarts in (1, 2, 5)
    ]
    assert shares[0] == 0
    for share, tries in zip(shares[1:], (1, 4), strict=True):
        expected = 1 - 0.5**tries
        assert abs(share - expected) <= 4 * (expected * (1 - expected) / 600) ** 0.5


def test_every_public_attack_is_tested():
    tested = {type(make(THREATS["Linf"])) for make in ATTACKS.values()} | ELSEWHERE
    assert set(PUBLIC.values()) == tested
    assert len(tested) >= 8


@pytest.mark.parametrize(
    ("face", "old", "new"),
    [(attacks, "Outcome", "UnitOutcome"), (methods, "Outcome", "LossOutcome")],
)
def test_names_of_before_work_and_warn(face, old, new):
    with pytest.warns(DeprecationWarning, match=f"{new} now"):
        assert getattr(face, old) is getattr(face, new)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        face.nothing  # noqa: B018
