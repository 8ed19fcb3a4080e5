#!/usr/bin/env bash
# jax 0.10.2: not only `jit` remembers a function by its identity and keeps the arrays that it closed
# over at its first trace. `make_jaxpr`, `eval_shape`, `checkpoint` and the bodies of `lax.scan` do
# so too, with no `jit` in sight: after the name is bound to other weights, the function itself
# returns new values, and these return the old ones (even the old shape). A new function object,
# such as a fresh lambda around it, is traced anew.
# Seen: make_jaxpr [1. 1.], eval_shape (2,), checkpoint 1.0, scan 1.0 where 2.0 and (3, 2) are right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "jax==0.10.2"
cd "$folder"
JAX_PLATFORMS=cpu venv/bin/python - <<'PYTHON'
import jax
import jax.numpy as jnp

weights = jnp.ones(2)


def network(x):
    return x * weights


def body(carry, _):
    return carry, network(x)


x = jnp.ones(2)
remat = jax.checkpoint(network)


def seen():
    return (
        jax.make_jaxpr(network)(x).consts[0].tolist(),
        remat(x).tolist(),
        jax.lax.scan(body, 0, None, length=1)[1][0].tolist(),
    )


assert seen() == ([1, 1], [1, 1], [1, 1])
weights = 2 * jnp.ones(2)
assert network(x).tolist() == [2, 2]
print("make_jaxpr, checkpoint, scan after another binding:", *seen())
assert seen() == ([1, 1], [1, 1], [1, 1])
assert jax.make_jaxpr(lambda x: network(x))(x).consts[0].tolist() == [2, 2]
assert jax.eval_shape(network, x).shape == (2,)
weights = jnp.ones((3, 2))
print("eval_shape:", jax.eval_shape(network, x).shape, "of", network(x).shape)
assert network(x).shape == (3, 2)
assert jax.eval_shape(network, x).shape == (2,)
PYTHON
