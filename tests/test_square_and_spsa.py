"""Square and SPSA: the reference's robust accuracies over seeds, and their parts in closed form."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_networks import trained_network

from agr_jax import losses
from agr_jax.attacks import spsa, square
from agr_jax.attacks._square import _pyramids, _window_sizes
from agr_jax.threat import L1, L2, Linf

# Three seeds take four minutes.
LONG = bool(os.environ.get("AGR_JAX_LONG"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "attack"),
    [
        ("square_linf_8_q1000", square(Linf(8 / 255), queries=1000)),
        ("square_l2_0p5_q1000", square(L2(0.5), queries=1000)),
        ("square_l1_12_q1000", square(L1(12.0), queries=1000)),
        ("spsa_8_it10", spsa(Linf(8 / 255), steps=10)),
    ],
)
def test_robust_accuracy_over_seeds(golden, key, attack):
    stored = golden("stats_square_spsa_cifar_cnn_a_adv.npz")
    images = golden("images.npz")
    logits_fn = trained_network(golden("weights_cifar_cnn_a_adv.npz"))
    pixels = jnp.asarray(images["cifar_x"][:200].astype(np.float32) / np.float32(255))
    labels = jnp.asarray(images["cifar_y"][:200].astype(np.int32))
    correct = jnp.argmax(logits_fn(pixels), 1) == labels
    pixels, labels = pixels[correct], labels[correct]  # the others stay as they are
    counts = []
    for seed in range(3 if LONG else 1):
        adversarial = attack(logits_fn, pixels, labels, jax.random.key(seed))
        counts.append(int((jnp.argmax(logits_fn(adversarial), 1) == labels).sum()))
    expected = stored[key].sum(1)
    print(key, counts, expected.tolist())
    # golden/README.md: 3 images for the mean of SPSA; a single Square run moves by 6. (The verdicts
    # of whole evaluations in test_autoattack.py hold Square's 5,000 queries.)
    assert abs(np.mean(counts) - expected.mean()) <= (3 if LONG else 6)
    assert np.abs(np.asarray(counts) - expected.mean()).max() <= 6


# ---- Square's parts


def test_window_sizes_are_the_published_ones():
    sizes, kinds = _window_sizes(square(Linf(0.1)), 32, 32)
    # reference_semantics.md section 10, for 5,000 queries on 32 x 32
    assert sizes.tolist() == [29, 20, 14, 10, 7, 5, 4, 3]
    changes = (np.flatnonzero(np.diff(kinds)) + 1).tolist()
    assert changes == [11, 51, 201, 501, 1001, 2001, 4001]
    sizes, kinds = _window_sizes(square(L2(0.1)), 32, 32)
    assert all(size % 2 for size in sizes)
    assert min(sizes) == 3
    sizes, kinds = _window_sizes(square(Linf(0.1), queries=100, rescale_schedule=True), 32, 32)
    assert sizes[kinds[-1]] == 1


@pytest.mark.parametrize(("threat", "order"), [(L2(1.0), 2), (L1(1.0), 1)])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 29])
def test_pyramids_have_length_one_and_opposite_halves(threat, order, size):
    pattern = _pyramids(threat, size)
    assert pattern.shape == (size, size)
    np.testing.assert_allclose(np.linalg.norm(pattern.ravel(), order), 1)
    assert (pattern[: size // 2] >= 0).all()
    assert (pattern[size // 2 :] <= 0).all()
    halves = [np.linalg.norm(half.ravel(), order) for half in np.split(pattern, [size // 2])]
    if size > 1:
        np.testing.assert_allclose(halves[0], halves[1])


def test_every_point_of_square_under_linf_is_a_corner_of_the_ball():
    """A square moves from one side of the ball to the other; nothing stays between."""
    weights = jax.random.normal(jax.random.key(1), [8 * 8 * 2, 2])
    images, labels = jnp.full([3, 8, 8, 2], 0.5), jnp.zeros(3, jnp.int32)

    def unreachable(images):
        return images.reshape(len(images), -1) @ weights + jnp.asarray([[100.0, 0.0]])

    attack, key = square(Linf(0.05), queries=200), jax.random.key(0)
    moved = attack(unreachable, images, labels, key) - images
    np.testing.assert_allclose(jnp.abs(moved), 0.05, atol=1e-6)
    start = square(Linf(0.05), queries=1)(unreachable, images, labels, key) - images
    assert (jnp.sign(moved) != jnp.sign(start)).mean() > 0.1


def test_square_stops_at_the_first_success_and_never_gets_worse():
    def brightness(images):
        mean = images.mean((1, 2, 3))
        return jnp.stack([mean, jnp.full_like(mean, 0.5)], 1)

    images = jnp.full([3, 8, 8, 2], 0.5) + jnp.asarray([0.01, 0.03, 0.3]).reshape(-1, 1, 1, 1)
    labels = jnp.zeros(3, jnp.int32)
    attack = square(Linf(0.05), queries=400)
    keys = jax.random.split(jax.random.key(0), 3)
    state = attack.begin(brightness, images, labels, keys)
    margins = [state.margin]
    for first in range(0, 400, 40):
        state = attack.advance(brightness, images, labels, keys, state, first, first + 40)
        margins.append(state.margin)
    margins = np.stack(margins)
    assert (np.diff(margins, axis=0) >= 0).all()
    assert (margins[-1] >= 0).tolist() == [True, True, False]
    # The one out of reach is dark by then, wherever a window can lie (see `_corner`).
    np.testing.assert_allclose(state.points[2, :-1, :-1], images[2, :-1, :-1] - 0.05, atol=1e-6)
    won = margins[:, 0] >= 0
    assert len(set(margins[won, 0])) == 1  # left alone from there on


# ---- SPSA


def test_spsa_estimates_the_gradient_of_a_linear_network():
    """On a linear network the estimate of one direction is exact along it; Adam's first step is
    the learning rate times the sign."""
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(12, 2)), jnp.float32)

    def logits_fn(images):
        return images.reshape(len(images), -1) @ weights

    images = jnp.full([2, 2, 2, 3], 0.5)
    attack = spsa(Linf(0.3), steps=1, samples=8192, directions_at_once=512, learning_rate=0.02)
    adversarial = attack(logits_fn, images, jnp.asarray([0, 1]), jax.random.key(0))
    slope = (weights[:, 1] - weights[:, 0]).reshape(2, 2, 3)
    clear = np.abs(slope) > 0.2  # 4,096 directions leave an error of about 0.06 of the norm
    moved = adversarial - images
    np.testing.assert_allclose(moved[0][clear], 0.02 * np.sign(slope)[clear], rtol=1e-3)
    np.testing.assert_allclose(moved[1][clear], -0.02 * np.sign(slope)[clear], rtol=1e-3)


def test_spsa_memory_groups_do_not_change_the_result():
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(12, 3)), jnp.float32)

    def logits_fn(images):
        return jnp.tanh(images.reshape(len(images), -1)) @ weights

    images, labels = jnp.full([2, 2, 2, 3], 0.5), jnp.asarray([0, 1])
    results = [
        spsa(Linf(0.1), steps=4, samples=22, directions_at_once=size)(
            logits_fn, images, labels, jax.random.key(0)
        )
        for size in (1, 4, 64)
    ]
    np.testing.assert_allclose(results[0], results[1], atol=1e-6)
    np.testing.assert_allclose(results[0], results[2], atol=1e-6)
    before, after = (losses.margin(logits_fn(x), labels) for x in (images, results[0]))
    assert (after > before).all()
