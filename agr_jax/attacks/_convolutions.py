"""Convolutions in the form that XLA's CPU compiler is fast at, whatever form they come in.

That compiler rewrites convolutions of other layouts, and the dilated ones of automatic
differentiation, at the top level of a program only. Inside a loop, such as the iterations of an
attack, they take a generic path that is 8 to 24 times slower. So they are rewritten here: images as
`[batch, *spatial, channels]`, kernels as `[*spatial, in, out]`, and no dilation of the images.

One with few channels in its result, such as the gradient of a network's first layer, mostly moves
data there. Here it is one matrix product, with the taps beside these channels.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# At most so many channels, and the products of all taps so many times as wide as the images.
_FEW, _WIDER = 12, 4


def is_fast(kernel: Any, parameters: Mapping[str, Any]) -> bool:
    """Whether a convolution has the fast form, or is one that is left as it is.

    Args:
        kernel: array, or its shape and dtype: the second operand, in its own layout.
        parameters: of a `conv_general_dilated` in a jaxpr.
    """
    numbers = parameters["dimension_numbers"]
    axes = len(numbers.lhs_spec)
    last_channels = (0, axes - 1, *range(1, axes - 1))
    layout = (last_channels, (axes - 1, axes - 2, *range(axes - 2)), last_channels)
    if parameters["batch_group_count"] != 1 or parameters.get("out_sharding") is not None:
        return True  # gradients of the kernels of grouped convolutions; placed by the user
    plain = all(dilation == 1 for dilation in parameters["lhs_dilation"])
    if not plain or tuple(map(tuple, numbers)) != layout:
        return False
    return not _Convolution.of(parameters).has_few_outputs(kernel)


def fast(images: jax.Array, kernel: jax.Array, parameters: Mapping[str, Any]) -> jax.Array:
    """The convolution's result, by convolutions of the fast form and matrix products alone.

    Args:
        images: its first operand, in its own layout.
        kernel: its second.
        parameters: of a `conv_general_dilated` in a jaxpr, not `is_fast`.
    """
    numbers = parameters["dimension_numbers"]
    batch, channels, *spatial = numbers.lhs_spec
    outputs, inputs, *taps = numbers.rhs_spec
    images = images.transpose(batch, *spatial, channels)
    kernel = kernel.transpose(*taps, inputs, outputs)
    convolution = _Convolution.of(parameters)
    dilation = tuple(parameters["lhs_dilation"])
    if all(each == 1 for each in dilation):
        result = convolution(images, kernel)
    elif all(each == 1 for each in convolution.strides + convolution.kernel_dilation):
        result = _by_phase(convolution, images, kernel, dilation)
    else:
        result = convolution(_dilated(images, dilation), kernel)
    batch, channels, *spatial = numbers.out_spec
    axes = np.empty(result.ndim, int)
    axes[[batch, *spatial, channels]] = np.arange(result.ndim)
    return result.transpose(axes)


class _Convolution(NamedTuple):
    """A convolution of canonical layout, without dilation of the images."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    kernel_dilation: tuple[int, ...]
    groups: int
    precision: Any
    element_type: Any

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> _Convolution:
        """With the parameters of a `conv_general_dilated`."""
        return cls(
            strides=tuple(parameters["window_strides"]),
            padding=tuple((low, high) for low, high in parameters["padding"]),
            kernel_dilation=tuple(parameters["rhs_dilation"]),
            groups=parameters["feature_group_count"],
            precision=parameters["precision"],
            element_type=parameters["preferred_element_type"],
        )

    def has_few_outputs(self, kernel: Any) -> bool:
        """Whether one matrix product is faster, for a kernel `[*taps, in, out]`.

        Of dtypes whose sums may be taken in parts.
        """
        *taps, inputs, outputs = kernel.shape
        dtypes = {jnp.dtype(kernel.dtype), jnp.dtype(self.element_type or kernel.dtype)}
        few = outputs <= _FEW and math.prod(taps) * outputs <= _WIDER * inputs
        simple = self.groups == 1 and self.strides == (1,) * len(taps) and math.prod(taps) > 1
        return few and simple and dtypes <= {jnp.dtype("f4"), jnp.dtype("f8")}

    def __call__(self, images: jax.Array, kernel: jax.Array) -> jax.Array:
        if self.has_few_outputs(kernel):
            return self._of_products(images, kernel)
        padding = self.padding
        if any(min(pads) < 0 for pads in padding):
            images = lax.pad(images, jnp.zeros([], images.dtype), _borders(padding))
            padding = ((0, 0),) * len(padding)
        axes = images.ndim
        layout = (0, axes - 1, *range(1, axes - 1))
        return lax.conv_general_dilated(
            images,
            kernel,
            window_strides=self.strides,
            padding=padding,
            rhs_dilation=self.kernel_dilation,
            dimension_numbers=lax.ConvDimensionNumbers(
                layout, (axes - 1, axes - 2, *range(axes - 2)), layout
            ),
            feature_group_count=self.groups,
            precision=self.precision,
            preferred_element_type=self.element_type,
        )

    def _of_products(self, images: jax.Array, kernel: jax.Array) -> jax.Array:
        """The images times each tap, added up where the taps meet."""
        *taps, inputs, outputs = kernel.shape
        padded = lax.pad(images, jnp.zeros([], images.dtype), _borders(self.padding))
        products = lax.dot_general(
            padded,
            jnp.moveaxis(kernel, -2, 0).reshape(inputs, -1),
            (((padded.ndim - 1,), (0,)), ((), ())),
            precision=self.precision,
            preferred_element_type=self.element_type,
        ).reshape(*padded.shape[:-1], -1, outputs)
        parts = []
        for index, tap in enumerate(itertools.product(*map(range, taps))):
            axes = zip(tap, taps, padded.shape[1:-1], self.kernel_dilation, strict=True)
            meets = [slice(at * gap, size - (of - 1 - at) * gap) for at, of, size, gap in axes]
            parts.append(products[:, *meets, index])
        return functools.reduce(jnp.add, parts)


def _borders(pads: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """Of `lax.pad`, for images `[batch, *spatial, channels]`."""
    return [(0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)]


def _dilated(images: jax.Array, dilation: Sequence[int]) -> jax.Array:
    gaps = [(0, 0, 0), *((0, 0, each - 1) for each in dilation), (0, 0, 0)]
    return lax.pad(images, jnp.zeros([], images.dtype), gaps)


class _Axis(NamedTuple):
    """How one axis of a convolution of dilated images splits into phases of its output.

    `output[d q + p]` meets `images[q + first + shifts[p] + w]` with the tap `taps[p, w]`; the tap
    -1 is zero.
    """

    taps: np.ndarray
    first: int
    shifts: list[int]
    phases: list[int]  # those that meet a tap
    length: int  # of the output


def _axis(size: int, taps: int, dilation: int, pads: Sequence[int]) -> _Axis:
    low, high = pads
    length = (size - 1) * dilation + 1 + low + high - taps + 1
    meetings: dict[int, dict[int, int]] = {phase: {} for phase in range(dilation)}
    for phase, tap in itertools.product(range(dilation), range(taps)):
        offset, gap = divmod(phase - low + tap, dilation)
        if gap == 0:
            meetings[phase][offset] = tap
    first = min(min(offsets) for offsets in meetings.values() if offsets)
    width = max(map(len, meetings.values()))
    table, shifts = np.full([dilation, width], -1), []
    for phase, offsets in meetings.items():
        # As few as make room for the phase's last tap: most phases need none.
        shift = max(max(offsets, default=first) - first - width + 1, 0)
        shifts.append(shift)
        for offset, tap in offsets.items():
            table[phase, offset - first - shift] = tap
    phases = [phase for phase, offsets in meetings.items() if offsets]
    return _Axis(table, first, shifts, phases, length)


def _at_taps(kernel: jax.Array, taps: np.ndarray, axis: int) -> jax.Array:
    """`jnp.take` along an axis, with zeros for the tap -1, by slices that the compiler sees."""
    rows = [lax.index_in_dim(kernel, tap, axis, keepdims=False) for tap in range(taps.max() + 1)]
    rows.append(jnp.zeros_like(rows[0]))
    of_phases = [jnp.stack([rows[tap] for tap in phase], axis) for phase in taps]
    return jnp.stack(of_phases, axis)


def _shifted(
    result: jax.Array, shifts: Sequence[int], count: int, places: int, phases: int
) -> jax.Array:
    """Along the axis `places`, so many from each phase's own first."""
    if not any(shifts):
        return result
    parts = [
        lax.slice_in_dim(
            lax.slice_in_dim(result, phase, phase + 1, axis=phases),
            shift,
            shift + count,
            axis=places,
        )
        for phase, shift in enumerate(shifts)
    ]
    return lax.concatenate(parts, phases)


def _kernel_of_phases(
    kernel: jax.Array, axes: list[_Axis], kept: list[Any], groups: int
) -> jax.Array:
    """The kernels of all phases side by side: `[*taps, in, groups x phases x out of a group]`."""
    spatial = len(axes)
    for index, (axis, phases) in enumerate(zip(axes, kept, strict=True)):
        kernel = _at_taps(kernel, axis.taps[phases], 2 * index)
    # From [phase, tap] for each axis, then in, out.
    kernel = kernel.reshape(*kernel.shape[:-1], groups, kernel.shape[-1] // groups)
    widths = kernel.shape[1 : 2 * spatial : 2]
    kernel = kernel.transpose(
        *range(1, 2 * spatial, 2),
        2 * spatial,
        2 * spatial + 1,
        *range(0, 2 * spatial, 2),
        2 * spatial + 2,
    )
    return kernel.reshape(*widths, kernel.shape[spatial], -1)


def _by_phase(
    convolution: _Convolution, images: jax.Array, kernel: jax.Array, dilation: tuple[int, ...]
) -> jax.Array:
    """A convolution of dilated images, such as the input gradient of one with strides.

    One convolution gives all phases of the output, side by side in its channels: no multiplication
    by the zeros between the images' pixels.
    """
    spatial = len(dilation)
    axes = [
        _axis(*each)
        for each in zip(
            images.shape[1:-1], kernel.shape[:-2], dilation, convolution.padding, strict=True
        )
    ]
    if min(axis.length for axis in axes) < 1:
        return convolution(_dilated(images, dilation), kernel)
    kept = [
        axis.phases if len(axis.phases) == 1 else list(range(each))
        for axis, each in zip(axes, dilation, strict=True)
    ]
    counts = [len(phases) for phases in kept]
    shifts = [
        [axis.shifts[phase] for phase in phases] for axis, phases in zip(axes, kept, strict=True)
    ]
    groups, outputs = convolution.groups, kernel.shape[-1] // convolution.groups
    kernel = _kernel_of_phases(kernel, axes, kept, groups)
    widths = kernel.shape[:spatial]
    steps = [-(-axis.length // each) for axis, each in zip(axes, dilation, strict=True)]
    places = [count + max(shift) for count, shift in zip(steps, shifts, strict=True)]
    padding = tuple(
        (-axis.first, count - 1 + axis.first + width - size)
        for axis, count, width, size in zip(axes, places, widths, images.shape[1:-1], strict=True)
    )
    result = convolution._replace(padding=padding)(images, kernel)
    result = result.reshape(result.shape[0], *places, groups, *counts, outputs)
    for index, (count, shift) in enumerate(zip(steps, shifts, strict=True)):
        result = _shifted(result, shift, count, 1 + index, 2 + spatial + index)
    interleaved = [(1 + index, 2 + spatial + index) for index in range(spatial)]
    result = result.transpose(
        0, *itertools.chain(*interleaved), 1 + spatial, 2 + 2 * spatial
    ).reshape(
        result.shape[0],
        *(count * phases for count, phases in zip(steps, counts, strict=True)),
        groups * outputs,
    )
    # Phases that meet no tap are zeros between the others.
    gaps = [
        (phases[0], each - 1 - phases[-1], each // len(phases) - 1)
        for phases, each in zip(kept, dilation, strict=True)
    ]
    if any(any(gap) for gap in gaps):
        result = lax.pad(result, jnp.zeros([], result.dtype), [(0, 0, 0), *gaps, (0, 0, 0)])
    return lax.slice(
        result,
        [0] * result.ndim,
        [result.shape[0], *(axis.length for axis in axes), result.shape[-1]],
    )
