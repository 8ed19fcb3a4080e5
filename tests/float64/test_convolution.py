"""The canonical convolution equals the plain one in value and in both gradients, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agr_jax.models.convolution import convolve, default_implementation

SIZES = ((6, 6), (7, 7), (5, 8), (8, 5), (2, 3))
GEOMETRIES = [
    *(
        (kernel, stride, None, size)
        for kernel in (1, 3)
        for stride in (1, 2)
        for size in (*SIZES, (1, 1))
    ),
    *((3, 2, (0, 1), size) for size in SIZES),
]


def arrays(kernel, size, dtype=jnp.float64):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(2, *size, 3)), dtype)
    return images, jnp.asarray(rng.normal(size=(kernel, kernel, 3, 4)), dtype)


def value_and_gradients(images, weights, stride, padding, implementation):
    def convolution(x, k):
        return convolve(x, k, stride=stride, padding=padding, implementation=implementation)

    value, pullback = jax.vjp(convolution, images, weights)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=value.shape))
    return value, *pullback(cotangent)


@pytest.mark.parametrize(("kernel", "stride", "padding", "size"), GEOMETRIES)
def test_values_and_gradients_are_equal(kernel, stride, padding, size):
    images, weights = arrays(kernel, size)
    compiled = jax.jit(value_and_gradients, static_argnums=(2, 3, 4))
    plain, canonical = (
        compiled(images, weights, stride, padding, implementation)
        for implementation in ("plain", "canonical")
    )
    for got, expected in zip(canonical, plain, strict=True):
        assert got.shape == expected.shape
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_value_by_hand():
    # PyTorch's Conv2d(1, 1, 3, stride=2, padding=1) on 0..15: output[0, 0] sums pixels
    # (0, 0), (0, 1), (1, 0), (1, 1) under the last four of the nine weights.
    images = jnp.arange(16.0).reshape(1, 4, 4, 1)
    weights = jnp.arange(9.0).reshape(3, 3, 1, 1)
    for implementation in ("plain", "canonical"):
        got = convolve(images, weights, stride=2, implementation=implementation)
        assert got.shape == (1, 2, 2, 1)
        assert got[0, 0, 0, 0] == 0 * 4 + 1 * 5 + 4 * 7 + 5 * 8
        assert got[0, 1, 1, 0] == sum(
            float(images[0, 1 + i, 1 + j, 0] * weights[i, j, 0, 0])
            for i in range(3)
            for j in range(3)
        )


CANONICAL = [(1, 1, None), (1, 2, None), (3, 1, None), (3, 2, None), (3, 2, (0, 1))]


@pytest.mark.parametrize(("kernel", "stride", "padding"), CANONICAL)
def test_no_dilated_or_reversed_convolution_is_left(kernel, stride, padding):
    images, weights = arrays(kernel, (8, 8))
    options = {"stride": stride, "padding": padding}

    def lowered(implementation):
        def total(x):
            return (convolve(x, weights, implementation=implementation, **options) ** 2).sum()

        return jax.jit(jax.grad(total)).lower(images).as_text()

    def unusual(text):
        convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
        assert convolutions
        return [
            line
            for line in convolutions
            if "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" not in line
            or ("lhs_dilate" in line and "lhs_dilate = [1, 1]" not in line)
            or "reverse = [true" in line
        ]

    assert unusual(lowered("plain"))  # so the search finds them
    assert not unusual(lowered("canonical"))


@pytest.mark.parametrize(("kernel", "stride", "padding"), CANONICAL)
def test_gradients_inside_a_loop(kernel, stride, padding):
    images, weights = arrays(kernel, (6, 7))
    options = {"stride": stride, "padding": padding}

    def descend(implementation):
        def total(x, k):
            out = convolve(x, k, implementation=implementation, **options)
            return jnp.sin(out).sum()

        def step(_, pair):
            gradients = jax.grad(total, (0, 1))(*pair)
            return jax.tree.map(lambda p, g: p - 0.1 * g, pair, gradients)

        return jax.jit(lambda *pair: jax.lax.fori_loop(0, 4, step, pair))(images, weights)

    start = (images, weights)
    for got, expected, at in zip(descend("canonical"), descend("plain"), start, strict=True):
        assert np.abs(got - at).max() > 0.1
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"padding": 0}, {"padding": 2}, {"stride": 3}])
def test_other_geometries_are_computed_plainly(options):
    images, weights = arrays(3, (7, 8))

    def gradients(implementation):
        def total(x, k):
            return (convolve(x, k, implementation=implementation, **options) ** 2).sum()

        return jax.grad(total, (0, 1))(images, weights)

    for got, expected in zip(gradients("canonical"), gradients("plain"), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="'canonical' or 'plain', got 'fast'"):
        convolve(*arrays(3, (4, 4)), implementation="fast")


def test_only_the_plain_one_has_a_forward_mode():
    images, weights = arrays(3, (4, 4))
    _, tangent = jax.jvp(lambda x: convolve(x, weights), (images,), (images,))
    np.testing.assert_allclose(tangent, convolve(images, weights), atol=1e-12)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: convolve(x, weights, implementation="canonical"), (images,), (images,))


def test_the_default_suits_the_backend():
    expected = "canonical" if jax.default_backend() == "cpu" else "plain"
    assert default_implementation() == expected
