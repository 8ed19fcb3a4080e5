"""Memory that XLA's GPU compiler plans for a training step, and AGR's kernels, without a GPU.

    pip install "jax[cuda12]"; JAX_PLATFORMS=cpu python benchmarks/compiled_memory.py TARGET

TARGET is a text GpuTargetConfigProto, as openxla/xla has them for each GPU in
`xla/backends/gpu/target_config/specs/`. What is printed is counted by the compiler; it is no
measurement of a run. PreAct-ResNet-18, PGD-10, 32x32 images.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from agr_jax import agr_transform, methods, models, sharding
from agr_jax.config import from_config_dict
from agr_jax.data import Augmentation
from agr_jax.training.step import Trainer
from configs import base


def planned_megabytes(trainer: Trainer, *, clean_gradient: bool) -> float:
    """Temporary memory of one compiled step."""
    everywhere = sharding.replicated(trainer.mesh)

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)

    rows = trainer.batch_size
    data = (
        jax.ShapeDtypeStruct((rows, 32, 32, 3), jnp.uint8),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )
    state = jax.eval_shape(lambda: trainer.init(jax.random.key(0), (32, 32, 3)))

    def step(state, images, labels, permutation):  # type: ignore[no-untyped-def]
        return trainer.step(
            state,
            images,
            labels,
            permutation,
            jax.random.key(0),
            clean_gradient=clean_gradient,
            batch_size=rows,
        )

    arguments = jax.tree.map(place, (state, *data))
    compiled = jax.jit(step, donate_argnums=0, out_shardings=everywhere).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def agr_kernels(device: jax.Device) -> int:
    """Kernels that combine and clip the two gradients of PreAct-ResNet-18, diagnostics included."""
    model = models.create("preactresnet18", 10)
    place = jax.sharding.SingleDeviceSharding(device)

    def on_device(tree):  # type: ignore[no-untyped-def]
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    images = jnp.zeros([1, 32, 32, 3])
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    gradient = on_device(variables["params"])
    transform = agr_transform()
    state = on_device(jax.eval_shape(transform.init, gradient))
    compiled = jax.jit(lambda a, c, s: transform.update(a, s, clean_grads=c)).lower(
        gradient, gradient, state
    )
    program = compiled.compile().as_text()
    return program[program.index("ENTRY") :].count(" fusion(")


def main() -> None:
    """Prints each method's planned memory, without and with AGR, and AGR's kernels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--methods", nargs="+", default=["at", "trades", "mart", "awp", "avmixup"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=options.target.read_text(), topology="1x1x1"
    )
    print(f"{options.target.name}: AGR is {agr_kernels(topology.devices[0])} kernels")
    print(f"{options.target.name}, batch {options.batch}, PreAct-ResNet-18, PGD-10")
    print("| method | precision | without AGR, MB | with AGR, MB |")
    print("|---|---|---|---|")
    for name, dtype in itertools.product(options.methods, options.dtypes):
        config = from_config_dict(base.recipe("cifar10", name, "paper"))
        trainer = Trainer(
            model=models.create("preactresnet18", 10, conv="plain", dtype=jnp.dtype(dtype)),
            method=methods.from_config(config),
            optimizer=optax.chain(agr_transform(), optax.sgd(0.1, momentum=0.9)),
            augmentation=Augmentation(),
            batch_size=options.batch,
            steps_per_epoch=1,
            batch_stats="clean_then_adversarial",
            mesh=sharding.data_mesh(topology.devices),
        )
        planned = [planned_megabytes(trainer, clean_gradient=clean) for clean in (False, True)]
        print(f"| {name} | {dtype} | {planned[0]:.0f} | {planned[1]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
