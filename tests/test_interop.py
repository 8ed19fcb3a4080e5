"""PyTorch-named weights: round trips, PyTorch's own files, and every way a file can be wrong."""

import json
import re
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from official_weights import in_torch_layout, state_dict_shapes

from agr_jax import models
from agr_jax.errors import CheckpointError
from agr_jax.interop import (
    load_torch_weights,
    save_torch_weights,
    torch_names,
    torch_weights,
    weight_files,
)
from examples import pytorch_weights

IMAGES = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 32, 32, 3)), jnp.float32)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}
SUFFIXES = [".safetensors", ".npz"]


def random_variables(model, seed=1):
    """Every leaf different from its start, statistics too; quicker than to compile `init`."""
    rng = np.random.default_rng(seed)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)

    def draw(leaf):
        if len(leaf.shape) > 1:
            value = rng.normal(size=leaf.shape) * np.prod(leaf.shape[:-1]) ** -0.5
        else:
            value = rng.uniform(0.5, 1.5, leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    return jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0), images))


def network(name, classes=10):
    model = models.create(name, classes, width=8, mean=MEAN, std=STD)
    return model, random_variables(model)


@pytest.fixture(scope="module", params=["preactresnet18", "wrn10_1"])
def small(request):
    return request.param, *network(request.param)


@pytest.fixture(scope="module")
def wide():
    """The tensors of a WideResNet's file, without metadata: the smallest that has every kind."""
    return written(*network("wrn10_1"))


def written(model, variables):
    """Tensors as PyTorch's state_dict has them."""
    leaves = torch_names.by_tensor_name(variables, torch_names.network_name(model))
    return {name: torch_weights.to_torch(leaf) for name, leaf in leaves.items()}


def write(path, tensors, metadata=None):
    """A file that somebody else wrote."""
    tensors = {name: np.array(value, order="C") for name, value in tensors.items()}
    if path.suffix == ".npz":
        about = {} if metadata is None else {"__metadata__": np.frombuffer(metadata, np.uint8)}
        np.savez(path, **about, **tensors)
    else:
        about = None if metadata is None else {"agr_jax": metadata.decode()}
        path.write_bytes(safetensors.numpy.save(tensors, metadata=about))
    return path


def refused(path, *parts, **options):
    """The message of the one error, which names the file and has all the parts."""
    with pytest.raises(CheckpointError) as error:
        load_torch_weights(path, **options)
    message = str(error.value)
    for part in (str(path), *parts):
        assert part in message, message
    return message


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, jax.tree_util.keystr(path))


# ---- round trips


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip_keeps_every_bit(small, suffix, tmp_path):
    _, model, variables = small
    path = tmp_path / f"weights{suffix}"
    save_torch_weights(path, model, variables)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    classifier = load_torch_weights(path)
    assert isinstance(classifier, models.Classifier)
    assert classifier.model == model  # sizes and normalisation
    assert_same(classifier.variables, variables)
    expected = jax.jit(model.apply)(variables, IMAGES)
    np.testing.assert_array_equal(jax.jit(lambda c, x: c(x))(classifier, IMAGES), expected)
    first = path.read_bytes()
    save_torch_weights(path, classifier.model, classifier.variables)
    assert path.read_bytes() == first


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_metadata(small, suffix, tmp_path):
    name, model, variables = small
    path = tmp_path / f"weights{suffix}"
    save_torch_weights(str(path), model, variables)
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            assert file["__metadata__"].dtype == np.uint8
            metadata = bytes(file["__metadata__"])
    else:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata()["agr_jax"]
    assert json.loads(metadata) == {
        "format_version": weight_files.FORMAT_VERSION,
        "name": name,
        "width": 8,
        "num_classes": 10,
        "mean": list(MEAN),
        "std": list(STD),
    }
    same = load_torch_weights(path, name=name, mean=MEAN, std=np.asarray(STD))
    assert same.model == model


def test_one_number_for_all_channels_is_the_same_normalisation(tmp_path):
    model = models.create("wrn10_1", 3, width=4)
    path = tmp_path / "weights.npz"
    save_torch_weights(path, model, random_variables(model))
    assert load_torch_weights(path, **PLAIN).model == model


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_names_layouts_and_counters(suffix, tmp_path):
    model, variables = network("preactresnet18")
    path = tmp_path / f"weights{suffix}"
    save_torch_weights(path, model, variables)
    with np.load(path) if suffix == ".npz" else open_safetensors(path) as file:
        tensors = {name: file[name] for name in file if name != "__metadata__"}
    for name, shape in state_dict_shapes(width=8):
        collection = "batch_stats" if "running" in name else "params"
        expected = in_torch_layout(variables[collection], name)
        value = tensors.pop(name)
        assert (value.shape, value.dtype) == (shape, np.float32)
        np.testing.assert_array_equal(value, expected, name)
    assert len(tensors) == 17
    for name, value in tensors.items():
        assert name.endswith(".num_batches_tracked")
        assert (value.shape, value.dtype, int(value)) == ((), np.int64, 0)


class open_safetensors(dict):  # noqa: N801
    def __init__(self, path):
        super().__init__(safetensors.numpy.load_file(path))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


def test_names_of_a_wide_resnet(wide):
    assert {name for name in wide if "running" not in name and "bn" not in name} == {
        "conv1.weight",
        "block1.layer.0.conv1.weight",
        "block1.layer.0.conv2.weight",
        "block2.layer.0.conv1.weight",
        "block2.layer.0.conv2.weight",
        "block2.layer.0.convShortcut.weight",
        "block3.layer.0.conv1.weight",
        "block3.layer.0.conv2.weight",
        "block3.layer.0.convShortcut.weight",
        "fc.weight",
        "fc.bias",
    }
    assert wide["bn1.running_var"].shape == (32,)
    assert wide["block1.layer.0.bn2.weight"].shape == (8,)
    assert wide["fc.weight"].shape == (10, 32)


def test_strided_arrays_are_written_as_what_they_hold(tmp_path):
    """The trap: safetensors 0.8 (not 0.5) writes a strided array's memory, not its values."""
    model, variables = network("wrn10_1")
    kernel = variables["params"]["conv1"]["kernel"]
    variables["params"]["conv1"]["kernel"] = np.asfortranarray(kernel)
    variables["params"]["fc"]["kernel"] = np.asarray(variables["params"]["fc"]["kernel"]).T.copy().T
    save_torch_weights(tmp_path / "weights.safetensors", model, variables)
    tensors = safetensors.numpy.load_file(tmp_path / "weights.safetensors")
    np.testing.assert_array_equal(
        tensors["conv1.weight"], np.einsum("hwio->oihw", np.asarray(kernel))
    )
    np.testing.assert_array_equal(tensors["fc.weight"], variables["params"]["fc"]["kernel"].T)
    assert all(value.flags.c_contiguous for value in written(model, variables).values())


def test_half_precision(tmp_path):
    model = models.create("wrn10_1", 10, width=4, param_dtype=jnp.bfloat16)
    variables = random_variables(model)
    save_torch_weights(tmp_path / "weights.npz", model, variables)
    assert_same(
        load_torch_weights(tmp_path / "weights.npz").variables,
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), variables),
    )
    again = load_torch_weights(tmp_path / "weights.npz", param_dtype=jnp.bfloat16)
    assert_same(again.variables, variables)
    assert again.model.param_dtype == jnp.bfloat16


# ---- files of other people: no metadata


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("model", "channels"),
    [
        (models.create("preactresnet18", 7, width=4), 3),
        (models.create("wrn10_1", 10), 1),
        (models.create("wrn16_3", 100, width=4), 3),
    ],
)
def test_architecture_is_inferred(model, channels, suffix, tmp_path):
    images = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    variables = jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape), jax.eval_shape(model.init, jax.random.key(0), images)
    )
    path = write(tmp_path / f"weights{suffix}", written(model, variables))
    classifier = load_torch_weights(path, mean=(0.5,), std=(0.25,) * channels)
    assert classifier.model == model.clone(mean=(0.5,), std=(0.25,) * channels)
    assert_same(classifier.variables, variables)


def test_normalisation_must_be_given_where_the_file_has_none(wide, tmp_path):
    path = write(tmp_path / "weights.safetensors", wide)
    for options in ({}, {"mean": MEAN}, {"std": STD}):
        refused(
            path,
            "normalisation does not travel in this file; pass mean= and std=, e.g. (0, 0, 0), "
            "(1, 1, 1) if the network normalises nothing",
            **options,
        )
    refused(path, "mean must be 1 or 3 numbers", mean=(0, 0), std=STD)
    refused(path, "std must be 1 or 3 numbers, positive", mean=MEAN, std=(1, 0, 1))
    refused(path, "mean must be 1 or 3 numbers", mean=(0, float("nan"), 0), std=STD)
    refused(path, "mean must be 1 or 3 numbers", mean=(), std=STD)


@pytest.mark.parametrize("prefix", ["module.", "model.", "1.", "module.model.", "_orig_mod."])
def test_wrapper_prefixes_are_taken_off(wide, prefix, tmp_path):
    model, variables = network("wrn10_1")
    counters = {"bn1.num_batches_tracked": np.zeros((), np.int64)}
    tensors = {prefix + name: value for name, value in {**wide, **counters}.items()}
    path = write(tmp_path / "weights.safetensors", tensors)
    classifier = load_torch_weights(path, mean=MEAN, std=STD)
    assert classifier.model == model
    assert_same(classifier.variables, variables)
    del tensors[f"{prefix}bn1.bias"]
    path = write(tmp_path / "weights.npz", tensors)
    refused(path, "missing tensors: 'bn1.bias'", f"without their prefix '{prefix}'", **PLAIN)


def test_a_prefix_on_some_names_is_not_one(wide, tmp_path):
    tensors = {f"1.{name}": value for name, value in wide.items()}
    path = write(tmp_path / "weights.npz", {**tensors, "0.mean": np.zeros(3, np.float32)})
    refused(path, "neither a PreAct-ResNet-18", "nor a WideResNet", "'0.mean', '1.block1", "more")


def test_last_layer_of_the_agr_code_and_unused_stage_of_trades(wide, tmp_path):
    _, variables = network("wrn10_1")
    tensors = {re.sub(r"^fc\.", "linear.", name): value for name, value in wide.items()}
    for name in list(tensors):
        if name.startswith("block1."):
            tensors[f"sub_{name}"] = np.zeros_like(tensors[name])
    path = write(tmp_path / "weights.npz", tensors)
    assert_same(load_torch_weights(path, **PLAIN).variables, variables)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floating_dtypes(wide, dtype, suffix, tmp_path):
    tensors = {name: value.astype(dtype) for name, value in wide.items()}
    path = write(tmp_path / f"weights{suffix}", tensors)
    variables = load_torch_weights(path, **PLAIN).variables
    expected = tensors["conv1.weight"].astype(np.float32).transpose(2, 3, 1, 0)
    assert variables["params"]["conv1"]["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(variables["params"]["conv1"]["kernel"], expected)


def test_bfloat16_has_equal_values(wide, tmp_path):
    tensors = {name: value.astype(jnp.bfloat16) for name, value in wide.items()}
    path = tmp_path / "weights.safetensors"
    path.write_bytes(safetensors.numpy.save(tensors))  # what NumPy itself has no dtype for
    with safetensors.safe_open(path, framework="numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    got = load_torch_weights(path, **PLAIN).variables
    model, _ = network("wrn10_1")
    for name, leaf in torch_names.by_tensor_name(got, "wrn10_1").items():
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(
            torch_weights.to_torch(leaf), tensors[name].astype(np.float32)
        )
    as_saved = load_torch_weights(path, param_dtype=jnp.bfloat16, **PLAIN)
    assert_same(as_saved.variables, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), got))
    assert_close(
        jax.jit(model.clone(mean=(0.0,), std=(1.0,)).apply)(got, IMAGES),
        jax.jit(lambda c, x: c(x))(load_torch_weights(path, mean=0, std=1), IMAGES),
    )
    npz = write(tmp_path / "weights.npz", tensors)
    refused(npz, "is |V2, expected float16", "npz does not keep bfloat16: save it as", **PLAIN)


@pytest.mark.parametrize("kind", [float, np.float32, np.array, jnp.float32])
def test_a_number_is_the_normalisation_of_all_channels(wide, kind, tmp_path):
    path = write(tmp_path / "weights.npz", wide)
    model = load_torch_weights(path, mean=kind(0.5), std=kind(0.25)).model
    assert (model.mean, model.std) == ((0.5,), (0.25,))
    assert load_torch_weights(path, mean=0, std=1).model.std == (1.0,)


@pytest.mark.parametrize(
    ("mean", "std", "part"),
    [
        ((125.3, 123.0, 113.9), (0.2, 0.2, 0.2), "mean must be at least 0 and at most 1"),
        (MEAN, (63.0, 62.1, 66.7), "std must be above 0 and at most 1, as images are in [0, 1]"),
        (127.5, 127.5, "got (127.5,); divide by 255 what is meant for pixels in 0..255"),
        ((0.1, -0.1, 0.1), STD, "mean must be at least 0 and at most 1"),
        ("0.5", STD, "mean must be a number, or one for each channel, got '0.5'"),
        ([MEAN], STD, "mean must be a number, or one for each channel, got [("),
        (MEAN, True, "std must be a number, or one for each channel, got True"),
    ],
)
def test_normalisations_that_are_none_of_images(wide, mean, std, part, tmp_path):
    refused(write(tmp_path / "weights.npz", wide), part, mean=mean, std=std)
    own = {"mu": np.full(3, 125.3, np.float32), "sigma": np.full(3, 63, np.float32)}
    path = write(tmp_path / "own.npz", {**wide, **own})
    refused(path, "mean must be at least 0 and at most 1", "divide by 255")


@pytest.fixture(scope="module")
def wrn28_4():
    """The tensors of RobustBench's Ding2020MMA, in names and shapes."""
    model = models.create("wrn28_4", 10)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    return written(model, jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_what_may_standardise_each_image_needs_a_word(wrn28_4, prefix, tmp_path):
    named = {prefix + name: value for name, value in wrn28_4.items()}
    path = write(tmp_path / "weights.safetensors", named)
    for options in ({}, PLAIN, {"name": "wrn28_4", **PLAIN}):
        refused(
            path,
            "RobustBench's Ding2020MMA has the tensors of this WideResNet-28-4",
            "standardises each image by its own mean and standard deviation",
            "pass normalisation='fixed', mean= and std=",
            **options,
        )
    refused(path, "no network here standardises each image", normalisation="per_image", **PLAIN)
    refused(path, "must be 'fixed', 'per_image' or None", normalisation="none", **PLAIN)
    refused(path, "normalisation does not travel", normalisation="fixed")
    classifier = load_torch_weights(path, normalisation="fixed", **PLAIN)
    assert classifier.model == models.create("wrn28_4", 10, mean=(0, 0, 0), std=(1, 1, 1))


def test_files_that_say_how_they_normalise_need_no_word(wrn28_4, wide, tmp_path):
    buffers = {"mu": np.float32(MEAN), "sigma": np.float32(STD)}
    loaded = load_torch_weights(write(tmp_path / "buffers.npz", {**wrn28_4, **buffers}))
    save_torch_weights(tmp_path / "own.npz", loaded.model, loaded.variables)
    assert load_torch_weights(tmp_path / "own.npz").model == loaded.model
    refused(tmp_path / "own.npz", "no network here", normalisation="per_image")
    path = write(tmp_path / "other_size.npz", wide)
    assert load_torch_weights(path, normalisation="fixed", mean=0.5, std=0.5).model.mean == (0.5,)
    refused(path, "or 0.5 and 0.5 if it computes 2 * x - 1")


# ---- errors on reading


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_wrong_tensors_are_named(wide, suffix, tmp_path):
    tensors = dict(wide)
    del tensors["block2.layer.0.bn1.running_mean"]
    tensors["block2.layer.0.conv3.weight"] = np.ones(3, np.float32)
    tensors["bn1.weight"] = np.ones(33, np.float32)
    path = write(tmp_path / f"weights{suffix}", tensors)
    refused(
        path,
        "does not hold a wrn10_1 of width 8 with 10 classes",
        "missing tensors: 'block2.layer.0.bn1.running_mean'",
        "unexpected tensors: 'block2.layer.0.conv3.weight'",
        "'bn1.weight' has shape (33,), expected (32,)",
    )


@pytest.mark.parametrize(
    ("tensor", "shape", "parts"),
    [
        ("conv1.weight", None, ["missing tensor 'conv1.weight'; it holds"]),
        ("conv1.weight", (8,), ["'conv1.weight' has shape (8,), expected (width, channels, 3, 3)"]),
        ("conv1.weight", (0, 3, 3, 3), ["'conv1.weight' has shape (0, 3, 3, 3), expected"]),
        ("conv1.weight", (3, 3, 3, 3), ["has 8 outputs, expected a multiple of the width", "3"]),
        ("conv1.weight", (8, 3, 5, 5), ["shape (8, 3, 5, 5), expected (8, 3, 3, 3)"]),
        ("block1.layer.0.conv1.weight", None, ["missing tensor 'block1.layer.0.conv1.weight'"]),
        ("fc.weight", None, ["missing tensor 'fc.weight'"]),
        ("fc.weight", (32, 10), ["'fc.weight' has shape (32, 10), expected (32, 32)", "'fc.bias'"]),
        ("fc.bias", (), ["'fc.bias' has shape (), expected (10,)"]),
    ],
)
def test_sizes_that_cannot_be_inferred(wide, tensor, shape, parts, tmp_path):
    tensors = {name: value for name, value in wide.items() if name != tensor}
    if shape is not None:
        tensors[tensor] = np.ones(shape, np.float32)
    refused(write(tmp_path / "weights.npz", tensors), *parts, **PLAIN)


def test_other_networks_are_refused(wide, tmp_path):
    path = write(tmp_path / "weights.npz", {"features.0.weight": np.ones([8, 3, 3, 3])})
    refused(path, "neither a PreAct-ResNet-18", "'weight'", "prefix 'features.0.'", **PLAIN)
    write(path, {})
    refused(path, "neither a PreAct-ResNet-18", "it holds nothing", **PLAIN)
    # An ordinary ResNet-18: its normalisations come after the convolutions.
    tensors = {
        name: np.ones(shape, np.float32)
        for name, shape in state_dict_shapes(width=4)
        if not name.startswith("bn.")
    }
    tensors["bn1.weight"] = np.ones(4, np.float32)
    write(path, tensors)
    refused(path, "missing tensors: 'bn.bias'", "unexpected tensors: 'bn1.weight'", **PLAIN)
    write(path, wide)
    refused(
        path,
        "holds the tensors of 'wrn10_1', not of 'wrn34_10'",
        name="wrn34_10",
        mean=MEAN,
        std=STD,
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_values(wide, value, suffix, tmp_path):
    tensors = {name: array.copy() for name, array in wide.items()}
    tensors["bn1.running_var"][3] = value
    path = write(tmp_path / f"weights{suffix}", tensors)
    refused(path, "NaN or infinite in 'bn1.running_var'", **PLAIN)


def test_values_that_the_dtype_cannot_hold(wide, tmp_path):
    path = write(tmp_path / "weights.npz", {**wide, "fc.bias": np.full(10, 1e300)})
    refused(path, "NaN or infinite in 'fc.bias'", **PLAIN)


def test_dtypes_that_are_not_floating_point(wide, tmp_path):
    path = write(tmp_path / "weights.npz", {**wide, "fc.bias": np.ones(10, np.int8)})
    refused(path, "'fc.bias' is int8, expected float16, float32 or float64", **PLAIN)
    path = write(tmp_path / "weights.safetensors", {**wide, "fc.bias": np.ones(10, np.int8)})
    refused(path, "'fc.bias' is I8, expected one of BF16, F16, F32, F64", "value.float()", **PLAIN)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("damage", ["empty", "garbage", "cut", "flipped header"])
def test_damaged_files(small, suffix, damage, tmp_path):
    _, model, variables = small
    path = tmp_path / f"weights{suffix}"
    save_torch_weights(path, model, variables)
    content = path.read_bytes()
    damaged = {
        "empty": b"",
        "garbage": b"\x80\x04 not a file of weights",
        "cut": content[: len(content) // 2],
        "flipped header": bytes(255 - byte for byte in content[:200]) + content[200:],
    }
    path.write_bytes(damaged[damage])
    refused(path, "damaged", **PLAIN)


def test_npz_with_objects_or_other_things_inside(wide, tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, **{**wide, "fc.bias": np.array([{}, None], object)})
    refused(path, "damaged", "allow_pickle=False", **PLAIN)
    with zipfile.ZipFile(path, "w") as archive:  # as a .pt file that was given another name
        archive.writestr("archive/data.pkl", b"\x80\x02.")
    refused(path, "'archive/data.pkl' is not an array", **PLAIN)
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    refused(path, "not an npz file", **PLAIN)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_missing_files_and_folders(suffix, tmp_path):
    refused(tmp_path / f"weights{suffix}", "no such file")
    (tmp_path / f"weights{suffix}").mkdir()
    refused(tmp_path / f"weights{suffix}", "a folder")


@pytest.mark.parametrize("name", ["weights.h5", "weights", "safetensors"])
def test_unknown_suffixes(name, tmp_path):
    refused(tmp_path / name, "unknown suffix", "use '.safetensors' or '.npz'")
    with pytest.raises(CheckpointError, match="unknown suffix"):
        save_torch_weights(tmp_path / name, *network("wrn10_1"))


@pytest.mark.parametrize("name", ["weights.pt", "weights.PTH", "weights.pth.tar", "weights.pkl"])
def test_pickles_are_never_read_or_written(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    message = refused(path, "never read", "safetensors.torch.save_file", "torch.load")
    assert len(message.splitlines()) == 4
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no pickled file is written; save to .*\.load_file"):
        save_torch_weights(path, *network("wrn10_1"))
    assert not list(tmp_path.iterdir())


def test_without_the_extra(wide, monkeypatch, tmp_path):
    path = write(tmp_path / "weights.safetensors", wide)
    npz = write(tmp_path / "weights.npz", wide)
    for module in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, module, None)
    refused(path, "pip install safetensors", **PLAIN)
    with pytest.raises(CheckpointError, match="pip install safetensors"):
        save_torch_weights(path, *network("wrn10_1"))
    assert isinstance(load_torch_weights(npz, **PLAIN), models.Classifier)


# ---- errors of the metadata


GOOD = {
    "format_version": 1,
    "name": "wrn10_1",
    "width": 8,
    "num_classes": 10,
    "mean": [0],
    "std": [1],
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"format_version": 2}, "written by a later agr_jax (format 2, this one reads 1)"),
        ({"format_version": "x"}, "metadata are damaged"),
        ({"mean": 0.5}, "metadata are damaged"),
        ({"mean": ["x"]}, "metadata are damaged"),
        ({"more": 1}, "metadata are damaged"),
        ({"std": [0]}, "std must be 1 or 3 numbers, positive"),
        ({"mean": [0, 0]}, "mean must be 1 or 3 numbers"),
        ({"num_classes": 100}, "8 with 100 classes, its tensors wrn10_1 of width 8 with 10"),
        ({"name": "wrn34_10"}, "metadata say wrn34_10 of width 8"),
        ({"width": None}, "metadata say wrn10_1 of width None"),
    ],
)
def test_wrong_metadata(wide, change, part, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    load_torch_weights(write(path, wide, json.dumps(GOOD).encode()))
    refused(write(path, wide, json.dumps({**GOOD, **change}).encode()), part)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("metadata", [b"", b"{", b"[1]", b"{}", b"null", b'"text"'])
def test_damaged_metadata(wide, metadata, suffix, tmp_path):
    path = write(tmp_path / f"weights{suffix}", wide, metadata)
    refused(path, "metadata are damaged", **PLAIN)


def test_npz_metadata_that_is_no_text(wide, tmp_path):
    path = write(tmp_path / "weights.npz", wide, b"\xff\xfe\xff")
    refused(path, "metadata are damaged")
    np.savez(path, **wide, __metadata__=np.float32(3))
    refused(path, "metadata are damaged")


def test_normalisation_must_not_contradict_the_file(small, tmp_path):
    _, model, variables = small
    path = tmp_path / "weights.npz"
    save_torch_weights(path, model, variables)
    refused(path, "mean=(0.0, 0.0, 0.0) was passed, the file says (0.4914", mean=(0, 0, 0), std=STD)
    refused(path, "leave std= out", std=(1,))


@pytest.mark.parametrize(
    ("prefix", "mean", "std"),
    [
        ("", "mu", "sigma"),  # RobustBench's networks
        ("model.", "normalize.mean", "normalize.std"),  # RobustBench's normalize_model
        ("1.", "0.mean", "0.std"),
    ],
)
def test_buffers_of_a_normalisation_are_read(wide, prefix, mean, std, tmp_path):
    tensors = {f"{prefix}{name}": value for name, value in wide.items()}
    for name, values in ((mean, MEAN), (std, STD)):
        tensors[name] = np.reshape(values, (1, 3, 1, 1)).astype(np.float32)
    path = write(tmp_path / "weights.npz", tensors)
    own = load_torch_weights(path)
    np.testing.assert_allclose(own.model.mean, MEAN, rtol=1e-6)
    np.testing.assert_allclose(own.model.std, STD, rtol=1e-6)
    assert load_torch_weights(path, mean=MEAN, std=STD).model == own.model
    refused(path, "was passed, the file says (0.4914", mean=(0.0,), std=STD)
    tensors[std] = np.zeros(3, np.float32)
    refused(write(path, tensors), "std must be 1 or 3 numbers, positive and finite")


# ---- errors on writing


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_variables_of_another_network_are_not_written(suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    model, variables = network("wrn10_1")
    for other, parts in (
        (
            models.create("wrn10_2", 10, width=8),
            ["'wrn10_2'", "has shape (8,), expected (16,)", "more"],
        ),
        (models.create("wrn16_1", 10, width=8), ["missing tensors: 'block1.layer.1.bn1.bias'"]),
        (models.create("preactresnet18", 10, width=8), ["unexpected tensors: 'block1_0.bn1"]),
        (models.create("wrn10_1", 9, width=8), ["'fc.bias' has shape (10,), expected (9,)"]),
    ):
        with pytest.raises(CheckpointError) as error:
            save_torch_weights(path, other, variables)
        assert all(part in str(error.value) for part in [str(path), *parts]), error.value
    with pytest.raises(CheckpointError, match=r"must be {'params': .*}, got 'params'$"):
        save_torch_weights(path, model, {"params": variables["params"]})
    with pytest.raises(CheckpointError, match=r"'batch_stats': ...}, got 'block1_0', 'block2_0'"):
        save_torch_weights(path, model, variables["params"])
    with pytest.raises(CheckpointError, match=r"missing tensors: 'block1.*running_mean"):
        save_torch_weights(path, model, {**variables, "batch_stats": {}})
    flat = {**variables["params"], "conv1": {"kernel": jnp.ones(3)}}
    with pytest.raises(CheckpointError, match=r"'conv1.weight' has shape \(3,\), expected \(8, 3"):
        save_torch_weights(path, model, {**variables, "params": flat})
    with pytest.raises(CheckpointError, match="mean must be 1 or 3 numbers"):
        save_torch_weights(path, model.clone(mean=(0.0, 0.0)), variables)
    bad = jax.tree.map(lambda leaf: leaf * np.nan, variables)
    with pytest.raises(CheckpointError, match=r"NaN or infinite in 'block1.*and 35 more"):
        save_torch_weights(path, model, bad)
    assert not list(tmp_path.iterdir())


def test_networks_without_pytorch_names(tmp_path):
    model = models.PreActResNet(10, blocks=(1, 1), width=4)
    with pytest.raises(CheckpointError, match=r"not for PreActResNet with blocks \(1, 1\)"):
        save_torch_weights(tmp_path / "weights.npz", model, random_variables(model))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_that_is_not_there(suffix, tmp_path):
    with pytest.raises(CheckpointError, match=r"missing.weights.* cannot be written \(No such"):
        save_torch_weights(tmp_path / "missing" / f"weights{suffix}", *network("wrn10_1"))


# ---- against PyTorch itself


def torch_network(torch, name, width, classes):
    """A network with the published names, written from the papers."""
    from torch import nn
    from torch.nn import functional as F  # noqa: N812

    preact = name == "preactresnet18"

    def conv(inputs, outputs, size, stride):
        return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, 3, stride)
            self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs, 3, 1)
            self.changes = inputs != outputs
            if self.changes and preact:
                self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride))
            elif self.changes:
                self.convShortcut = conv(inputs, outputs, 1, stride)

        def forward(self, x):
            active = F.relu(self.bn1(x))
            if self.changes:
                x = (self.shortcut if preact else self.convShortcut)(active)
            return x + self.conv2(F.relu(self.bn2(self.conv1(active))))

    class Stage(nn.Module):
        def __init__(self, blocks):
            super().__init__()
            self.layer = blocks

        def forward(self, x):
            return self.layer(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, inputs = conv(3, width, 3, 1), width
            self.stages = []
            for stage in range(4 if preact else 3):
                blocks, outputs = [], width * 2**stage
                for block in range(2 if preact else 1):
                    blocks.append(Block(inputs, outputs, 2 if stage and not block else 1))
                    inputs = outputs
                blocks = nn.Sequential(*blocks)
                self.stages.append(f"layer{stage + 1}" if preact else f"block{stage + 1}")
                setattr(self, self.stages[-1], blocks if preact else Stage(blocks))
            self.ends = ("bn", "linear") if preact else ("bn1", "fc")
            setattr(self, self.ends[0], nn.BatchNorm2d(inputs))
            setattr(self, self.ends[1], nn.Linear(inputs, classes))

        def forward(self, x):
            x = self.conv1(x)
            for stage in self.stages:
                x = getattr(self, stage)(x)
            norm, linear = (getattr(self, end) for end in self.ends)
            return linear(F.relu(norm(x)).mean((2, 3)))

    return Net()


def torch_logits(torch, net, normalise=True):
    images = np.asarray(IMAGES, np.float64)
    if normalise:
        images = (images - MEAN) / STD
    with torch.no_grad():
        net = net.double().eval()
        return net(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()


def assert_close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_pytorch_reads_what_is_written(small, suffix, tmp_path):
    torch = pytest.importorskip("torch")
    name, model, variables = small
    path = tmp_path / f"weights{suffix}"
    save_torch_weights(path, model, variables)
    net = torch_network(torch, name, 8, 10)
    if suffix == ".npz":
        with np.load(path) as file:
            state = {key: torch.tensor(file[key]) for key in file if key != "__metadata__"}
    else:
        import safetensors.torch

        state = safetensors.torch.load_file(path)
    net.load_state_dict(state, strict=True)
    assert_close(jax.jit(model.apply)(variables, IMAGES), torch_logits(torch, net))


@pytest.fixture
def trained(small):
    """A PyTorch network whose every tensor has changed: two training passes, then noise."""
    torch = pytest.importorskip("torch")
    net = torch_network(torch, small[0], 8, 10)
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(2):
            net.train()(torch.rand(8, 3, 32, 32))
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    return torch, small[0], net


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("wrapper", ["none", "DataParallel", "Sequential"])
def test_what_pytorch_writes_is_read(trained, suffix, wrapper, tmp_path):
    torch, name, net = trained
    path = tmp_path / f"weights{suffix}"
    wrapped = {
        "none": lambda: net,
        "DataParallel": lambda: torch.nn.ModuleDict({"module": net}),
        "Sequential": lambda: torch.nn.Sequential(torch.nn.Identity(), net),
    }[wrapper]()
    state = wrapped.state_dict()
    assert any(key.endswith("num_batches_tracked") for key in state)
    if suffix == ".npz":
        np.savez(path, **{key: value.numpy() for key, value in state.items()})
    else:
        import safetensors.torch

        safetensors.torch.save_file(state, path)
    refused(path, "normalisation does not travel in this file")
    classifier = load_torch_weights(path, name=name, mean=MEAN, std=STD)
    assert_close(jax.jit(lambda c, x: c(x))(classifier, IMAGES), torch_logits(torch, net))


def test_the_lines_of_the_error_convert_a_pickle(trained, tmp_path):
    torch, _, net = trained
    import safetensors.torch

    path = tmp_path / "weights.pt"
    net = net.to(memory_format=torch.channels_last)  # strided weights
    torch.save({"state_dict": net.state_dict(), "epoch": 3}, path)
    _, *lines = refused(path, "`import safetensors.torch, torch`").splitlines()
    exec("\n".join(line.strip() for line in lines), {"safetensors": safetensors, "torch": torch})  # noqa: S102
    classifier = load_torch_weights(path.with_suffix(".safetensors"), **PLAIN)
    expected = torch_logits(torch, net, normalise=False)
    assert_close(jax.jit(lambda c, x: c(x))(classifier, IMAGES), expected)


def test_bfloat16_of_pytorch(tmp_path):
    torch = pytest.importorskip("torch")
    import safetensors.torch

    path = tmp_path / "weights.safetensors"
    net = torch_network(torch, "wrn10_1", 8, 10).bfloat16()
    safetensors.torch.save_file(net.state_dict(), path)
    classifier = load_torch_weights(path, mean=MEAN, std=STD)
    assert_close(jax.jit(lambda c, x: c(x))(classifier, IMAGES), torch_logits(torch, net))


# ---- what a user copies


def test_example(tmp_path, capsys):
    model, variables = network("wrn10_1")
    path = tmp_path / "weights.safetensors"
    save_torch_weights(path, model, variables)
    pytorch_weights.main([str(path)])
    write(path, written(model, variables))
    with pytest.raises(CheckpointError, match="normalisation does not travel"):
        pytorch_weights.main([str(path)])
    pytorch_weights.main([str(path), "--mean", *map(str, MEAN), "--std", *map(str, STD)])
    pytorch_weights.main([])
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == second
    assert first.startswith(f"{path}: PGD-20 raised the loss from ")
    for line in (first, third):
        before, after = map(float, re.findall(r"\d\.\d{4}", line))
        assert after > before > 0
