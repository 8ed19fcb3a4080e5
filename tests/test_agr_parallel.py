"""AGR under jit, vmap, scan, shard_map and pmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from agr_jax import GradientPair, agr_transform, clean_and_adversarial_grads

COUNT = 4
TRANSFORM = agr_transform(gop_start=0, gics_start=1)
# One loop against one compiled program: other fusions, measured 6e-8 on results up to 0.1.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-7}


@pytest.fixture(scope="module")
def batch():
    """Gradient pairs stacked along a first axis, with leaves of both signs of the cosine."""
    rng = np.random.default_rng(0)
    shapes = {"w": (3, 2), "b": (2,)}
    draw = lambda: {k: np.float32(rng.normal(size=(COUNT, *s))) for k, s in shapes.items()}  # noqa: E731
    pair = GradientPair(draw(), draw())
    signs = np.sign([np.vdot(pair.clean["w"][i], pair.adversarial["w"][i]) for i in range(COUNT)])
    assert set(signs) == {-1, 1}
    return pair


def one(pair, step):
    """The update for a single pair at a given step: (result, diagnostics)."""
    state = TRANSFORM.init(pair)._replace(step=step)
    return TRANSFORM.update(pair, state)


@pytest.fixture(scope="module")
def loop(batch):
    """What every transformation of the function must equal: one pair after the other, no jit."""
    results = [one(jax.tree.map(lambda x: x[i], batch), jnp.int32(i)) for i in range(COUNT)]  # noqa: B023
    return jax.tree.map(lambda *x: np.stack(x), *results)


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, **TOLERANCE)


def test_jit(batch, loop):
    step = jax.jit(one)
    for i in range(COUNT):
        pick = lambda x: x[i]  # noqa: B023, E731
        assert_equal(step(jax.tree.map(pick, batch), i), jax.tree.map(pick, loop))


@pytest.mark.parametrize("jit", [False, True])
def test_vmap(batch, loop, jit):
    mapped = jax.vmap(one)
    assert_equal((jax.jit(mapped) if jit else mapped)(batch, jnp.arange(COUNT)), loop)


def test_scan(batch, loop):
    def body(state, pair):
        out, state = TRANSFORM.update(pair, state)
        return state, (out, state)

    first = TRANSFORM.init(jax.tree.map(lambda x: x[0], batch))
    last, outs = jax.lax.scan(body, first, batch)
    assert_equal(outs, loop)
    assert int(last.step) == COUNT


def test_pmap(batch, loop):
    assert_equal(jax.pmap(one)(batch, jnp.arange(COUNT)), loop)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))


def test_shard_map(batch, loop, mesh):
    def per_device(pair, step):
        result = one(jax.tree.map(lambda x: x[0], pair), step[0])
        return jax.tree.map(lambda x: x[None], result)

    run = jax.shard_map(per_device, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert_equal(jax.jit(run)(batch, jnp.arange(COUNT)), loop)


def test_shard_map_with_leaves_of_both_kinds(batch, mesh):
    """What is the same on all devices stays so, beside leaves that each device has for itself."""
    own = GradientPair(batch.clean["w"], batch.adversarial["w"])
    first, last = (GradientPair(batch.clean["b"][i], batch.adversarial["b"][i]) for i in (0, 1))

    def of_device(own, first, last):
        pairs = {"a": first, "own": own, "z": last}
        pair = GradientPair(*({k: p[side] for k, p in pairs.items()} for side in (0, 1)))
        result, state = one(pair, jnp.int32(1))
        return result, state.cosine

    expected = [of_device(jax.tree.map(lambda x: x[i], own), first, last) for i in range(COUNT)]  # noqa: B023

    def per_device(own, first, last):
        result, cosine = of_device(jax.tree.map(lambda x: x[0], own), first, last)
        return result | {"own": result["own"][None]}, cosine[None]

    run = jax.shard_map(
        per_device,
        mesh=mesh,
        in_specs=(P("data"), P(), P()),
        out_specs=({"a": P(), "own": P("data"), "z": P()}, P("data")),
    )
    result, cosines = jax.jit(run)(own, first, last)
    for name in ("a", "z"):
        assert_equal(result[name], expected[0][0][name])
    assert_equal(result["own"], np.stack([each["own"] for each, _ in expected]))
    assert_equal(cosines, np.stack([cosine for _, cosine in expected]))


def test_shard_map_averages_both_gradients_first(batch, mesh):
    mean = jax.tree.map(lambda x: x.mean(0), batch)
    expected = one(mean, jnp.int32(1))

    def first_average(pair):
        local = jax.tree.map(lambda x: x[0], pair)
        return one(jax.lax.pmean(local, "data"), jnp.int32(1))

    def average_last(pair):
        return jax.lax.pmean(one(jax.tree.map(lambda x: x[0], pair), jnp.int32(1))[0], "data")

    run = lambda f: jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=P()))(batch)  # noqa: E731
    assert_equal(run(first_average), expected)
    wrong = run(average_last)
    assert np.linalg.norm(wrong["w"] - expected[0]["w"]) > 0.3 * np.linalg.norm(expected[0]["w"])


def test_gradients_taken_inside_shard_map(mesh):
    """By default `shard_map` has summed them already; the README says what to do."""
    rng = np.random.default_rng(2)
    weights = np.float32(rng.normal(size=3))
    clean, adversarial = np.float32(rng.normal(size=(2, 8, 3)))
    loss = lambda w, x: jnp.mean(jnp.tanh(x @ w))  # noqa: E731
    expected, _ = clean_and_adversarial_grads(loss, weights, clean, adversarial)

    def averaged_gradients(w, x, y):
        return jax.lax.pmean(clean_and_adversarial_grads(loss, w, x, y)[0], "data")

    def averaged_loss(w, x, y):
        everywhere = lambda w, x: jax.lax.pmean(loss(w, x), "data")  # noqa: E731
        return clean_and_adversarial_grads(everywhere, w, x, y)[0]

    def run(function, **check):
        specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P()}
        mapped = jax.shard_map(function, mesh=mesh, **specs, **check)
        return jax.jit(mapped)(weights, clean, adversarial)

    assert_equal(run(averaged_gradients, check_vma=False), expected)
    assert_equal(run(averaged_loss), expected)
    wrong = run(averaged_gradients)
    assert_equal(wrong, jax.tree.map(lambda g: mesh.size * g, expected))


@pytest.mark.parametrize("spec", [P(), P("data")])
def test_sharded_leaves(spec, mesh):
    # Reductions over a leaf that is spread over devices are global, with no collective written.
    rng = np.random.default_rng(1)
    g_a, g_c = ({"w": np.float32(rng.normal(size=(8, 3)))} for _ in range(2))
    expected = one(GradientPair(g_c, g_a), jnp.int32(1))
    pair = jax.device_put(GradientPair(g_c, g_a), NamedSharding(mesh, spec))
    out = jax.jit(one)(pair, 1)
    assert_equal(out, expected)
    assert out[0]["w"].sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
