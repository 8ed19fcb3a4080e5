"""A classifier is what it computes now, whatever object it comes in, in every entry."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from agr_jax.attacks import apgd, autoattack, cw_l2, fab, fgsm, mim, pgd, spsa, square
from agr_jax.attacks._tracing import trace
from agr_jax.threat import L2, Linf

KEY = jax.random.key(0)
IMAGES = jax.random.uniform(jax.random.key(1), (6, 4, 4, 1))


def draw(seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    return jax.random.normal(keys[0], (16, 8)) / 4, jax.random.normal(keys[1], (8, 5))


def apply(weights, x):
    return jnp.tanh(4 * (x.reshape(len(x), -1) - 0.5) @ weights[0]) @ weights[1]


OLD, NEW = draw(2), draw(3)
LABELS = apply(OLD, IMAGES).argmax(-1)


# ---- callables: each is made with the old weights, and given the new ones in its own way


class Closure:
    def __init__(self):
        self.weights = OLD
        self.callable = lambda x: apply(self.weights, x)

    def change(self):
        self.weights = NEW


class Global(Closure):
    """A function over a name that is bound again, as in a loop of optax's."""

    def __init__(self):
        weights = OLD

        def logits_fn(x):
            return apply(weights, x)

        def change():
            nonlocal weights
            weights = NEW

        self.callable, self.change = logits_fn, change


class Method:
    def __init__(self):
        self.weights, self.callable = OLD, self.predict

    def predict(self, x):
        return apply(self.weights, x)

    def change(self):
        self.weights = NEW


class Called(Method):
    def __init__(self):
        self.weights, self.callable = OLD, self

    def __call__(self, x):
        return self.predict(x)


class Equal(Called):
    """A wrapper that compares equal to every other."""

    def __eq__(self, other):
        return isinstance(other, Equal)

    def __hash__(self):
        return 0


class OfPartial(Closure):
    """`functools.partial` of a mutable tree."""

    def __init__(self):
        self.weights = list(OLD)
        self.callable = functools.partial(apply, self.weights)

    def change(self):
        self.weights[:] = NEW


class OfTreePartial(Closure):
    """A pytree whose function closes over what changes."""

    def __init__(self):
        self.weights = OLD
        self.callable = jax.tree_util.Partial(lambda x: apply(self.weights, x))


class Network(nnx.Module):
    def __init__(self, weights):
        self.first, self.second = (nnx.Param(each) for each in weights)

    def __call__(self, x):
        return apply((self.first[...], self.second[...]), x)


class OfNNX:
    def __init__(self):
        self.model = Network(OLD)
        self.callable = lambda x: self.model(x)  # noqa: PLW0108 (which model may change)

    def change(self):
        self.model.first[...], self.model.second[...] = NEW


class OfNNXJit(OfNNX):
    """`nnx.jit` keeps what it closed over itself: it is made anew, as its users have to."""

    def __init__(self):
        super().__init__()
        self.callable = nnx.jit(lambda x: self.model(x))  # noqa: PLW0108

    def change(self):
        super().change()
        self.callable = nnx.jit(lambda x: self.model(x))  # noqa: PLW0108


class OfEquinox:
    class Module(eqx.Module):
        weights: tuple

        def __call__(self, x):
            return apply(self.weights, x)

    def __init__(self):
        self.callable = self.Module(OLD)

    def change(self):
        self.callable = self.Module(NEW)


CALLABLES = [
    Closure,
    Global,
    Method,
    Called,
    Equal,
    OfPartial,
    OfTreePartial,
    OfNNX,
    OfNNXJit,
    OfEquinox,
]
LINF, BALL = Linf(0.05), L2(0.4)


def distances(found):
    points, distance = found
    return jnp.concatenate([points.reshape(len(points), -1), distance[:, None]], 1)


def of_autoattack(network, folder=None, **settings):
    attack = autoattack(LINF, **settings)
    result = attack.evaluate(network, IMAGES, LABELS, KEY, progress=False, folder=folder)
    return np.concatenate([result.adversarial.ravel(), result.robust])


ENTRIES = {
    "fgsm": lambda net: fgsm(LINF)(net, IMAGES, LABELS, KEY),
    "pgd": lambda net: pgd(LINF, steps=3)(net, IMAGES, LABELS, KEY),
    "restarts": lambda net: pgd(BALL, steps=2, restarts=2)(net, IMAGES, LABELS, KEY),
    "from_start": lambda net: pgd(LINF, steps=3).from_start(net, IMAGES, LABELS, IMAGES),
    "mim": lambda net: mim(LINF, steps=3)(net, IMAGES, LABELS, KEY),
    "apgd": lambda net: apgd(LINF, steps=5)(net, IMAGES, LABELS, KEY),
    "trajectory": lambda net: apgd(LINF, steps=5).trajectory(net, IMAGES, LABELS, IMAGES).loss,
    "fab": lambda net: fab(BALL, targets=2, steps=5)(net, IMAGES, LABELS, KEY),
    "fab.nearest": lambda net: distances(
        fab(BALL, targets=2, steps=5).nearest(net, IMAGES, LABELS, KEY)
    ),
    "square": lambda net: square(LINF, queries=20)(net, IMAGES, LABELS, KEY),
    "spsa": lambda net: spsa(LINF, steps=2, samples=8)(net, IMAGES, LABELS, KEY),
    "cw_l2": lambda net: cw_l2(BALL, steps=20, searches=2)(net, IMAGES, LABELS, KEY),
    "cw_l2.nearest": lambda net: distances(
        cw_l2(BALL, steps=20, searches=2).nearest(net, IMAGES, LABELS)
    ),
    "autoattack": lambda net: of_autoattack(net, version="custom", attacks=("apgd-ce", "square")),
}
by_entry = pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, marks=pytest.mark.slow)
        if entry in ("autoattack", "trajectory")
        else entry
        for entry in ENTRIES
    ],
)


@pytest.fixture(scope="module")
def right():
    """What each entry gives with the old and the new weights, as arguments."""

    @functools.cache
    def results(entry):
        return tuple(
            np.asarray(ENTRIES[entry](jax.tree_util.Partial(apply, weights)))
            for weights in (OLD, NEW)
        )

    return results


@by_entry
def test_weights_are_those_of_the_call(entry, right):
    old, new = right(entry)
    assert not np.array_equal(old, new)
    for kind in CALLABLES:
        network = kind()
        first = np.asarray(ENTRIES[entry](network.callable))
        np.testing.assert_allclose(first, old, atol=1e-5, err_msg=kind.__name__)
        network.change()
        second = np.asarray(ENTRIES[entry](network.callable))
        np.testing.assert_allclose(second, new, atol=1e-5, err_msg=kind.__name__)


def test_autoattack_in_a_folder(tmp_path):
    """A folder of the old weights is not gone on with."""
    network, settings = Closure(), {"version": "custom", "attacks": ("apgd-ce",)}
    of_autoattack(network.callable, tmp_path / "run", **settings)
    network.change()
    with pytest.raises(Exception, match="another evaluation"):
        of_autoattack(network.callable, tmp_path / "run", **settings)
    new = of_autoattack(network.callable, tmp_path / "other", **settings)
    expected = of_autoattack(jax.tree_util.Partial(apply, NEW), **settings)
    np.testing.assert_array_equal(new, expected)


@by_entry
def test_an_equal_network_compiles_nothing(entry, right, compilations):
    right(entry)
    ENTRIES[entry](lambda x: apply(OLD, x))
    compilations.clear()
    ENTRIES[entry](lambda x: apply(OLD, x))
    ENTRIES[entry](functools.partial(apply, NEW))
    ENTRIES[entry](jax.tree_util.Partial(apply, OLD))
    assert not compilations


def test_a_loss_is_what_it_computes_now():
    """A loss of the caller's own that closes over an array."""
    weight = jnp.ones(5)

    def loss(logits, labels):
        return logits @ weight

    network = jax.tree_util.Partial(apply, OLD)
    attacks = {
        "fgsm": fgsm(LINF, loss=loss),
        "pgd": pgd(LINF, steps=3, loss=loss),
        "apgd": apgd(LINF, steps=5, loss=loss),
        "spsa": spsa(LINF, steps=2, samples=8, loss=loss),
    }
    before = {name: attack(network, IMAGES, LABELS, KEY) for name, attack in attacks.items()}
    weight = -jnp.arange(5.0)
    for name, attack in attacks.items():
        now = attack(network, IMAGES, LABELS, KEY)
        assert not np.array_equal(now, before[name]), name
        settings = {"loss": lambda z, y: z @ -jnp.arange(5.0)}
        fresh = {**vars(attack), **settings}
        np.testing.assert_array_equal(now, type(attack)(**fresh)(network, IMAGES, LABELS, KEY))


def test_a_targeted_loss_gets_its_classes():
    attack = apgd(LINF, steps=4, targets=2, loss=lambda z, y, t: (z * jax.nn.one_hot(t, 5)).sum(1))
    adversarial = attack(lambda x: apply(OLD, x), IMAGES, LABELS, KEY)
    assert float(jnp.abs(adversarial - IMAGES).max()) > 0.04


def test_inside_the_callers_jit():
    """There the callers' own rules hold, and weights may be arguments."""

    @jax.jit
    def robust(weights):
        adversarial = pgd(LINF, steps=3)(lambda x: apply(weights, x), IMAGES, LABELS, KEY)
        return apply(weights, adversarial)

    for weights in (OLD, NEW):
        network = functools.partial(apply, weights)
        outside = pgd(LINF, steps=3)(network, IMAGES, LABELS, KEY)
        np.testing.assert_allclose(robust(weights), apply(weights, outside), atol=1e-5)


@pytest.mark.parametrize("transform", [jax.vmap, lambda f: jax.jit(jax.vmap(f))])
def test_under_vmap(transform):
    """Over a second axis of batches."""
    batches = jnp.stack([IMAGES, IMAGES[::-1]])
    network = jax.tree_util.Partial(apply, OLD)
    attack = pgd(LINF, steps=3)
    together = transform(lambda x: attack(network, x, LABELS, KEY))(batches)
    for row, batch in zip(together, batches, strict=True):
        np.testing.assert_allclose(row, attack(network, batch, LABELS, KEY), atol=1e-6)


def test_under_vmap_weights_are_those_of_the_call():
    network, batches = Closure(), jnp.stack([IMAGES, IMAGES[::-1]])
    attack = jax.vmap(lambda x: pgd(LINF, steps=3)(network.callable, x, LABELS, KEY))
    old = attack(batches)
    network.change()
    expected = pgd(LINF, steps=3)(network.callable, IMAGES, LABELS, KEY)
    np.testing.assert_allclose(attack(batches)[0], expected, atol=1e-6)
    assert not np.array_equal(old[0], expected)


class Convolutions(nn.Module):
    """Flax's own convolutions, with BatchNorm and strides."""

    @nn.compact
    def __call__(self, x):
        for features, stride in ((4, 1), (6, 2), (6, 3)):
            x = nn.Conv(features, (3, 3), (stride, stride))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        return nn.Dense(5)(nn.max_pool(x, (2, 2), (1, 1)).mean((1, 2)))


@pytest.mark.parametrize("wrap", ["plain", "jit", "remat", "scan"])
def test_the_traced_network_is_the_network(wrap):
    """Values and input gradients of a network with foreign convolutions, in every nesting."""
    model = Convolutions()
    images = jax.random.uniform(KEY, (3, 11, 9, 2))
    variables = jax.jit(model.init)(jax.random.key(4), images)

    def network(x):
        return model.apply(variables, x)

    def scanned(x):
        def add(total, scale):
            return total + network(scale * x), None

        return jax.lax.scan(add, jnp.zeros((3, 5)), jnp.array([1.0, 0.5]))[0]

    wrapped = {
        "plain": network,
        "jit": jax.jit(network),
        "remat": jax.checkpoint(network),
        "scan": scanned,
    }[wrap]
    traced = trace(wrapped, images)
    if jax.default_backend() == "cpu":
        assert traced.program.rewritten or wrap == "scan"
    np.testing.assert_allclose(traced(images), wrapped(images), atol=1e-5)

    def total(function, x):
        return jnp.sin(function(x)).sum()

    gradients = [
        jax.jit(jax.grad(functools.partial(total, each)))(images) for each in (traced, wrapped)
    ]
    np.testing.assert_allclose(*gradients, atol=1e-5)


def test_a_rule_of_ones_own_is_kept():
    """The gradient is the one that `custom_vjp` says, and another rule is another program."""

    def make(factor):
        @jax.custom_vjp
        def rounded(x):
            return jnp.round(4 * x) / 4

        rounded.defvjp(lambda x: (rounded(x), None), lambda _, cotangent: (factor * cotangent,))
        return lambda x: apply(OLD, rounded(x))

    programs = [trace(make(factor), IMAGES).program for factor in (1.0, 1.0, -1.0)]
    assert programs[0] is programs[1]
    assert programs[0] is not programs[2]
    forward, backward = (fgsm(LINF)(make(factor), IMAGES, LABELS, KEY) for factor in (1.0, -1.0))
    inside = (IMAGES > 0.05) & (IMAGES < 0.95)
    steps = [jnp.where(inside, each - IMAGES, 0) for each in (forward, backward)]
    np.testing.assert_allclose(steps[0], -steps[1], atol=1e-6)
    assert float(jnp.abs(steps[0]).max()) > 0.04


def test_nnx_jit_with_a_module_as_argument_is_refused():
    """It writes the module back, which Flax refuses within any other program."""
    compiled = nnx.jit(lambda model, x: model(x))
    with pytest.raises(ValueError, match=r"nnx\.jit .* lambda x: model\(x\)"):
        pgd(LINF)(functools.partial(compiled, Network(OLD)), IMAGES, LABELS, KEY)


def test_a_callback_is_called():
    """What runs on the host has no gradient, and no content: it is known by its identity."""
    calls = []

    def host(x):
        calls.append(x.shape)
        return np.asarray(x).reshape(len(x), -1)[:, :5]

    def network(x):
        shape = jax.ShapeDtypeStruct((len(x), 5), jnp.float32)
        return jax.pure_callback(host, shape, x, vmap_method="sequential")

    first = square(LINF, queries=5)(network, IMAGES, LABELS, KEY)
    assert calls
    np.testing.assert_array_equal(first, square(LINF, queries=5)(network, IMAGES, LABELS, KEY))
    spsa(LINF, steps=2, samples=4)(network, IMAGES, LABELS, KEY)
    of_autoattack(network, version="custom", attacks=("square",))


def test_programs_do_not_outlive_their_use():
    traced = trace(lambda x: apply(OLD, x) + 3.25, IMAGES)
    leaves = jax.tree.leaves(traced)
    assert {leaf.shape for leaf in leaves} == {(16, 8), (8, 5)}
    assert not traced.program.forward.consts
    assert not traced.program.backward.consts


def test_a_keras_model_after_more_training():
    keras = pytest.importorskip("keras", reason="Keras 3 is not installed")
    if keras.backend.backend() != "jax":
        pytest.skip("Keras has another backend than JAX (KERAS_BACKEND=jax)")
    model = keras.Sequential(
        [keras.Input((4, 4, 1)), keras.layers.Flatten(), keras.layers.Dense(5)]
    )
    model.layers[-1].set_weights([np.asarray(OLD[0] @ OLD[1]), np.zeros(5)])

    def network(x):
        return model(x, training=False)

    for weights in (OLD, NEW):
        model.layers[-1].set_weights([np.asarray(weights[0] @ weights[1]), np.zeros(5)])
        expected = pgd(LINF, steps=3)(
            lambda x, w=weights: x.reshape(len(x), -1) @ (w[0] @ w[1]), IMAGES, LABELS, KEY
        )
        with jax.numpy_rank_promotion("allow"):  # Keras adds its biases so
            found = pgd(LINF, steps=3)(network, IMAGES, LABELS, KEY)
        np.testing.assert_allclose(found, expected, atol=1e-5)
