"""Convolutions in canonical form are those that they stand for, and so are their gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from agr_jax.attacks._convolutions import fast, is_fast
from agr_jax.attacks._tracing import trace

# layout of images, kernel and result; size, channels in and out; kernel, strides, padding
# (or negative padding), dilation of images, dilation of the kernel, groups
PADS = [(1, 1), (1, 2)]
CASES = {
    "cropped": (
        "NCHW",
        "OIHW",
        "NCHW",
        (9, 9),
        2,
        3,
        (3, 3),
        (1, 2),
        [(-1, 2), (0, -2)],
        None,
        None,
        1,
    ),
    # Borders that no pixel meets: the gradient crops more than there is.
    "far": ("NCHW", "OIHW", "NCHW", (1, 2), 2, 3, (1, 1), (1, 1), [(2, -2), (0, 1)], None, None, 1),
    "flax": ("NHWC", "HWIO", "NHWC", (8, 8), 3, 4, (3, 3), (1, 1), "SAME", None, None, 1),
    "torch": ("NCHW", "OIHW", "NCHW", (8, 7), 3, 4, (3, 3), (1, 1), "SAME", None, None, 1),
    "stride 2": ("NHWC", "HWIO", "NHWC", (8, 8), 3, 4, (3, 3), (2, 2), "SAME", None, None, 1),
    "odd": ("NCHW", "OIHW", "NCHW", (9, 7), 2, 3, (4, 3), (2, 3), [(1, 2), (0, 1)], None, None, 1),
    "short": ("NHWC", "HWIO", "NHWC", (9, 9), 2, 3, (2, 2), (3, 3), "VALID", None, None, 1),
    "four": ("NHWC", "HWIO", "NHWC", (8, 8), 3, 4, (4, 4), (2, 2), [(1, 1), (1, 1)], None, None, 1),
    "long": ("NHWC", "HWIO", "NHWC", (11, 9), 2, 3, (7, 5), (2, 3), "SAME", None, None, 1),
    "one": ("NHWC", "HWIO", "NHWC", (8, 9), 4, 3, (1, 1), (2, 2), "VALID", None, None, 1),
    "groups": ("NCHW", "OIHW", "NCHW", (8, 8), 4, 6, (3, 3), (2, 2), "SAME", None, None, 2),
    "depthwise": ("NHWC", "HWIO", "NHWC", (7, 7), 4, 4, (3, 3), (1, 1), "SAME", None, None, 4),
    "dilated": ("NHWC", "HWIO", "NHWC", (9, 9), 2, 3, (3, 3), (1, 1), "SAME", None, (2, 2), 1),
    "transposed": ("NHWC", "HWIO", "NHWC", (5, 4), 2, 3, (3, 3), (1, 1), PADS, (2, 2), None, 1),
    "both": ("NHWC", "HWIO", "NHWC", (5, 5), 2, 3, (3, 3), (2, 2), PADS, (3, 2), None, 1),
    "row": ("NCH", "OIH", "NCH", (11,), 2, 3, (3,), (2,), "SAME", None, None, 1),
    "volume": (
        "NCDHW",
        "OIDHW",
        "NCDHW",
        (5,) * 3,
        2,
        2,
        (3,) * 3,
        (2,) * 3,
        "SAME",
        None,
        None,
        1,
    ),
    # Few channels on one side, in the value or the gradient.
    "stem": ("NHWC", "HWIO", "NHWC", (8, 7), 3, 16, (3, 3), (1, 1), "SAME", None, None, 1),
    "stem, stride 2": ("NCHW", "OIHW", "NCHW", (9, 8), 3, 48, (5, 4), (2, 3), PADS, None, None, 1),
    "stem, dilated": ("NHWC", "HWIO", "NHWC", (9, 9), 1, 9, (3, 2), (1, 2), PADS, None, (2, 3), 1),
    "stem, tiny": ("NHWC", "HWIO", "NHWC", (1, 2), 2, 9, (3, 3), (1, 1), "SAME", None, None, 1),
    "stem, cropped": (
        "NHWC",
        "HWIO",
        "NHWC",
        (9, 9),
        2,
        9,
        (3, 3),
        (1, 1),
        [(-1, 2), (0, -2)],
        None,
        None,
        1,
    ),
    "last": ("NHWC", "HWIO", "NHWC", (8, 7), 20, 3, (3, 3), (1, 1), "SAME", None, (1, 2), 1),
    "last, transposed": (
        "NHWC",
        "HWIO",
        "NHWC",
        (5, 4),
        12,
        1,
        (3, 3),
        (1, 1),
        PADS,
        (2, 2),
        None,
        1,
    ),
    "stem, row": ("NCH", "OIH", "NCH", (11,), 1, 4, (3,), (1,), "SAME", None, None, 1),
    "stem, volume": (
        "NCDHW",
        "OIDHW",
        "NCDHW",
        (5, 4, 3),
        1,
        14,
        (3,) * 3,
        (1,) * 3,
        "SAME",
        None,
        None,
        1,
    ),
}


def placed(layout, names):
    return [names[axis] for axis in layout]


@pytest.mark.parametrize("name", CASES)
def test_the_same_value_and_gradient(name):
    images_in, kernel_in, images_out, size, ci, co, taps, strides, padding, *rest = CASES[name]
    dilation, kernel_dilation, groups = rest
    rng, spatial = np.random.default_rng(0), images_in.strip("NC")
    shape = placed(images_in, {"N": 2, "C": ci, **dict(zip(spatial, size, strict=True))})
    spatial = kernel_in.strip("OI")
    filters = {"O": co, "I": ci // groups, **dict(zip(spatial, taps, strict=True))}
    images = jnp.asarray(rng.normal(size=shape), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=placed(kernel_in, filters)), jnp.float32)

    def convolve(x):
        return lax.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            lhs_dilation=dilation,
            rhs_dilation=kernel_dilation,
            dimension_numbers=(images_in, kernel_in, images_out),
            feature_group_count=groups,
        )

    (equation,) = jax.make_jaxpr(convolve)(images).jaxpr.eqns
    value, pull_back = jax.vjp(convolve, images)
    if not is_fast(kernel, equation.params):
        found = jax.jit(lambda x: fast(x, kernel, equation.params))(images)
        np.testing.assert_allclose(found, value, atol=2e-5)
    cotangent = jnp.asarray(rng.normal(size=value.shape), jnp.float32)
    # The gradient as attacks take it, with all that is not in the fast form rewritten.
    traced = trace(convolve, images)
    if jax.default_backend() == "cpu":
        assert traced.program.rewritten
        assert traced.program.float32_convolutions
    found = jax.jit(lambda traced, x: jax.vjp(traced, x)[1](cotangent)[0])(traced, images)
    np.testing.assert_allclose(found, pull_back(cotangent)[0], atol=2e-5)
    text = str(traced.program.forward) + str(traced.program.backward)
    assert set(re.findall(r"lhs_dilation=\(([^)]*)\)", text)) <= {"1, 1", "1,", "1, 1, 1"}
    if not traced.program.rewritten:  # not on a CPU
        return
    if name.startswith(("stem", "last")) and name != "stem, stride 2":
        few = traced.program.backward if name.startswith("stem") else traced.program.forward
        assert "dot_general" in str(few)
        assert "conv_general_dilated" not in str(few)


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_which_networks_are_better_off_without_the_library(dtype):
    kernel = jnp.ones((3, 3, 8, 8), dtype)

    def network(x):
        x = jnp.broadcast_to(x, (*x.shape[:3], 8)).astype(dtype)
        layout = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=layout)
        return x.mean((1, 2)).astype(jnp.float32)

    program = trace(network, jnp.zeros((5, 16, 16, 1))).program
    if jax.default_backend() == "cpu":
        assert program.float32_convolutions == (dtype == "f4")
