"""Losses and their gradients in float64 against every stored array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agr_jax import losses

LOSSES = {
    "ce": losses.cross_entropy,
    "margin": losses.margin,
    "dlr": losses.dlr,
    "dlrt": losses.targeted_dlr,
}


@pytest.fixture(scope="module")
def z(golden):
    return golden("losses.npz")


def check(got, z, key):
    expected = z[f"{key}_exact"] if f"{key}_exact" in z.files else z[f"{key}_ref64"]
    assert got.dtype == jnp.float64
    assert np.isfinite(got).all()
    # golden/README.md: the reference is stored in float32.
    atol = 1e-10 * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=1e-7, atol=atol, err_msg=key)


def cases(z):
    return bytes(z["cases_utf8"]).decode().split("\n")


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients(z, name):
    @jax.jit
    def values_and_gradients(logits, *labels):
        loss = LOSSES[name]
        return loss(logits, *labels), jax.grad(lambda a: loss(a, *labels).sum())(logits)

    checked = 0
    for case in cases(z):
        if f"{case}_{name}" not in z.files:
            assert (case, name) == ("n5k3s1", "dlrt")  # needs four classes
            continue
        logits = jnp.asarray(z[f"{case}_logits_adv"], jnp.float64)
        labels = [jnp.asarray(z[f"{case}_{part}"]) for part in ("y", "target")]
        values, gradients = values_and_gradients(logits, *labels[: 2 if name == "dlrt" else 1])
        check(values, z, f"{case}_{name}")
        if case != "ties":  # its gradients are ambiguous
            check(gradients, z, f"{case}_{name}_grad")
        checked += 1
    assert checked == (11 if name == "dlrt" else 12)


def test_kl_divergence_and_trades(z):
    @jax.jit
    def values_and_gradients(clean, adversarial, labels):
        def trades(c, a):
            cross_entropy = losses.cross_entropy(c, labels).mean()
            return cross_entropy + 6 * losses.kl_divergence(c, a).mean()

        value, gradients = jax.value_and_grad(trades, (0, 1))(clean, adversarial)
        return losses.kl_divergence(clean, adversarial).mean(), value, gradients

    for case in cases(z):
        clean, adversarial = (
            jnp.asarray(z[f"{case}_logits_{part}"], jnp.float64) for part in ("clean", "adv")
        )
        kl, trades, gradients = values_and_gradients(
            clean, adversarial, jnp.asarray(z[f"{case}_y"])
        )
        check(kl, z, f"{case}_kl")
        check(trades, z, f"{case}_trades")
        if case != "ties":
            check(gradients[0], z, f"{case}_trades_grad_clean")
            check(gradients[1], z, f"{case}_trades_grad_adv")


def test_mart(z):
    @jax.jit
    def values_and_gradients(clean, adversarial, labels):
        def mart(c, a):
            boosted = losses.boosted_cross_entropy(a, labels).mean()
            divergence = 6 * losses.weighted_kl_divergence(c, a, labels).mean()
            return boosted + divergence, (boosted, divergence)

        return jax.value_and_grad(mart, (0, 1), has_aux=True)(clean, adversarial)

    for case in cases(z):
        clean, adversarial = (
            jnp.asarray(z[f"{case}_logits_{part}"], jnp.float64) for part in ("clean", "adv")
        )
        (mart, parts), gradients = values_and_gradients(
            clean, adversarial, jnp.asarray(z[f"{case}_y"])
        )
        check(mart, z, f"{case}_mart")
        check(parts[0], z, f"{case}_mart_bce")
        check(parts[1], z, f"{case}_mart_kl")
        if case != "ties":
            check(gradients[0], z, f"{case}_mart_grad_clean")
            check(gradients[1], z, f"{case}_mart_grad_adv")
