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
    padding: int | tuple[int, int] | None = None,
    implementation: Implementation = "plain",
) -> jax.Array:
    """Cross-correlates images with a kernel, padded with zeros.

    Args:
        images: `[batch, height, width, in]`.
        kernel: `[k, k, in, out]`, of the dtype of `images`.
        stride: step in both directions.
        padding: zeros on every side, or (above and left, below and right); `k // 2` by default.
        implementation: `"plain"`, or `"canonical"` for the input gradient described above, which
            covers kernels 1 and 3 with padding `k // 2` and strides 1 and 2, and kernel 3 with
            padding (0, 1) and stride 2; other geometries are computed plainly.

    Returns:
        `[batch, (height + the padding of both sides - k) // stride + 1, ..., out]`.

    Raises:
        ValueError: on an unknown implementation.
    """
    size = kernel.shape[0]
    padding = size // 2 if padding is None else padding
    pads = (padding, padding) if isinstance(padding, int) else padding
    if implementation not in ("canonical", "plain"):
        raise ValueError(f"implementation must be 'canonical' or 'plain', got {implementation!r}")
    centred = pads == (size // 2, size // 2) and stride in (1, 2)
    covered = kernel.shape[:2] in ((1, 1), (3, 3)) and (
        centred or (size == 3 and stride == 2 and pads == (0, 1))
    )
    if implementation == "canonical" and covered:
        return _canonical(images, kernel, stride, pads)
    return _plain(images, kernel, stride, pads)


def _plain(images: jax.Array, kernel: jax.Array, stride: int, pads: tuple[int, int]) -> jax.Array:
    return lax.conv_general_dilated(
        images,
        kernel,
        window_strides=(stride, stride),
        padding=(pads, pads),
        dimension_numbers=_DIMENSIONS,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _canonical(
    images: jax.Array, kernel: jax.Array, stride: int, pads: tuple[int, int]
) -> jax.Array:
    return _plain(images, kernel, stride, pads)


def _forward(
    images: jax.Array, kernel: jax.Array, stride: int, pads: tuple[int, int]
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _canonical(images, kernel, stride, pads), (images, kernel)


def _backward(
    stride: int,
    pads: tuple[int, int],
    residuals: tuple[jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    images, kernel = residuals
    (kernel_gradient,) = jax.linear_transpose(lambda k: _plain(images, k, stride, pads), kernel)(
        cotangent
    )
    return _input_gradient(cotangent, kernel, stride, pads, images.shape), kernel_gradient


_canonical.defvjp(_forward, _backward)


def _input_gradient(
    cotangent: jax.Array,
    kernel: jax.Array,
    stride: int,
    pads: tuple[int, int],
    shape: tuple[int, ...],
) -> jax.Array:
    size = kernel.shape[0]
    swapped = kernel.transpose(0, 1, 3, 2)  # channels: out -> in
    if stride == 1:
        return _plain(cotangent, swapped[::-1, ::-1], 1, pads)
    if size == 1:
        dense = _plain(cotangent, swapped, 1, pads)
        rows, columns = (2 * n - 1 for n in dense.shape[1:3])
        dilation = [(0, 0, 0), (0, shape[1] - rows, 1), (0, shape[2] - columns, 1), (0, 0, 0)]
        return lax.pad(dense, jnp.zeros([], dense.dtype), dilation)
    return _polyphase_input_gradient(cotangent, swapped, pads, shape)


def _polyphase_input_gradient(
    cotangent: jax.Array, swapped: jax.Array, pads: tuple[int, int], shape: tuple[int, ...]
) -> jax.Array:
    """Input gradient for kernel 3, stride 2, one phase of the output at a time.

    Along one axis and with padding 1, `input[2m]` meets tap 1 of `output[m]`; `input[2m + 1]` meets
    tap 2 of `output[m]` and tap 0 of `output[m + 1]`. With padding (0, 1), `input[2m]` meets tap 2
    of `output[m - 1]` and tap 0 of `output[m]`, and `input[2m + 1]` tap 1 of `output[m]`. So all
    four phases are one convolution with a 2 x 2 kernel and four times the channels, followed by
    depth-to-space: no multiplication by the zeros of a dilated gradient.
    """

    def phases(taps: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the even and the odd inputs meet, by position."""
        alone, both = (taps[1], jnp.zeros_like(taps[1])), jnp.stack([taps[2], taps[0]])
        if pads == (1, 1):
            return jnp.stack(alone), both
        return both, jnp.stack(alone[::-1])

    by_row = jnp.stack(phases(swapped))  # [row phase, row tap, column, out, in]
    by_column = phases(jnp.moveaxis(by_row, 2, 0))  # [column tap, row phase, row tap, out, in]
    outputs, inputs = swapped.shape[2:]
    # [column phase, column tap, row phase, row tap, out, in], phases beside the channels
    kernel = jnp.stack(by_column).transpose(3, 1, 4, 2, 0, 5).reshape(2, 2, outputs, 4 * inputs)
    reach = ((0, 1), (0, 1)) if pads == (1, 1) else tuple((1, n % 2) for n in shape[1:3])
    by_phase = lax.conv_general_dilated(
        cotangent, kernel, (1, 1), reach, dimension_numbers=_DIMENSIONS
    )
    batch, rows, columns, _ = by_phase.shape
    spread = by_phase.reshape(batch, rows, columns, 2, 2, inputs).transpose(0, 1, 3, 2, 4, 5)
    return spread.reshape(batch, 2 * rows, 2 * columns, inputs)[:, : shape[1], : shape[2]]
