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

        found["kl"] = losses.kl_divergence(clean, adversarial)
        for name, loss in (("kl", kl), ("trades", trades)):
            gradients = jax.grad(loss, (0, 1))(clean, adversarial)
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
    assert np.isfinite(found["kl_grad_clean"]).all()
    assert np.isfinite(found["kl_grad_adv"]).all()


@pytest.mark.parametrize("case", WITHOUT_TIES)
def test_the_gradient_of_trades_flows_through_both_arguments(z, computed, case):
    for part in ("clean", "adv"):
        expected = best(z, f"{case}_trades_grad_{part}")
        slack = 4e-5 if part == "clean" and case.startswith("large") else 0
        atol = 5e-6 * np.abs(expected).max() + slack
        got = computed(case)[f"trades_grad_{part}"]
        np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


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


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_the_dtype_of_the_logits_is_kept(name, dtype):
    labels = [jnp.asarray([1]), jnp.asarray([2])][: 2 if name == "dlrt" else 1]
    got = LOSSES[name](jnp.asarray([[0.0, 1.0, 2.0, 4.0]], dtype), *labels)
    assert got.dtype == dtype
