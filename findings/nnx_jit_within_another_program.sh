#!/usr/bin/env bash
# flax 0.12.8 with jax 0.10.2: `nnx.jit(lambda x: model(x))` goes on with the weights that the module
# had at the first call, and with the module as an argument, `nnx.jit(f)(model, x)`, it cannot be
# called within a `jax.jit`: it raises TraceContextError, and the module has lost its Variables
# afterwards, so that a caller who catches the error cannot use it any more.
# Seen: 8.0 where the module itself gives 16.0; then "Cannot mutate Param from a different trace
# level", and "object has no attribute 'weights'".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "jax==0.10.2" "flax==0.12.8"
cd "$folder"
JAX_PLATFORMS=cpu venv/bin/python - <<'PYTHON'
import jax
import jax.numpy as jnp
from flax import errors, nnx


class Network(nnx.Module):
    def __init__(self):
        self.weights = nnx.Param(jnp.ones((4, 2)))

    def __call__(self, x):
        return x @ self.weights[...]


model, x = Network(), jnp.ones((1, 4))
closure = nnx.jit(lambda x: model(x))
assert float(closure(x).sum()) == 8
model.weights[...] = 2 * jnp.ones((4, 2))
print("closure:", float(closure(x).sum()), "module:", float(model(x).sum()))
assert float(closure(x).sum()) == 8
assert float(model(x).sum()) == 16

compiled = nnx.jit(lambda model, x: model(x))
assert float(compiled(model, x).sum()) == 16
try:
    jax.jit(lambda x: compiled(model, x))(x)
except errors.TraceContextError as error:
    print("within jax.jit:", str(error).split("(")[0])
else:
    raise SystemExit("it can be called now")
try:
    model(x)
except AttributeError as error:
    print("afterwards:", error)
else:
    raise SystemExit("the module can be used now")
PYTHON
