"""Collectives of a training step for two hosts with four GPUs each, counted without a GPU.

    pip install "jax[cuda12]"; JAX_PLATFORMS=cpu python benchmarks/many_machines_program.py TARGET

TARGET is a text GpuTargetConfigProto, as openxla/xla has them for each GPU in
`xla/backends/gpu/target_config/specs/`. XLA's GPU compiler compiles AGR's step (PreAct-ResNet-18,
PGD-10, 512 images) for the two hosts; the numbers that are exchanged are counted. It is no
measurement of a run. The exit status is 1 if there are so many that images, or activations, could
be among them, or if the attack exchanges any.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
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

COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
TYPES = r"(?:pred|bf16|[a-z]+\d+)\[([\d,]*)\]"


def compiled_step(trainer: Trainer, *, on_device: bool) -> str:
    """The program of a step, from images on the devices or streamed to them."""
    mesh, rows = trainer.mesh, trainer.batch_size
    everywhere, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)

    def place(tree, where):  # type: ignore[no-untyped-def]
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree
        )

    def images(count: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        return (
            jax.ShapeDtypeStruct((count, 32, 32, 3), jnp.uint8),
            jax.ShapeDtypeStruct((count,), jnp.int32),
        )

    state = place(jax.eval_shape(lambda: trainer.init(jax.random.key(0), (32, 32, 3))), everywhere)
    step = functools.partial(trainer.step_on_batch, key=jax.random.key(0), clean_gradient=True)
    arguments = place(images(rows), split)
    if on_device:
        step = functools.partial(
            trainer.step, key=jax.random.key(0), clean_gradient=True, batch_size=rows
        )
        order = jax.ShapeDtypeStruct((50_000,), jnp.int32)
        arguments = place((*images(50_000), order), everywhere)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=everywhere)
    return jitted.lower(state, *arguments).compile().as_text()


def exchanged(program: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """Computation, collective and shape of every array that is exchanged."""
    found, computation = [], ""
    for line in program.splitlines():
        if head := re.match(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            computation = head[1]
        match = re.search(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", line)
        if match is None:
            continue
        shapes = [
            tuple(int(size) for size in dims.split(",") if size)
            for dims in re.findall(TYPES, match[1])
        ]
        found += [(computation, match[2], shape) for shape in shapes]
    return found


def main() -> None:
    """Prints a table for each way of feeding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--topology", default="1x2x4", help="slices x hosts x devices of a host")
    options = parser.parse_args()
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=options.target.read_text(), topology=options.topology
    )
    hosts = {device.process_index for device in topology.devices}
    print(f"{options.target.name}: {len(topology.devices)} devices of {len(hosts)} hosts")
    config = from_config_dict(base.recipe("cifar10", "at", "paper"))
    model = models.create("preactresnet18", 10, conv="plain")
    trainer = Trainer(
        model=model,
        method=methods.from_config(config),
        optimizer=optax.chain(agr_transform(), optax.sgd(0.1, momentum=0.9)),
        augmentation=Augmentation(),
        batch_size=options.batch,
        steps_per_epoch=1,
        batch_stats="clean_then_adversarial",
        mesh=sharding.data_mesh(topology.devices),
    )
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros([1, 32, 32, 3])))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    channels = sum(leaf.size for leaf in jax.tree.leaves(variables["batch_stats"])) // 2
    image = options.batch // len(topology.devices) * 32 * 32 * 3
    print(
        f"{parameters:,} parameters, {channels:,} channels of BatchNorm; the images of one device "
        f"are {image:,} numbers\n\n| images | collectives | in the attack's loop | operations | "
        "numbers that are summed | of them gradients | for each channel of BatchNorm | left |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    is_clean = True
    for on_device in (False, True):
        program = compiled_step(trainer, on_device=on_device)
        arrays = exchanged(program)
        operations = len(re.findall(rf" (?:{COLLECTIVES})(?:-start)?\(", program))
        in_loops = sum("while" in where or "body" in where for where, _, _ in arrays)
        # XLA puts arrays that are summed at one time behind one another: so they are counted, not
        # told apart. AGR sums two gradients of every parameter.
        numbers = sum(math.prod(shape) for _, _, shape in arrays)
        others = numbers - 2 * parameters
        kinds = sorted({collective for _, collective, _ in arrays})
        print(
            f"| {'on the devices' if on_device else 'streamed'} | {', '.join(kinds)} | {in_loops} "
            f"| {operations} | {numbers:,} | {2 * parameters:,} | {others // channels} "
            f"| {others % channels} (losses, accuracies) |"
        )
        is_clean &= kinds == ["all-reduce"] and not in_loops and 0 <= others < image
    sys.exit(int(not is_clean))


if __name__ == "__main__":
    main()
