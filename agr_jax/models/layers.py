"""Layers that compute what PyTorch's compute: convolution, batch normalisation, linear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn.initializers import Initializer

from agr_jax.models.convolution import Implementation, convolve

torch_default_init = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(-1/sqrt(fan_in), 1/sqrt(fan_in)), which PyTorch gives every convolution and linear layer."""


def torch_bias_init(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the default of a PyTorch linear layer's bias."""
    bound = fan_in**-0.5

    def init(
        key: jax.Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None
    ) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound, out_sharding=out_sharding)

    return init


class Conv(nn.Module):
    """Convolution without bias.

    Attributes:
        features: output channels.
        kernel_size: k of a k x k kernel.
        stride: step in both directions.
        implementation: see `agr_jax.models.convolution`.
        kernel_init: initialiser of the kernel `[k, k, in, out]`.
        padding: see `convolve`; `k // 2` on every side by default.
        dtype: dtype of the computation.
        param_dtype: dtype of the kernel.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    implementation: Implementation = "plain"
    kernel_init: Initializer = torch_default_init
    padding: tuple[int, int] | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps `[batch, height, width, in]` to `[batch, height', width', features]`."""
        shape = (self.kernel_size, self.kernel_size, images.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        return convolve(
            images.astype(self.dtype),
            kernel.astype(self.dtype),
            stride=self.stride,
            padding=self.padding,
            implementation=self.implementation,
        )


class BatchNorm(nn.Module):
    """Batch normalisation over all but the last axis, as PyTorch computes it.

    Statistics are taken in at least float32, the variance in two passes. The running variance is
    the unbiased one (times n / (n - 1)), unlike that of `flax.linen.BatchNorm`.

    Attributes:
        momentum: weight of the new statistics in the running ones, PyTorch's convention.
        epsilon: added to the variance.
        axis_name: mapped axis (of `pmap` or `shard_map`) over which statistics are averaged. Not
            needed under `jit`, whose arrays are global.
        dtype: dtype of the output.
        param_dtype: dtype of scale, bias and running statistics.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5
    axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array, *, train: bool) -> jax.Array:
        """Normalises `[..., channels]` by the batch's statistics, or the running ones."""
        channels = features.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, self.param_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, self.param_dtype)

        wide = features.astype(jnp.promote_types(features.dtype, jnp.float32))
        if train:
            axes = tuple(range(features.ndim - 1))
            count = wide.size // wide.shape[-1]
            mean = self._average(wide.mean(axes))
            var = self._average(jnp.square(wide - self._wide(mean, wide)).mean(axes))
            if self.axis_name is not None:
                count = count * lax.axis_size(self.axis_name)
            if not self.is_initializing():
                unbiased = var * (count / max(count - 1, 1))
                for variable, new in ((running_mean, mean), (running_var, unbiased)):
                    old = variable.value
                    kept = (1 - self.momentum) * old + self.momentum * new.astype(old.dtype)
                    variable.value = kept
        else:
            mean, var = running_mean.value, running_var.value
        factor = scale.astype(wide.dtype) * lax.rsqrt(var.astype(wide.dtype) + self.epsilon)
        centred = wide - self._wide(mean, wide)
        normalised = centred * self._wide(factor, wide) + self._wide(bias, wide)
        return normalised.astype(self.dtype)

    def _average(self, statistics: jax.Array) -> jax.Array:
        return statistics if self.axis_name is None else lax.pmean(statistics, self.axis_name)

    @staticmethod
    def _wide(per_channel: jax.Array, like: jax.Array) -> jax.Array:
        return per_channel.astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


class Linear(nn.Module):
    """Affine map of the last axis.

    Attributes:
        features: output size.
        kernel_init: initialiser of the kernel `[in, out]`.
        zero_bias: start the bias at 0 instead of PyTorch's uniform default.
        dtype: dtype of the computation.
        param_dtype: dtype of kernel and bias.
    """

    features: int
    kernel_init: Initializer = torch_default_init
    zero_bias: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps `[batch, in]` to `[batch, features]`."""
        fan_in = inputs.shape[-1]
        bias_init = nn.initializers.zeros if self.zero_bias else torch_bias_init(fan_in)
        kernel = self.param("kernel", self.kernel_init, (fan_in, self.features), self.param_dtype)
        bias = self.param("bias", bias_init, (self.features,), self.param_dtype)
        product = inputs.astype(self.dtype) @ kernel.astype(self.dtype)
        return product + bias.astype(self.dtype)[None, :]


def per_channel(name: str, values: float | Sequence[float]) -> tuple[float, ...]:
    """A mean or standard deviation of images in [0, 1], one number for each channel or for all.

    Args:
        name: `"mean"` or `"std"`, for the error.
        values: a number, or a sequence of numbers.

    Raises:
        ValueError: if it is neither, or if a mean is not in [0, 1] or a standard deviation not
            above 0 and at most 1, as those of pixels in 0..255 are not.
    """
    numbers = as_numbers(name, values)
    least = "above 0" if name == "std" else "at least 0"
    if not all(0 <= number <= 1 for number in numbers) or (name == "std" and 0 in numbers):
        pixels = "; divide by 255 what is meant for pixels in 0..255" if max(numbers) > 1 else ""
        raise ValueError(
            f"{name} must be {least} and at most 1, as images are in [0, 1], got {numbers}{pixels}"
        )
    return numbers


def as_numbers(name: str, values: float | Sequence[float]) -> tuple[float, ...]:
    """The first part of `per_channel`: numbers, of whatever size."""
    array = np.asarray(values)
    if array.ndim > 1 or array.dtype.kind not in "iuf":
        raise ValueError(f"{name} must be a number, or one for each channel, got {values!r}")
    return tuple(map(float, array.ravel().tolist()))


def normalize(
    images: jax.Array,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    dtype: Any,
) -> jax.Array:
    """Scales images `[batch, height, width, channels]` in [0, 1] to `(images - mean) / std`.

    Raises:
        ValueError: if mean and std have neither one entry nor one for each channel, or are not
            those of images in [0, 1], see `per_channel`.
    """
    channels = images.shape[-1]
    mean, std = per_channel("mean", mean), per_channel("std", std)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise ValueError(f"{name} has {len(values)} entries for images of {channels} channels")
    centred = images - jnp.asarray(mean, images.dtype).reshape(1, 1, 1, -1)
    return (centred / jnp.asarray(std, images.dtype).reshape(1, 1, 1, -1)).astype(dtype)
