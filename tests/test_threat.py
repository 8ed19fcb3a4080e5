"""Threat models in float32; the exact tests are in `float64/test_threat.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agr_jax.threat import L1, L2, Linf, ThreatModel, image_keys

THREATS = [Linf(0.1), L2(0.5), L1(2.0)]
by_name = pytest.mark.parametrize("threat", THREATS, ids=lambda threat: type(threat).__name__)


@pytest.fixture(scope="module")
def z(golden):
    return golden("projections.npz")


@pytest.fixture(scope="module")
def images():
    """Five images; two of them touch the box on many pixels."""
    rng = np.random.default_rng(0)
    values = rng.uniform(size=(5, 6, 5, 3))
    values[1] = values[1].round()
    values[2] = np.clip(3 * values[2] - 1, 0, 1)
    return jnp.asarray(values, jnp.float32)


def norm(threat, perturbation):
    order = {Linf: np.inf, L2: 2, L1: 1}[type(threat)]
    flat = np.asarray(perturbation, np.float64).reshape(len(perturbation), -1)
    return np.linalg.norm(flat, order, axis=1)


def assert_inside(threat, points, images):
    assert points.dtype == images.dtype
    assert points.shape == images.shape
    assert float(points.min()) >= 0
    assert float(points.max()) <= 1
    # Rounding of x + u - x: 6e-8 a pixel, 90 pixels.
    assert (norm(threat, np.asarray(points) - np.asarray(images)) <= threat.epsilon + 6e-6).all()


# ---- golden projections: README tolerance 5e-7 of the largest entry


def assert_golden(z, got, key):
    expected = z[f"{key}_ref64"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=5e-7 * np.abs(expected).max())


def test_golden_balls(z):
    x, v = jnp.asarray(z["ball_x"]), jnp.asarray(z["ball_v"])
    assert_golden(z, jax.jit(Linf(0.1).project)(x + v, x), "ball_pgd_linf")
    assert_golden(z, jax.jit(L2(0.5).project)(x + v, x), "ball_apgd_l2")
    outside = jax.jit(lambda v: L2(0.5).project(v, jnp.zeros_like(v), box=False))(v)
    assert_golden(z, outside, "ball_l2ball_noclip")


def test_golden_unit_steps(z):
    v = jnp.asarray(z["ball_v"])
    assert_golden(z, jax.jit(L2(0.5).ascent)(v), "ball_normalize_l2")
    assert_golden(z, jax.jit(L1(0.5, sparsity=None).ascent)(v), "ball_normalize_l1")
    np.testing.assert_array_equal(Linf(0.1).ascent(v), np.sign(v))


@pytest.mark.parametrize("epsilon", ["0p1", "1", "12"])
@pytest.mark.parametrize("scale", ["small", "mid", "big"])
@pytest.mark.parametrize("size", [7, 192, 3072])
def test_golden_l1_projection(z, size, scale, epsilon):
    key = f"l1ball_d{size}_{scale}_e{epsilon}"
    x, y = jnp.asarray(z[f"{key}_x"]), jnp.asarray(z[f"{key}_y"])
    threat = L1(float(z[f"{key}_eps"]))
    got = jax.jit(threat.project)(x + y, x) - x
    error = np.abs(got - z[f"{key}_projected_ref64"]).max((1, 2, 3))
    length = np.abs(np.asarray(y)).sum((1, 2, 3))
    # The README's tolerance, and the rounding of x + y and of x + u, which an image adds to a
    # perturbation: half an ulp of a number below 16, in the wanted point and in the threshold.
    largest = np.abs(np.asarray(y)).max((1, 2, 3))
    assert (error <= 7e-7 * length + 1e-8 + 1.2e-7 * (1 + largest)).all()
    assert np.isfinite(got).all()


# ---- properties


@by_name
def test_is_a_threat_model(threat):
    assert isinstance(threat, ThreatModel)
    assert hash(threat) == hash(type(threat)(threat.epsilon))


@by_name
def test_random_start_lies_in_ball_and_box_and_reaches_out(threat, images):
    start = jax.jit(threat.random_start)(jax.random.key(1), images)
    assert_inside(threat, start, images)
    assert (threat.distance(start, images) > 0.2 * threat.epsilon).all()
    other = jax.jit(threat.random_start)(jax.random.key(2), images)
    assert not np.array_equal(start, other)
    assert not np.array_equal(start[0] - images[0], start[3] - images[3])


@by_name
def test_draws_of_one_key_per_image_do_not_depend_on_batching(threat, images):
    keys = jax.random.split(jax.random.key(3), len(images))
    draw = jax.jit(threat.random_start)
    together = draw(keys, images)
    alone = [draw(keys[i : i + 1], images[i : i + 1])[0] for i in range(len(images))]
    np.testing.assert_array_equal(together, np.stack(alone))
    # One key stands for as many keys as there are images.
    np.testing.assert_array_equal(together, draw(jax.random.key(3), images))


def test_radius_of_the_random_start_is_that_of_a_uniform_point():
    # In the middle of the box nothing is clipped: the ball of radius r has r^d of the volume.
    images = jnp.full([2000, 1, 1, 3], 0.5)
    for threat in (Linf(0.1), L2(0.1), L1(0.1)):
        start = jax.jit(threat.random_start)(jax.random.key(0), images)
        share = norm(threat, start - images) / 0.1
        # Uniform in [0, 1]; the largest gap between the distribution functions has a standard
        # deviation of about 1/90 for 2000 draws.
        gap = np.abs(np.sort(share**3) - (np.arange(2000) + 0.5) / 2000).max()
        assert gap < 0.04
        assert np.abs((start - images).mean(0)).max() < 0.005


@by_name
@pytest.mark.parametrize("box", [True, False])
def test_projection_is_idempotent_and_keeps_inner_points(threat, images, box):
    @jax.jit
    def project(candidates):
        return threat.project(candidates, images, box=box)

    rng = np.random.default_rng(1)
    far = images + jnp.asarray(rng.normal(size=images.shape), jnp.float32)
    once = project(far)
    if box:
        assert_inside(threat, once, images)
    else:
        assert float(once.min()) < 0
        assert (norm(threat, np.asarray(once) - np.asarray(images)) <= threat.epsilon + 6e-6).all()
    np.testing.assert_allclose(project(once), once, rtol=0, atol=3e-7)  # two roundings near 1
    if box:
        start = threat.random_start(jax.random.key(0), images)
        np.testing.assert_allclose(project(start), start, rtol=0, atol=3e-7)


@by_name
def test_distance(threat, images):
    other = images[::-1]
    got = threat.distance(other, images)
    np.testing.assert_allclose(got, norm(threat, np.asarray(other - images)), rtol=1e-6)


@by_name
def test_epsilon_zero_stays_at_the_image(threat, images):
    nothing = type(threat)(0.0)
    np.testing.assert_array_equal(nothing.random_start(jax.random.key(0), images), images)
    np.testing.assert_array_equal(nothing.project(images[::-1], images), images)


def test_a_zero_gradient_makes_no_step(images):
    for threat in (*THREATS, L1(2.0, sparsity=None)):
        np.testing.assert_array_equal(threat.ascent(jnp.zeros_like(images)), 0)


@pytest.mark.parametrize(("sparsity", "kept"), [(0.99, 1), (0.9, 9), (0.5, 45), (0.0, 90)])
def test_l1_steps_along_the_largest_entries(images, sparsity, kept):
    gradient = jnp.asarray(np.random.default_rng(2).normal(size=images.shape), jnp.float32)
    step = np.asarray(L1(1.0, sparsity).ascent(gradient)).reshape(5, -1)
    flat = np.asarray(gradient).reshape(5, -1)
    np.testing.assert_array_equal((step != 0).sum(1), kept)
    np.testing.assert_allclose(np.abs(step).sum(1), 1, rtol=1e-6)
    assert (step * flat >= 0).all()
    for row, values in zip(step, np.abs(flat), strict=True):
        assert values[row != 0].min() >= values[row == 0].max(initial=0)


@pytest.mark.parametrize("kind", [Linf, L2, L1])
def test_a_numpy_radius_widens_nothing(kind):
    threat, images = kind(np.float32(0.1)), jnp.full([1, 2, 2, 1], 0.5, jnp.bfloat16)
    assert threat == kind(float(np.float32(0.1)))
    assert threat.project(images + 1, images).dtype == jnp.bfloat16
    assert threat.random_start(jax.random.key(0), images).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", [Linf, L2, L1])
@pytest.mark.parametrize("epsilon", [-0.1, float("nan"), float("inf")])
def test_epsilon_is_checked(kind, epsilon):
    with pytest.raises(ValueError, match=f"{kind.__name__}.epsilon must be a finite number >= 0"):
        kind(epsilon)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5])
def test_sparsity_is_checked(sparsity):
    with pytest.raises(ValueError, match=r"L1.sparsity must lie in \[0, 1\)"):
        L1(1.0, sparsity)


def test_image_keys():
    keys = jax.random.split(jax.random.key(0), 3)
    np.testing.assert_array_equal(
        jax.random.key_data(image_keys(jax.random.key(0), 3)), jax.random.key_data(keys)
    )
    assert image_keys(keys, 3) is keys
    raw = image_keys(jax.random.PRNGKey(0), 3)
    np.testing.assert_array_equal(jax.random.key_data(raw), jax.random.key_data(keys))
    with pytest.raises(ValueError, match=r"one key or one per image \(4\), got \(3,\)"):
        image_keys(keys, 4)
