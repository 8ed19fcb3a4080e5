"""Gowal et al.'s networks against their published PyTorch code, as RobustBench keeps it.

`tests/golden/silu_networks.npz` holds logits and input gradients of that code in float64, on
weights that are drawn here again by the tensors' names.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agr_jax import models
from agr_jax.errors import CheckpointError
from agr_jax.interop import load_torch_weights, save_torch_weights

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
NETWORKS = {"wrn16_2_silu": 16, "preactresnet18_silu": 8}  # and their widths


def draw(name, shape):
    rng = np.random.default_rng(list(name.encode()))
    if name.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape)
    if len(shape) > 1:
        return rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
    if name.endswith("weight"):
        return rng.uniform(0.5, 1.5, shape)
    return 0.1 * rng.normal(size=shape)


@pytest.fixture(scope="module", params=NETWORKS)
def file(request, tmp_path_factory):
    """A file of drawn weights, by the names that we write."""
    path = tmp_path_factory.mktemp("silu") / "weights.npz"
    model = models.create(request.param, 10, width=NETWORKS[request.param], param_dtype=jnp.float64)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros([1, 8, 8, 3]))
    save_torch_weights(path, model, variables)
    with np.load(path) as written:
        shapes = {name: value.shape for name, value in written.items() if value.dtype == np.float64}
    tensors = {name: draw(name, shape) for name, shape in shapes.items()}
    np.savez(path, **tensors)
    return request.param, path, tensors


@pytest.mark.parametrize("conv", [pytest.param("canonical", marks=pytest.mark.slow), "plain"])
def test_logits_and_input_gradient(golden, file, conv):
    name, path, tensors = file
    expected = golden("silu_networks.npz")
    assert sorted(tensors) == expected[f"{name}/names"].tolist()
    classifier = load_torch_weights(
        path, mean=MEAN, std=STD, conv=conv, dtype=jnp.float64, param_dtype=jnp.float64
    )
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 32, 32, 3)))
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, 10)))

    @jax.jit
    def logits_and_gradient(classifier, images):
        logits, pullback = jax.vjp(classifier, images)
        return logits, *pullback(weights)

    logits, gradient = logits_and_gradient(classifier, images)
    for got, key in ((logits, "logits"), (gradient, "gradient")):
        scale = np.abs(expected[f"{name}/{key}"]).max()
        np.testing.assert_allclose(got, expected[f"{name}/{key}"], rtol=0, atol=1e-12 * scale)


@pytest.mark.slow
def test_a_file_of_another_network_is_named(file):
    name, path, _ = file
    relu = name.removesuffix("_silu")
    with pytest.raises(CheckpointError, match=f"tensors of '{name}', not of '{relu}'"):
        load_torch_weights(path, name=relu, mean=MEAN, std=STD)
    other = path.with_name("relu.npz")
    model = models.create(relu, 10, width=8, param_dtype=jnp.float64)
    save_torch_weights(other, model, model.init(jax.random.key(0), jnp.zeros([1, 8, 8, 3])))
    with pytest.raises(CheckpointError, match=f"tensors of '{relu}', not of '{name}'"):
        load_torch_weights(other, name=name)
