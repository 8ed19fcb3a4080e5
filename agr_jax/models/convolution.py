"""2-D convolution whose input gradient is itself a plain convolution.

XLA's CPU compiler rewrites the transposed and dilated convolutions of automatic differentiation
into fast ones at the top level of a program only. Inside a loop, such as the iterations of an
attack, they take a slow generic path. `conv="canonical"` therefore writes the input gradient as a
forward convolution in the ordinary layout. Accelerators are best served by `conv="plain"`.

A custom gradient rule has no forward mode: use `conv="plain"` under `jax.jvp` or `jax.hessian`.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

Implementation = Literal["canonical", "plain"]
_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def default_implementation() -> Implementation:
    """`"canonical"` on CPU, `"plain"` on accelerators."""
    return "canonical" if jax.default_backend() == "cpu" else "plain"


def convolve(
    images: jax.Array,
    kernel: jax.Array,
    *,
    stride: int = 1,
    padding: int | None = None,
    implementation: Implementation = "plain",
) -> jax.Array:
    """Cross-correlates images with a kernel, padded with zeros as PyTorch pads.

    Args:
        images: `[batch, height, width, in]`.
        kernel: `[k, k, in, out]`, of the dtype of `images`.
        stride: step in both directions.
        padding: zeros on every side; `k // 2` by default.
        implementation: `"plain"`, or `"canonical"` for the input gradient described above, which
            covers kernels 1 and 3 with padding `k // 2` and strides 1 and 2; other geometries are
            computed plainly.

    Returns:
        `[batch, (height + 2 padding - k) // stride + 1, ..., out]`.

    Raises:
        ValueError: on an unknown implementation.
    """
    size = kernel.shape[0]
    padding = size // 2 if padding is None else padding
    if implementation not in ("canonical", "plain"):
        raise ValueError(f"implementation must be 'canonical' or 'plain', got {implementation!r}")
    covered = kernel.shape[:2] in ((1, 1), (3, 3)) and padding == size // 2 and stride in (1, 2)
    if implementation == "canonical" and covered:
        return _canonical(images, kernel, stride)
    return _plain(images, kernel, stride, padding)


def _plain(images: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    return lax.conv_general_dilated(
        images,
        kernel,
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        dimension_numbers=_DIMENSIONS,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _canonical(images: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return _plain(images, kernel, stride, kernel.shape[0] // 2)


def _forward(
    images: jax.Array, kernel: jax.Array, stride: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _canonical(images, kernel, stride), (images, kernel)


def _backward(
    stride: int, residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    images, kernel = residuals
    padding = kernel.shape[0] // 2
    (kernel_gradient,) = jax.linear_transpose(lambda k: _plain(images, k, stride, padding), kernel)(
        cotangent
    )
    return _input_gradient(cotangent, kernel, stride, images.shape), kernel_gradient


_canonical.defvjp(_forward, _backward)


def _input_gradient(
    cotangent: jax.Array, kernel: jax.Array, stride: int, shape: tuple[int, ...]
) -> jax.Array:
    size = kernel.shape[0]
    swapped = kernel.transpose(0, 1, 3, 2)  # channels: out -> in
    if stride == 1:
        return _plain(cotangent, swapped[::-1, ::-1], 1, size // 2)
    if size == 1:
        dense = _plain(cotangent, swapped, 1, 0)
        rows, columns = (2 * n - 1 for n in dense.shape[1:3])
        dilation = [(0, 0, 0), (0, shape[1] - rows, 1), (0, shape[2] - columns, 1), (0, 0, 0)]
        return lax.pad(dense, jnp.zeros([], dense.dtype), dilation)
    return _polyphase_input_gradient(cotangent, swapped, shape)


def _polyphase_input_gradient(
    cotangent: jax.Array, swapped: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """Input gradient for kernel 3, stride 2, padding 1, one phase of the output at a time.

    Along one axis, `input[2m]` meets tap 1 of `output[m]`; `input[2m + 1]` meets tap 2 of
    `output[m]` and tap 0 of `output[m + 1]`. So all four phases are one convolution with a 2 x 2
    kernel and four times the channels, followed by depth-to-space: no multiplication by the zeros
    of a dilated gradient.
    """
    zero = jnp.zeros_like(swapped[0])
    even = jnp.stack([swapped[1], zero])
    odd = jnp.stack([swapped[2], swapped[0]])
    by_row = jnp.stack([even, odd])  # [row phase, row tap, column, out, in]
    zero = jnp.zeros_like(by_row[:, :, 0])
    even = jnp.stack([by_row[:, :, 1], zero], axis=2)
    odd = jnp.stack([by_row[:, :, 2], by_row[:, :, 0]], axis=2)
    phases = jnp.stack([even, odd])  # [column phase, row phase, row tap, column tap, out, in]
    outputs, inputs = swapped.shape[2:]
    kernel = phases.transpose(2, 3, 4, 1, 0, 5).reshape(2, 2, outputs, 4 * inputs)
    by_phase = lax.conv_general_dilated(
        cotangent, kernel, (1, 1), ((0, 1), (0, 1)), dimension_numbers=_DIMENSIONS
    )
    batch, rows, columns, _ = by_phase.shape
    spread = by_phase.reshape(batch, rows, columns, 2, 2, inputs).transpose(0, 1, 3, 2, 4, 5)
    return spread.reshape(batch, 2 * rows, 2 * columns, inputs)[:, : shape[1], : shape[2]]
