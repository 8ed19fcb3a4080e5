"""One step on one device or several, and AGR that never starts against none, in float32.

`sign` inside the attack amplifies rounding, so that whole float32 trajectories cannot be compared
between numbers of devices; `float64/test_devices.py` does that.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agr_jax import agr_transform, models, sharding
from agr_jax.attacks import pgd
from agr_jax.data import Augmentation
from agr_jax.errors import ConfigError
from agr_jax.methods import AdversarialTraining, Batch
from agr_jax.threat import Linf
from agr_jax.training.step import Trainer

BATCH = 16
ABSENT = {"gop_start": None, "gics_start": None, "clip": "none", "clip_norm": None}
TOO_LATE = {"gop_start": 1000, "gics_start": 2000}


def make_trainer(agr, devices=1):
    return Trainer(
        model=models.create("wrn10_1", 10, width=8),
        method=AdversarialTraining(pgd(Linf(8 / 255), steps=3, step_size=4 / 255)),
        optimizer=optax.chain(
            agr_transform(**agr),
            optax.add_decayed_weights(5e-4),
            optax.trace(0.9),
            optax.scale_by_learning_rate(0.1),
        ),
        augmentation=Augmentation(crop_padding=2, cutout_size=6),
        batch_size=BATCH,
        steps_per_epoch=2,
        batch_stats="clean_then_adversarial",
        mesh=sharding.data_mesh(jax.devices()[:devices]),
    )


@pytest.fixture(scope="module")
def initial():
    return jax.device_get(make_trainer({}).init(jax.random.key(0, impl="rbg"), (16, 16, 3)))


@pytest.fixture(scope="module")
def updated(initial):
    """`updated(devices)`: the state and metrics after one update."""
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(BATCH, 16, 16, 3)).astype(np.float32)
    noise = rng.choice([-8 / 255, 8 / 255], size=images.shape).astype(np.float32)
    labels = rng.integers(0, 10, size=BATCH).astype(np.int32)

    @functools.cache
    def run(devices):
        trainer = make_trainer({}, devices)
        batch = Batch(images, np.clip(images + noise, 0, 1), labels)
        batch = jax.device_put(batch, sharding.batch_sharding(trainer.mesh))
        state = jax.device_put(initial, sharding.replicated(trainer.mesh))
        update = jax.jit(trainer.update, static_argnames="clean_gradient")
        after = update(state, batch, clean_gradient=True)
        assert {len(leaf.devices()) for leaf in jax.tree.leaves(after)} == {devices}
        return jax.device_get(after)

    return run


@pytest.mark.slow  # the exact ones of tests/float64 are not
@pytest.mark.parametrize("devices", [2, 4])
def test_one_update_agrees(initial, updated, devices):
    state, metrics = updated(1)
    other, other_metrics = updated(devices)
    worst = 0.0
    for name in ("params", "batch_stats"):
        for path, leaf in jax.tree.leaves_with_path(getattr(state, name)):
            got = dict(jax.tree.leaves_with_path(getattr(other, name)))[path]
            before = dict(jax.tree.leaves_with_path(getattr(initial, name)))[path]
            # Relative to the leaf's change, the harder test: the leaf is about 100 times longer.
            moved = np.linalg.norm(leaf - before)
            assert moved > 0
            worst = max(worst, np.linalg.norm(got - leaf) / moved)
    print(f"worst leaf: {worst:.1e} of its change")
    assert worst <= 2e-4  # measured: 1.4e-5 on one processor, 5.9e-5 on another
    buffers = [optax.tree.get(s.opt_state, "trace") for s in (state, other)]
    for got, expected in zip(*map(jax.tree.leaves, buffers[::-1]), strict=True):
        assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)
    for name, value in metrics.items():
        np.testing.assert_allclose(other_metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    cosines = [optax.tree.get(s.opt_state, "cosine") for s in (state, other)]
    np.testing.assert_allclose(*cosines, atol=1e-5)


@pytest.fixture(scope="module")
def three_steps(initial):
    """The state after three whole steps on one device, attack and augmentation included."""
    rng = np.random.default_rng(1)
    images = jnp.asarray(rng.integers(0, 256, size=(2 * BATCH, 16, 16, 3), dtype=np.uint8))
    labels = jnp.asarray(rng.integers(0, 10, size=2 * BATCH), jnp.int32)
    permutation = jnp.asarray(rng.permutation(2 * BATCH), jnp.int32)

    def run(agr, *, clean_gradient, **options):
        trainer = dataclasses.replace(make_trainer(agr), **options)
        step = jax.jit(trainer.step, static_argnames=("clean_gradient", "batch_size"))
        state = jax.tree.map(jnp.asarray, initial)
        for _ in range(3):
            state, _ = step(
                state,
                images,
                labels,
                permutation,
                jax.random.key(7),
                clean_gradient=clean_gradient,
                batch_size=BATCH,
            )
        return jax.device_get(state)

    return run


@pytest.fixture(scope="module")
def baseline(three_steps):
    return three_steps(ABSENT, clean_gradient=False)


def same_bits(state, other):
    trained = [
        (s.params, s.batch_stats, optax.tree.get(s.opt_state, "trace")) for s in (state, other)
    ]
    pairs = zip(*map(jax.tree.leaves, trained), strict=True)
    return all(a.tobytes() == b.tobytes() for a, b in pairs)


@pytest.mark.slow
def test_agr_that_never_starts_equals_none_bit_for_bit(initial, three_steps, baseline):
    assert same_bits(three_steps(TOO_LATE, clean_gradient=False), baseline)
    assert not same_bits(initial, baseline)
    assert int(baseline.step) == 3


# ---- a caller's own mesh

AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit


def own_mesh(shape, names, kind, order=(2, 0, 3, 1)):
    devices = np.array([jax.devices()[i] for i in order], dtype=object)[: np.prod(shape)]
    return jax.sharding.Mesh(devices.reshape(shape), names, axis_types=(kind,) * len(names))


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
@pytest.mark.parametrize(
    ("shape", "names"),
    [((4,), ("data",)), ((3,), ("batch",)), ((2, 2), ("data", "model")), ((1, 2, 1), "abc")],
)
def test_any_mesh_is_taken_for_its_devices(shape, names, kind):
    given = own_mesh(shape, tuple(names), kind)
    made = sharding.as_data_mesh(given)
    assert (made.axis_names, made.axis_types) == (("data",), (AUTO,))
    assert made.devices.tolist() == given.devices.ravel().tolist()
    rows = np.arange(24, dtype=np.float32).reshape(12, 2)
    double = sharding.per_device(lambda x: 2 * x, made, [sharding.SHARDED])
    doubled = jax.jit(double)(jax.device_put(rows, sharding.batch_sharding(made)))
    np.testing.assert_array_equal(doubled, 2 * rows)
    shards = sorted(doubled.addressable_shards, key=lambda shard: shard.index[0].start)
    assert [shard.device for shard in shards] == made.devices.tolist()


def test_a_sequence_of_devices_is_a_mesh():
    two = jax.devices()[3:1:-1]
    for on in (two, tuple(two), np.array(two, dtype=object)):
        assert sharding.as_data_mesh(on).devices.tolist() == two
    ours = sharding.data_mesh()
    assert sharding.as_data_mesh(ours) == ours
    assert sharding.as_data_mesh(jax.devices()) == ours


@pytest.mark.parametrize(
    ("on", "part"),
    [
        (None, "got None"),
        (4, "got 4"),
        ("cpu", "got 'cpu'"),
        ([], "got none"),
        ([0, 1], "got 0 among the devices"),
        (lambda: jax.devices()[0], "write \\[device\\]"),
        (lambda: jax.devices()[:1] * 2, "every device must be there once"),
        (lambda: jax.sharding.AbstractMesh((1,), ("data",)), "got AbstractMesh"),
        (lambda: sharding.batch_sharding(sharding.data_mesh()), "got NamedSharding"),
        (lambda: set(jax.devices()), "must be a jax.sharding.Mesh or a list of devices"),
    ],
)
def test_what_is_no_mesh_is_refused(on, part):
    with pytest.raises(ConfigError, match=f"^on: .*{part}"):
        sharding.as_data_mesh(on() if callable(on) else on)
