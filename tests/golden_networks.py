"""The small networks of the reference attack runs, as pytree callables on NHWC images."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def _convolve(features: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Stride 2, padding 1, then ReLU; the kernel is in PyTorch's layout.

    As a product with patches: XLA's CPU compiler is slow at a convolution's gradient in a loop.
    """
    size = kernel.shape[2]
    padded = jnp.pad(features, ((0, 0), (1, 1), (1, 1), (0, 0)))
    last = padded.shape[1] - size + 1
    patches = jnp.concatenate(
        [padded[:, i : i + last : 2, j : j + last : 2] for i in range(size) for j in range(size)],
        -1,
    )
    weights = kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0])
    return jax.nn.relu(patches @ weights + bias[None, None, None])


def _flatten(features: jax.Array) -> jax.Array:
    """In PyTorch's order, channels first."""
    return features.transpose(0, 3, 1, 2).reshape(len(features), -1)


def _random_network(weights: Mapping[str, jax.Array], images: jax.Array) -> jax.Array:
    features = _convolve(images - 0.5, weights["conv1"], weights["bias1"])
    features = _convolve(features, weights["conv2"], weights["bias2"])
    return _flatten(features) @ weights["linear"].T + weights["bias3"][None]


def random_network(dtype: Any = np.float32) -> jax.tree_util.Partial:
    """The network `tiny` and `small`: golden/README.md, seed 701."""
    rs = np.random.RandomState(701)
    weights = {}
    for index, (outputs, inputs) in enumerate([(8, 3), (16, 8)], 1):
        kernel = rs.standard_normal((outputs, inputs, 3, 3))
        weights[f"conv{index}"] = kernel * np.sqrt(2 / (inputs * 9))
        weights[f"bias{index}"] = 0.1 * rs.standard_normal(outputs)
    weights["linear"] = rs.standard_normal((10, 1024)) * 3 * np.sqrt(1 / 1024)
    weights["bias3"] = 0.1 * rs.standard_normal(10)
    return jax.tree_util.Partial(
        _random_network, {k: jnp.asarray(v.astype(np.float32), dtype) for k, v in weights.items()}
    )


def _trained_network(weights: Mapping[str, jax.Array], images: jax.Array) -> jax.Array:
    features = (images - weights["mean"].reshape(1, 1, 1, -1)) / weights["std"].reshape(1, 1, 1, -1)
    features = _convolve(features, weights["0.weight"], weights["0.bias"])
    features = _convolve(features, weights["2.weight"], weights["2.bias"])
    hidden = jax.nn.relu(_flatten(features) @ weights["5.weight"].T + weights["5.bias"][None])
    return hidden @ weights["7.weight"].T + weights["7.bias"][None]


def trained_network(stored: Mapping[str, np.ndarray], dtype: Any = np.float32) -> Any:
    """`cifar_cnn_a_adv` or `mnist_pgd_madry`, from its stored weights."""
    names = [f"{layer}.{part}" for layer in (0, 2, 5, 7) for part in ("weight", "bias")]
    weights = {name: jnp.asarray(stored[name], dtype) for name in (*names, "mean", "std")}
    return jax.tree_util.Partial(_trained_network, weights)
