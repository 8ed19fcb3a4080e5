#!/usr/bin/env bash
# jax 0.10.2 on a CPU: the input gradient of an ordinary convolution is rewritten into the layout that
# the compiler has a fast routine for at the top level of a program only. In the body of a loop, such
# as the steps of an attack, it keeps the layout of automatic differentiation (kernel `01oi`) and
# takes a generic path, many times slower. The forward convolution is in the fast layout in both.
# Seen: b01f_01oi->b01f in the loop's program, b01f_01io->b01f alone outside.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "jax==0.10.2"
cd "$folder"
JAX_PLATFORMS=cpu venv/bin/python - <<'PYTHON'
import re

import jax
import jax.numpy as jnp

kernel, images = jnp.ones((3, 3, 4, 4)), jnp.ones((2, 8, 8, 4))


def network(x):
    layout = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)
    return jnp.tanh(x).sum()


def step(x):
    return x + jnp.sign(jax.grad(network)(x))


def loop(x):
    return jax.lax.fori_loop(0, 3, lambda _, x: step(x), x)


layouts = {}
for name, function in (("outside", step), ("loop", loop)):
    text = jax.jit(function).lower(images).compile().as_text()
    layouts[name] = sorted(set(re.findall(r"dim_labels=(\S+?)[,\s]", text)))
    print(name, layouts[name])
assert "b01f_01oi->b01f" in layouts["loop"]
assert "b01f_01oi->b01f" not in layouts["outside"]
PYTHON
