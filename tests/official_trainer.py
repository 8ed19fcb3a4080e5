"""One training step of the library on the golden network, and its distance to the official one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from official_weights import draw, in_torch_layout, path_of, statistics, to_variables

from agr_jax import agr_transform, mesh, optim
from agr_jax.attacks import PGD
from agr_jax.config import from_config_dict
from agr_jax.data import Augmentation
from agr_jax.methods import AdversarialTraining
from agr_jax.models import PreActResNet
from agr_jax.threat import Linf
from agr_jax.train_step import Trainer, TrainState
from configs import base

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
OFFICIAL_PGD = PGD(Linf(8 / 255), steps=10, step_size=2 / 255, box_every_step=False)


class Recorded(NamedTuple):
    """State of `recording`: what went through the wrapped optimiser, beside its own state."""

    inner: optax.OptState
    adversarial: Any
    clean: Any
    updates: Any


def recording(inner: optax.GradientTransformationExtraArgs):
    """Wraps an optimiser so that its state also keeps the last gradients and updates."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return Recorded(inner.init(params), zeros, zeros, zeros)

    def update(updates, state, params=None, *, clean_grads=None, **extra):
        result, after = inner.update(updates, state.inner, params, clean_grads=clean_grads, **extra)
        clean = state.clean if clean_grads is None else clean_grads
        return result, Recorded(after, updates, clean, result)

    return optax.GradientTransformationExtraArgs(init, update)


def make_trainer(*, agr: bool, conv: str, dtype: Any) -> Trainer:
    """AT with or without AGR, both of its parts active from the first step."""
    values = base.recipe("official")
    values.agr.enabled = agr
    values.agr.gop_start_epoch = values.agr.gics_start_epoch = 0
    values.optimizer.learning_rate = 0.01
    values.optimizer.schedule = "constant"
    config = from_config_dict(values)
    assert (config.agr.clip, config.agr.clip_norm) == ("changed", 0.1)
    assert (config.optimizer.momentum, config.optimizer.weight_decay) == (0.9, 5e-4)
    return Trainer(
        model=PreActResNet(10, conv=conv, dtype=dtype, param_dtype=dtype, **IMAGENET),
        method=AdversarialTraining(OFFICIAL_PGD),
        optimizer=recording(optim.create(config, steps_per_epoch=1)),
        augmentation=Augmentation(),
        batch_size=16,
        steps_per_epoch=1,
        batch_stats="clean_then_adversarial",
        on=mesh.data_mesh(jax.devices()[:1]),
    )


def initial_state(trainer: Trainer, weight_seed: int, lin_gain: float) -> TrainState:
    """The golden weights, and an empty momentum buffer."""
    variables = to_variables(draw(weight_seed, lin_gain), trainer.model.param_dtype)
    variables = jax.tree.map(jnp.asarray, variables)
    opt_state = trainer.optimizer.init(variables["params"])
    return TrainState(
        jnp.zeros([], jnp.int32), variables["params"], variables["batch_stats"], opt_state
    )


def images_of(z: Any, prefix: str, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Clean images and labels. The reference divides by 255 in float32, in float64 too."""
    x = z[f"{prefix}x_u8_nhwc"].astype(np.float32) / np.float32(255)
    return jnp.asarray(x.astype(dtype)), jnp.asarray(z[f"{prefix}y"], jnp.int32)


def nhwc(images: np.ndarray, dtype: Any) -> jax.Array:
    return jnp.asarray(images.transpose(0, 2, 3, 1).astype(dtype))


def compiled_step(trainer: Trainer, *, agr: bool):
    """`state, batch -> (next state, metrics, (clean, adversarial logits), combined gradient)`."""

    @jax.jit
    def step(state, batch):
        after, metrics = trainer.update(state, batch, clean_gradient=agr)
        clean, between = trainer.forward(state.params, state.batch_stats, batch.images)
        adversarial, _ = trainer.forward(state.params, between, batch.adversarial)
        seen = after.opt_state
        combined = seen.adversarial
        if agr:
            alone = agr_transform(clip="changed")
            combined, _ = alone.update(combined, alone.init(state.params), clean_grads=seen.clean)
        return after, metrics, (clean, adversarial), combined

    return step


def relative(got: Any, expected: Any) -> float:
    return float(np.max(np.abs(got - expected) / np.abs(expected)))


def step_errors(result: Any, z: Any, key: str, names: list[str], *, agr: bool) -> dict[str, float]:
    """Largest error of a step in every kind of number stored under `key` (such as `agr64_`).

    Norms, losses and statistics are relative; sums are relative to the leaf's norm; elements to the
    root mean square of the leaf; logits to the largest logit; cosines absolute.
    """
    state, metrics, (clean_logits, adversarial_logits), combined = result
    seen = state.opt_state
    trees = {
        "gadv": seen.adversarial,
        "grad": combined,
        "buf": optax.tree.get(seen.inner, "trace"),
        "update": jax.tree.map(jnp.negative, seen.updates),  # stored as before minus after
    }
    if agr:
        trees["gclean"] = seen.clean
    errors = {}
    for kind, tree in trees.items():
        worst = dict.fromkeys(("norm", "sum", "first32", "spread32"), 0.0)
        for i, name in enumerate(names):
            leaf = in_torch_layout(tree, name).astype(np.float64).ravel()
            norm = z[f"{key}{kind}_norm"][i].astype(np.float64)
            spread = np.linspace(0, leaf.size - 1, 32).astype(int)
            first = np.pad(leaf[:32], (0, max(0, 32 - leaf.size)))
            rms = norm / leaf.size**0.5
            found = {
                "norm": abs(np.linalg.norm(leaf) - norm) / norm,
                "sum": abs(leaf.sum() - z[f"{key}{kind}_sum"][i]) / norm,
                "first32": np.abs(first - z[f"{key}{kind}_first32"][i]).max() / rms,
                "spread32": np.abs(leaf[spread] - z[f"{key}{kind}_spread32"][i]).max() / rms,
            }
            # `max` would drop a NaN.
            worst = {part: np.maximum(worst[part], found[part]) for part in worst}
        errors |= {f"{kind}_{part}": float(error) for part, error in worst.items()}
    errors["loss_clean"] = relative(metrics["clean_loss"], z[f"{key}loss_train_clean"])
    errors["loss_adv"] = relative(metrics["adversarial_loss"], z[f"{key}loss_train_adv"])
    pairs = {"clean_logits": clean_logits, "output_adv_logits": adversarial_logits}
    for part, logits in pairs.items():
        expected = z[key + part]
        errors[part] = float(np.abs(logits - expected).max() / np.abs(expected).max())
    for part, kind in (("bn_mean", "running_mean"), ("bn_var", "running_var")):
        got, expected = statistics(state.batch_stats, kind), z[key + part]
        # The means cross zero: they are compared with the largest.
        scale = np.abs(expected).max() if part == "bn_mean" else np.abs(expected)
        errors[part] = float(np.max(np.abs(got - expected) / scale))
    if agr:
        errors |= _diagnostic_errors(state, metrics, z, key, names)
    return errors


def _diagnostic_errors(state, metrics, z, key, names) -> dict[str, float]:
    seen = state.opt_state
    # AGR's vectors are in the order of our tree.
    ours = [path for path, _ in jax.tree.leaves_with_path(state.params)]
    row = {jax.tree_util.keystr(path, simple=True, separator="/"): i for i, path in enumerate(ours)}
    order = [row["/".join(path_of(name)[1:])] for name in names]
    cosine = np.asarray(optax.tree.get(seen.inner, "cosine"))[order]
    distance = jax.tree.map(
        lambda a, c: jnp.linalg.norm((a - c).ravel()), seen.adversarial, seen.clean
    )
    projected = np.asarray(optax.tree.get(seen.inner, "projected"))
    mean_distance = float(np.mean(jax.tree.leaves(distance)))
    return {
        "cs": float(np.abs(cosine - z[f"{key}cs"]).max()),
        "gop_count": float(abs(projected.sum() - z[f"{key}gop_count"])),
        "gop_rate": float(abs(metrics["conflicting"] - z[f"{key}gop_rate"])),
        "mean_cos": float(abs(metrics["cosine"] - z[f"{key}mean_cos"])),
        "mean_l2dis": relative(mean_distance, z[f"{key}mean_l2dis"]),
        "mean_norm_adv": relative(metrics["adversarial_norm"], z[f"{key}mean_norm_adv"]),
        "mean_norm_clean": relative(metrics["clean_norm"], z[f"{key}mean_norm_clean"]),
    }
