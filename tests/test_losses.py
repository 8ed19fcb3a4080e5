"""Losses in float32 against float64 references; the exact test is `float64/test_losses.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agr_jax import losses

CASES = [
    *("n1k10s2", "n5k3s1", "n7k4s3", "n16k10s0p3", "n32k10s4", "n8k100s3", "n6k200s3"),
    *("ties", "large30", "large200", "large10000", "offset"),
]
# golden/README.md: about four times the worst error of float32 PyTorch and of plain float32 JAX.
VALUE = {
    "ce": {"rtol": 2e-6, "atol": 1e-6},
    "margin": {"rtol": 2e-7},
    "dlr": {"rtol": 1e-6},
    "dlrt": {"rtol": 5e-6},
}
GRADIENT = {"ce": 1e-6, "margin": 0, "dlr": 1e-6, "dlrt": 1e-5}  # of the largest entry
# Means over the batch. MART's 1.0001 - q is summed here, not subtracted (which costs up to 6e-4 of
# that term), so its own allowances, 2e-5 for `mart_bce`, 1e-5 for `mart` and 1.5e-4 or 1.5e-3 for
# `mart_grad_adv`, are not needed: the worst errors are 1.1e-7, 1.1e-7 and 4.6e-7.
MEAN_VALUE = {
    "trades": {"rtol": 3e-6, "atol": 1e-8},
    "mart_bce": {"rtol": 1e-6},
    "mart_kl": {"rtol": 3e-6, "atol": 1e-8},
    "mart": {"rtol": 3e-6},
}
MEAN_GRADIENT = {  # of the largest entry, and an absolute slack in the cases of large logits
    "trades_grad_clean": (5e-6, 4e-5),
    "trades_grad_adv": (5e-6, 0),
    "mart_grad_clean": (5e-6, 1.2e-5),
    "mart_grad_adv": (2e-6, 0),
}
LOSSES = {
    "ce": losses.cross_entropy,
    "margin": losses.margin,
    "dlr": losses.dlr,
    "dlrt": losses.targeted_dlr,
}


@pytest.fixture(scope="module")
def z(golden):
    return golden("losses.npz")


@pytest.fixture(scope="module")
def computed(z):
    """`computed(case)` is everything about a case, from one compiled function."""

    @functools.partial(jax.jit, static_argnames="targeted")
    def everything(clean, adversarial, labels, targets, *, targeted):
        found = {}
        for name, loss in LOSSES.items():
            if name == "dlrt" and not targeted:
                continue
            rest = (labels, targets) if name == "dlrt" else (labels,)
            found[name] = loss(adversarial, *rest)
            total = lambda a, loss=loss, rest=rest: loss(a, *rest).sum()  # noqa: E731
            found[f"{name}_grad"] = jax.grad(total)(adversarial)

        def kl(c, a):
            return losses.kl_divergence(c, a).mean()

        def trades(c, a):
            return losses.cross_entropy(c, labels).mean() + 6 * kl(c, a)

        def mart_kl(c, a):
            return 6 * losses.weighted_kl_divergence(c, a, labels).mean()

        def mart(c, a):
            return losses.boosted_cross_entropy(a, labels).mean() + mart_kl(c, a)

        found["kl"] = losses.kl_divergence(clean, adversarial)
        found["mart_bce"] = losses.boosted_cross_entropy(adversarial, labels).mean()
        found["mart_kl"] = mart_kl(clean, adversarial)
        for name, loss in (("kl_mean", kl), ("trades", trades), ("mart", mart)):
            found[name], gradients = jax.value_and_grad(loss, (0, 1))(clean, adversarial)
            found[f"{name}_grad_clean"], found[f"{name}_grad_adv"] = gradients
        return found

    @functools.cache
    def compute(case):
        clean, adversarial, labels, targets = (
            jnp.asarray(z[f"{case}_{part}"])
            for part in ("logits_clean", "logits_adv", "y", "target")
        )
        return everything(clean, adversarial, labels, targets, targeted=case != "n5k3s1")

    return compute


def best(z, key):
    """The exact value where it is stored, else the reference in float64."""
    return z[f"{key}_exact"] if f"{key}_exact" in z.files else z[f"{key}_ref64"]


def test_the_file_holds_the_cases(z):
    assert bytes(z["cases_utf8"]).decode().split("\n") == CASES


WITHOUT_TIES = [case for case in CASES if case != "ties"]  # where gradients are ambiguous


def with_losses(cases):
    """Every case with every loss, but for targeted DLR on three classes."""
    pairs = [(case, name) for case in cases for name in LOSSES]
    return [pair for pair in pairs if pair != ("n5k3s1", "dlrt")]


@pytest.mark.parametrize(("case", "name"), with_losses(CASES))
def test_values(z, computed, case, name):
    got = computed(case)[name]
    assert got.dtype == jnp.float32
    assert got.shape == z[f"{case}_y"].shape
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, best(z, f"{case}_{name}"), **VALUE[name])


@pytest.mark.parametrize(("case", "name"), with_losses(WITHOUT_TIES))
def test_gradients(z, computed, case, name):
    got = computed(case)[f"{name}_grad"]
    expected = best(z, f"{case}_{name}_grad")
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, expected, rtol=0, atol=GRADIENT[name] * np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_kl_divergence(z, computed, case):
    found = computed(case)
    assert found["kl"].shape == z[f"{case}_y"].shape
    np.testing.assert_allclose(found["kl"].mean(), best(z, f"{case}_kl"), rtol=3e-6, atol=1e-8)
    assert np.isfinite(found["kl_mean_grad_clean"]).all()
    assert np.isfinite(found["kl_mean_grad_adv"]).all()


@pytest.mark.parametrize("name", MEAN_VALUE)
@pytest.mark.parametrize("case", CASES)
def test_trades_and_mart(z, computed, case, name):
    got = computed(case)[name]
    assert got.dtype == jnp.float32
    assert np.isfinite(got)
    np.testing.assert_allclose(got, best(z, f"{case}_{name}"), **MEAN_VALUE[name])


@pytest.mark.parametrize("name", MEAN_GRADIENT)
@pytest.mark.parametrize("case", WITHOUT_TIES)
def test_the_gradients_of_trades_and_mart_flow_through_both_arguments(z, computed, case, name):
    expected, got = best(z, f"{case}_{name}"), computed(case)[name]
    share, slack = MEAN_GRADIENT[name]
    atol = share * np.abs(expected).max() + (slack if case.startswith("large") else 0)
    assert got.dtype == jnp.float32
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("case", "rows"), [("large30", 3), ("large200", 12), ("large10000", 12)])
def test_gradients_are_finite_where_those_of_the_reference_are_nan(z, computed, case, rows):
    # Where a clean probability underflows to 0, PyTorch's gradient through the KL target is NaN.
    for name in ("trades_grad_clean", "mart_grad_clean"):
        of_reference = np.isnan(z[f"{case}_{name}"]).all(axis=-1)
        assert of_reference.sum() == np.isnan(z[f"{case}_{name}"]).any(axis=-1).sum() == rows
        assert np.isfinite(np.asarray(computed(case)[name])[of_reference]).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("case", CASES)
def test_soft_cross_entropy_of_smoothed_one_hot_targets_is_cross_entropy(z, case, smoothing):
    logits, labels = (jnp.asarray(z[f"{case}_{part}"]) for part in ("logits_adv", "y"))
    classes = logits.shape[-1]
    one_hot = jax.nn.one_hot(labels, classes, dtype=jnp.float32)
    targets = (1 - smoothing) * one_hot + smoothing / classes

    def hard(a):
        return losses.cross_entropy(a, labels, label_smoothing=smoothing)

    def soft(a):
        return losses.soft_cross_entropy(a, targets)

    @jax.jit
    def values_and_gradients(a):
        return [(loss(a), jax.grad(lambda a, f=loss: f(a).sum())(a)) for loss in (hard, soft)]

    (value, gradient), (soft_value, soft_gradient) = values_and_gradients(logits)
    assert soft_value.shape == labels.shape
    # Without smoothing the other terms are 0.
    np.testing.assert_allclose(soft_value, value, rtol=2e-6 if smoothing else 0)
    np.testing.assert_allclose(soft_gradient, gradient, rtol=0, atol=1e-6)


def test_label_smoothing():
    logits, labels = jnp.asarray([[1.0, 2.0, 4.0], [0.0, -3.0, 0.5]]), jnp.asarray([2, 1])
    targets = np.asarray([[0.1, 0.1, 0.8], [0.1, 0.8, 0.1]])  # 0.3 spread over three classes
    wide = np.asarray(logits, np.float64)
    log_p = wide - np.log(np.exp(wide).sum(1, keepdims=True))
    got = losses.cross_entropy(logits, labels, label_smoothing=0.3)
    np.testing.assert_allclose(got, -(targets * log_p).sum(1), rtol=2e-6)
    plain = losses.cross_entropy(logits, labels)
    np.testing.assert_array_equal(losses.cross_entropy(logits, labels, label_smoothing=0.0), plain)
    assert (np.abs(got - plain) > 0.1).all()


def test_label_smoothing_has_no_nan_at_extreme_logits():
    logits, labels = jnp.asarray([[1e4, -1e4, 0.0]]), jnp.asarray([1])

    def loss(a):
        return losses.cross_entropy(a, labels, label_smoothing=0.1).sum()

    value, gradient = jax.value_and_grad(loss)(logits)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(("name", "classes"), [("dlr", 2), ("dlrt", 3)])
def test_too_few_classes_are_refused(name, classes):
    labels = [jnp.zeros([1], jnp.int32)] * (2 if name == "dlrt" else 1)
    with pytest.raises(ValueError, match=f"at least {classes + 1} classes, got {classes}"):
        LOSSES[name](jnp.zeros([1, classes]), *labels)


FLAT, STEEP = [1.0, 1.0, 1.0, 1.0], [20.0, 0.0, 0.0, -20.0]


@pytest.mark.parametrize("row", [FLAT, STEEP])
@pytest.mark.parametrize(
    "loss",
    [
        lambda z: losses.dlr(z, jnp.array([1])),
        lambda z: losses.targeted_dlr(z, jnp.array([1]), jnp.array([0])),
        lambda z: losses.boosted_cross_entropy(z, jnp.array([1])),
        lambda z: losses.weighted_kl_divergence(z, -z, jnp.array([1])),
    ],
)
def test_no_nan_in_float16(loss, row):
    """In which the guards of 1e-12 are 0."""
    value, gradient = jax.value_and_grad(lambda z: loss(z).sum())(jnp.asarray([row], jnp.float16))
    assert value.dtype == gradient.dtype == jnp.float16
    assert not bool(jnp.isnan(value) | jnp.isnan(gradient).any())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_the_dtype_of_the_logits_is_kept(name, dtype):
    labels = [jnp.asarray([1]), jnp.asarray([2])][: 2 if name == "dlrt" else 1]
    got = LOSSES[name](jnp.asarray([[0.0, 1.0, 2.0, 4.0]], dtype), *labels)
    assert got.dtype == dtype
