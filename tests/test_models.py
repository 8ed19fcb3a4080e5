"""Networks and layers: sizes, initial values, batch normalisation, and PyTorch twins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agr_jax import losses, models
from agr_jax.models.layers import BatchNorm, Linear, normalize

IMAGES = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 16, 16, 3)), jnp.float32)
KEY = jax.random.key(0, impl="rbg")  # quicker to compile than the default generator


def shapes(model, size=32):
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("name", "classes", "parameters", "leaves"),
    [
        ("preactresnet18", 10, 11_172_170, 56),
        ("preactresnet18", 100, 11_172_170 + 90 * 513, 56),
        ("wrn34_10", 10, 46_160_474, 98),
        ("wrn16_4", 10, 2_748_890, 44),
        ("wrn28_10_silu", 10, 36_479_194, 80),
        ("preactresnet18_silu", 10, 12_548_426, 56),
    ],
)
def test_published_sizes(name, classes, parameters, leaves):
    variables = shapes(models.create(name, classes))
    assert count(variables["params"]) == parameters
    assert len(jax.tree.leaves(variables["params"])) == leaves


def test_logits_and_statistics_have_the_right_shapes():
    for name in ("preactresnet18", "wrn34_10"):
        model = models.create(name, 7)
        variables = shapes(model)
        images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
        logits, updated = jax.eval_shape(
            lambda v, x, model=model: model.apply(v, x, train=True, mutable=["batch_stats"]),
            variables,
            images,
        )
        assert logits.shape == (2, 7)
        same = jax.tree.map(
            lambda a, b: a.shape == b.shape, updated["batch_stats"], variables["batch_stats"]
        )
        assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("name", ["preactresnet18", "wrn10_1"])
def test_width(name):
    published, narrow = shapes(models.create(name, 10)), shapes(models.create(name, 10, width=4))
    default = published["params"]["conv1"]["kernel"].shape[-1]
    assert default == (64 if name == "preactresnet18" else 16)
    for wide, thin in zip(*map(jax.tree.leaves, (published, narrow)), strict=True):
        ratio = [w // t for w, t in zip(wide.shape, thin.shape, strict=True)]
        assert set(ratio) <= {1, default // 4}
    assert narrow["params"]["conv1"]["kernel"].shape == (3, 3, 3, 4)


@pytest.mark.parametrize(
    "name",
    ["resnet18", "PreActResNet18", "wrn33_10", "wrn4_1", "wrn34_0", "wrn34", "wrn34_10_relu"],
)
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=r"unknown model .*choose 'preactresnet18' or 'wrn<depth>"):
        models.create(name, 10)


@pytest.fixture(scope="module")
def initial():
    """Fresh parameters of both families, wide enough for statistics."""
    networks = {"preactresnet18": {"width": 32}, "wrn10_2": {}}
    return {
        name: jax.jit(models.create(name, 10, **options).init)(KEY, IMAGES)["params"]
        for name, options in networks.items()
    }


def kernels(params):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(params)
        if leaf.ndim > 1
    }


def test_preact_resnet_starts_as_pytorch_does(initial):
    for name, kernel in kernels(initial["preactresnet18"]).items():
        bound = np.prod(kernel.shape[:-1]) ** -0.5  # uniform in +- 1 / sqrt(fan in)
        assert np.abs(kernel).max() <= bound, name
        assert np.abs(kernel).max() > 0.98 * bound, name
        # The variance of a uniform draw has a relative deviation of 0.9 / sqrt(n).
        assert abs(kernel.var() / (bound**2 / 3) - 1) < 5 / kernel.size**0.5, name
        assert abs(kernel.mean()) < 4 * bound / (3 * kernel.size) ** 0.5, name
    bias = np.asarray(initial["preactresnet18"]["linear"]["bias"])
    assert np.abs(bias).max() <= 256**-0.5
    assert np.abs(bias).max() > 0.3 * 256**-0.5
    assert len(set(bias.tolist())) == 10


def test_wide_resnet_starts_as_the_published_code_does(initial):
    for name, kernel in kernels(initial["wrn10_2"]).items():
        if name.startswith("fc"):
            bound = kernel.shape[0] ** -0.5
            assert 0.98 * bound < np.abs(kernel).max() <= bound
            continue
        std = (2 / (kernel.shape[0] * kernel.shape[1] * kernel.shape[3])) ** 0.5
        # The variance of a normal draw has a relative deviation of sqrt(2 / n).
        assert abs(kernel.var() / std**2 - 1) < 5 * (2 / kernel.size) ** 0.5, name
        # Not truncated: beyond two deviations lie 4.6 %.
        beyond = (np.abs(kernel) > 2 * std).mean()
        assert abs(beyond - 0.0455) < 5 * (0.0455 / kernel.size) ** 0.5, name
    np.testing.assert_array_equal(initial["wrn10_2"]["fc"]["bias"], 0)


def test_batch_norm_starts_as_the_identity(initial):
    for params in initial.values():
        for path, leaf in jax.tree.leaves_with_path(params):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if "bn" in name:
                np.testing.assert_array_equal(leaf, 1 if name.endswith("scale") else 0, name)


# ---- batch normalisation


@pytest.fixture(scope="module")
def features():
    """Far from zero, so that a one-pass variance would lose its digits."""
    rng = np.random.default_rng(1)
    return jnp.asarray(100 + rng.normal(size=(8, 3, 2, 5)) * [1, 2, 3, 4, 5], jnp.float32)


VARIABLES = {
    "params": {"scale": jnp.arange(1.0, 6.0), "bias": jnp.arange(5.0) - 2},
    "batch_stats": {"mean": jnp.arange(5.0), "var": jnp.arange(1.0, 6.0) / 2},
}


def expected_output(features, mean, var):
    scale, bias = (np.asarray(VARIABLES["params"][k], np.float64) for k in ("scale", "bias"))
    return (np.asarray(features, np.float64) - mean) / np.sqrt(var + 1e-5) * scale + bias


def test_batch_norm_in_training(features):
    wide = np.asarray(features, np.float64)
    mean, var = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
    out, updated = BatchNorm().apply(VARIABLES, features, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(out, expected_output(features, mean, var), atol=5e-5)
    stats = updated["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.9 * np.arange(5.0) + 0.1 * mean, rtol=1e-6)
    unbiased = wide.var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(
        stats["var"], 0.9 * np.arange(1.0, 6.0) / 2 + 0.1 * unbiased, rtol=1e-6
    )
    assert np.abs(unbiased / var - 1).min() > 0.02  # so the two variances can be told apart


def test_batch_norm_in_evaluation_uses_the_running_statistics(features):
    out = BatchNorm().apply(VARIABLES, features, train=False)
    stats = {k: np.asarray(v, np.float64) for k, v in VARIABLES["batch_stats"].items()}
    expected = expected_output(features, stats["mean"], stats["var"])
    np.testing.assert_allclose(out, expected, rtol=2e-6)


@pytest.mark.parametrize("mapping", ["vmap", "pmap"])
def test_axis_name_gives_the_global_statistics(features, mapping):
    norm = BatchNorm(axis_name="devices")

    def apply(shard):
        return norm.apply(VARIABLES, shard, train=True, mutable=["batch_stats"])

    def value_and_gradient(shard):
        def total(x):
            out, updated = apply(x)
            return (out[..., 0] ** 2).sum(), (out, updated["batch_stats"])

        return jax.grad(total, has_aux=True)(shard)

    mapped = jax.pmap if mapping == "pmap" else jax.vmap
    shards = features.reshape(4, 2, *features.shape[1:])
    _, (out, stats) = mapped(value_and_gradient, axis_name="devices")(shards)
    whole = BatchNorm().apply(VARIABLES, features, train=True, mutable=["batch_stats"])
    # Features of 100 with a deviation of 1: one ulp of the mean is 8e-6.
    np.testing.assert_allclose(out.reshape(features.shape), whole[0], atol=1e-4)
    for got, expected in zip(*map(jax.tree.leaves, (stats, whole[1])), strict=True):
        for of_one_device in got:
            np.testing.assert_allclose(of_one_device, expected, rtol=1e-6)
    # A layer without the axis would see two images only.
    alone = BatchNorm().apply(VARIABLES, shards[0], train=True, mutable=["batch_stats"])
    assert np.abs(alone[0] - out[0]).max() > 0.1


def test_initialising_leaves_the_running_statistics_alone(features):
    variables = BatchNorm().init(jax.random.key(0), features, train=True)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)


# ---- whole networks


@pytest.fixture(
    scope="module",
    params=[pytest.param("preactresnet18", marks=pytest.mark.slow), "wrn10_1"],
)
def small(request):
    model = models.create(request.param, 10, width=8)
    return model, jax.jit(model.init)(KEY, IMAGES)


def test_evaluation_is_the_default_and_images_do_not_touch_each_other(small):
    model, variables = small
    logits = jax.jit(model.apply)(variables, IMAGES)
    assert logits.shape == (4, 10)
    assert logits.dtype == jnp.float32
    alone = jax.jit(model.apply)(variables, IMAGES[:1])
    np.testing.assert_allclose(alone, logits[:1], rtol=1e-5, atol=1e-5)
    trained, updated = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(
        variables, IMAGES
    )
    assert np.abs(trained - logits).max() > 1e-3
    before = jax.tree.leaves(variables["batch_stats"])
    after = jax.tree.leaves(updated["batch_stats"])
    assert all((a != b).any() for a, b in zip(after, before, strict=True))
    classifier = models.Classifier(model, variables)
    np.testing.assert_array_equal(jax.jit(lambda c, x: c(x))(classifier, IMAGES), logits)


def test_canonical_and_plain_convolutions_agree_in_a_network(small):
    model, variables = small
    assert model.conv == "canonical"  # the default on this backend
    plain = model.clone(conv="plain")

    def loss(variables, images, model):
        labels = jnp.arange(4)
        return losses.cross_entropy(model.apply(variables, images), labels).sum()

    got, expected = (
        jax.jit(jax.grad(loss, 1), static_argnums=2)(variables, IMAGES, m) for m in (model, plain)
    )
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(small):
    model, variables = small
    half = model.clone(dtype=jnp.bfloat16)
    shapes = jax.eval_shape(half.init, jax.random.key(0), IMAGES)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    lowered = jax.jit(half.apply).lower(variables, IMAGES).as_text()
    convolutions = [line for line in lowered.splitlines() if "stablehlo.convolution" in line]
    assert convolutions
    assert all("xbf16>" in line and "xf32>" not in line for line in convolutions)
    logits = jax.jit(half.apply)(variables, IMAGES)
    assert logits.dtype == jnp.float32
    exact = jax.jit(model.apply)(variables, IMAGES)
    error = np.abs(logits - exact).max()
    assert 0 < error < 0.05 * np.abs(exact).max()  # 8 bits of mantissa through a dozen layers


def test_normalisation_is_part_of_the_model(small):
    model, variables = small
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    inside = jax.jit(model.clone(mean=mean, std=std).apply)(variables, IMAGES)
    outside = jax.jit(model.apply)(
        variables, (IMAGES - jnp.asarray([[[mean]]])) / jnp.asarray([[[std]]])
    )
    np.testing.assert_allclose(inside, outside, rtol=1e-4, atol=1e-5)
    assert np.abs(inside - jax.jit(model.apply)(variables, IMAGES)).max() > 1e-3


def test_normalize_checks_the_channels():
    with pytest.raises(ValueError, match="mean has 2 entries for images of 3 channels"):
        normalize(IMAGES, (0.1, 0.2), (1.0,), jnp.float32)
    with pytest.raises(ValueError, match="std has 4 entries for images of 3 channels"):
        normalize(IMAGES, (0.1,), (1.0,) * 4, jnp.float32)


def test_a_number_is_the_normalisation_of_all_channels(small):
    model = models.create("wrn10_1", 10, mean=0.5, std=np.float64(0.25))
    assert model == models.create("wrn10_1", 10, mean=[0.5], std=(0.25,))
    as_number = normalize(IMAGES, 0.5, 0.25, jnp.float32)
    np.testing.assert_array_equal(as_number, normalize(IMAGES, (0.5,), (0.25,), jnp.float32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": (125.3, 123.0, 113.9)}, "^mean must be at least 0 .* divide by 255"),
        ({"std": 63}, "^std must be above 0 and at most 1, .* divide by 255"),
        ({"std": (0.2, 0, 0.2)}, r"^std must be above 0 .* got \(0.2, 0.0, 0.2\)$"),
        ({"mean": (0.1, float("nan"), 0.1)}, "^mean must be at least 0"),
        ({"mean": "0.5"}, "^mean must be a number, or one for each channel, got '0.5'"),
        ({"mean": None}, "^mean must be a number, or one for each channel, got None"),
    ],
)
def test_normalisations_that_are_none_of_images(settings, message):
    with pytest.raises(ValueError, match=message):
        models.create("wrn10_1", 10, **settings)
    with pytest.raises(ValueError, match=message):
        normalize(IMAGES, **{"mean": 0.5, "std": 0.5, **settings}, dtype=jnp.float32)


def test_linear():
    layer = Linear(3)
    variables = layer.init(jax.random.key(0), jnp.ones([1, 4]))
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    inputs = jnp.arange(8.0).reshape(2, 4)
    expected = np.asarray(inputs) @ np.asarray(kernel) + np.asarray(bias)
    np.testing.assert_allclose(layer.apply(variables, inputs), expected, rtol=1e-5, atol=1e-5)


# ---- PyTorch twins, written from the papers


def torch_twin(torch, name, width, classes):
    from torch import nn
    from torch.nn import functional as F  # noqa: N812

    preact = name == "preactresnet18"

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.bn1 = nn.BatchNorm2d(inputs)
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.short = None
            if stride != 1 or inputs != outputs:
                self.short = nn.Conv2d(inputs, outputs, 1, stride, 0, bias=False)

        def forward(self, x):
            active = F.relu(self.bn1(x))
            kept = x if self.short is None else self.short(active)
            return self.conv2(F.relu(self.bn2(self.conv1(active)))) + kept

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, width, 3, 1, 1, bias=False)
            stages = (
                [(width * 2**s, 2) for s in range(4)]
                if preact
                else [(width * 2**s, 1) for s in range(3)]
            )
            blocks, inputs = [], width
            for stage, (outputs, depth) in enumerate(stages):
                for block in range(depth):
                    stride = 2 if stage and not block else 1
                    blocks.append(Block(inputs, outputs, stride))
                    inputs = outputs
            self.blocks = nn.ModuleList(blocks)
            self.last, self.linear = nn.BatchNorm2d(inputs), nn.Linear(inputs, classes)

        def forward(self, x):
            x = self.first(x)
            for block in self.blocks:
                x = block(x)
            return self.linear(F.relu(self.last(x)).mean((2, 3)))

    return Net().double()


def copy_to_torch(torch, net, model_name, variables):
    """Our variables into the twin, module by module."""
    params, stats = variables["params"], variables["batch_stats"]

    def conv(module, p):
        module.weight.copy_(torch.tensor(np.asarray(p["kernel"], np.float64).transpose(3, 2, 0, 1)))

    def norm(module, p, s):
        for target, value in (
            *((module.weight, p["scale"]), (module.bias, p["bias"])),
            *((module.running_mean, s["mean"]), (module.running_var, s["var"])),
        ):
            target.copy_(torch.tensor(np.asarray(value, np.float64)))

    preact = model_name == "preactresnet18"
    last, linear = ("bn", "linear") if preact else ("bn1", "fc")
    names = sorted(k for k in params if k.startswith(("layer", "block")))
    with torch.no_grad():
        conv(net.first, params["conv1"])
        for name, block in zip(names, net.blocks, strict=True):
            p, s = params[name], stats[name]
            for part in ("conv1", "conv2"):
                conv(getattr(block, part), p[part])
            for part in ("bn1", "bn2"):
                norm(getattr(block, part), p[part], s[part])
            assert (block.short is not None) == ("shortcut" in p)
            if "shortcut" in p:
                conv(block.short, p["shortcut"])
        norm(net.last, params[last], stats[last])
        net.linear.weight.copy_(torch.tensor(np.asarray(params[linear]["kernel"], np.float64).T))
        net.linear.bias.copy_(torch.tensor(np.asarray(params[linear]["bias"], np.float64)))


@pytest.mark.parametrize("size", [16, 18])
def test_forward_passes_match_pytorch(small, size):
    torch = pytest.importorskip("torch")
    model, variables = small
    name = "preactresnet18" if isinstance(model, models.PreActResNet) else "wrn10_1"
    rng = np.random.default_rng(3)
    images = jnp.asarray(rng.uniform(size=(4, size, size, 3)), jnp.float32)
    variables = jax.tree.map(
        lambda v: v + jnp.asarray(rng.uniform(0, 0.2, v.shape), v.dtype), variables
    )
    net = torch_twin(torch, name, 8, 10)
    copy_to_torch(torch, net, name, variables)
    inputs = torch.tensor(np.asarray(images, np.float64).transpose(0, 3, 1, 2))

    expected = net.eval()(inputs).detach().numpy()
    got = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    expected = net.train()(inputs).detach().numpy()
    got, updated = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(
        variables, images
    )
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    last = updated["batch_stats"]["bn" if name == "preactresnet18" else "bn1"]
    np.testing.assert_allclose(last["mean"], net.last.running_mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(last["var"], net.last.running_var, rtol=1e-5, atol=1e-5)
