"""One training step of the library on the golden network, and its distance to the official one."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from official_weights import draw, in_torch_layout, path_of, statistics, to_variables

from agr_jax import agr_transform, leaf_names, losses, methods, sharding
from agr_jax.attacks import PGD
from agr_jax.config import from_config_dict
from agr_jax.data import Augmentation
from agr_jax.methods import AVmixup
from agr_jax.models import PreActResNet
from agr_jax.threat import Linf
from agr_jax.training import optimizers
from agr_jax.training.step import Trainer, TrainState
from configs import base

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
OFFICIAL_PGD = PGD(Linf(8 / 255), steps=10, step_size=2 / 255, box_every_step=False)


def cross_entropy_itself(logits, labels):
    """The published attack's loss, which loses half of its gradient from a margin of 17 or 37."""
    return losses.cross_entropy(logits, labels)


PUBLISHED_PGD = dataclasses.replace(OFFICIAL_PGD, loss=cross_entropy_itself)


class Recorded(NamedTuple):
    """State of `recording`: what went through the wrapped optimiser, beside its own state."""

    inner: optax.OptState
    adversarial: Any
    clean: Any
    updates: Any


class StepResult(NamedTuple):
    """What one step gives, and what it went through."""

    state: TrainState
    metrics: dict[str, jax.Array]
    clean_logits: jax.Array
    adversarial_logits: jax.Array
    combined: Any  # AGR's result
    moved: Any  # AWP's perturbation of the weights


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


@dataclasses.dataclass(frozen=True, eq=False)
class StoredMixture(AVmixup):
    """AVmixup with the reference's draws."""

    draws: Any = None

    def clean_share(self, batch):
        return jnp.asarray(self.draws, batch.images.dtype)


METHODS = {"AT": "at", "trades": "trades", "mart": "mart", "awp": "awp", "Avmixup": "avmixup"}
"""The published code's names, and the configs'."""


def make_trainer(
    *, agr: bool, conv: str, dtype: Any, method: str = "AT", z: Any = None, **overrides: Any
) -> Trainer:
    """A method in its official profile, with or without AGR, active from the first step.

    `z` are the stored numbers, for AVmixup's draws; `overrides` are fields of the config's `awp`.
    """
    values = base.recipe("cifar10", METHODS[method], "official")
    values.agr.enabled = agr
    values.agr.gop_start_epoch = values.agr.gics_start_epoch = 0
    values.optimizer.learning_rate = 0.01
    values.optimizer.schedule = "constant"
    values.awp.update(overrides)
    config = from_config_dict(values)
    assert (config.agr.clip, config.agr.clip_norm) == ("changed", 0.1)
    assert (config.optimizer.momentum, config.optimizer.weight_decay) == (0.9, 5e-4)
    built = methods.from_config(config)
    if method == "Avmixup":
        fields = {f.name: getattr(built, f.name) for f in dataclasses.fields(built)}
        built = StoredMixture(**fields, draws=z["agr64_beta_draws"])
    else:
        assert getattr(built, "attack", OFFICIAL_PGD) == OFFICIAL_PGD
    return Trainer(
        model=PreActResNet(10, conv=conv, dtype=dtype, param_dtype=dtype, **IMAGENET),
        method=built,
        optimizer=recording(optimizers.from_config(config, steps_per_epoch=1)),
        augmentation=Augmentation(),
        batch_size=16,
        steps_per_epoch=1,
        batch_stats=config.batch_stats,
        mesh=sharding.data_mesh(jax.devices()[:1]),
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
    """`state, batch -> StepResult`."""

    @jax.jit
    def step(state, batch):
        after, metrics = trainer.update(state, batch, clean_gradient=agr)
        method, stats = trainer.method, state.batch_stats
        clean_point, point = method.gradient_points(trainer.forward, state.params, stats, batch)
        clean, _ = trainer.forward(clean_point, stats, batch.images)
        adversarial, _ = trainer.forward(point, stats, batch.adversarial)
        seen = after.opt_state
        combined = seen.adversarial
        if agr:
            alone = agr_transform(clip="changed")
            combined, _ = alone.update(combined, alone.init(state.params), clean_grads=seen.clean)
        moved = jax.tree.map(jnp.subtract, point, state.params)
        return StepResult(after, metrics, clean, adversarial, combined, moved)

    return step


def relative(got: Any, expected: Any) -> float:
    return float(np.max(np.abs(got - expected) / np.abs(expected)))


def step_errors(
    result: StepResult, z: Any, key: str, names: list[str], *, forward: str | None = None
) -> dict[str, float]:
    """Largest error of a step in every kind of number stored under `key` (such as `agr64_`).

    Norms, losses and statistics are relative; sums are relative to the leaf's norm; elements to the
    root mean square of the leaf; logits to the largest logit; cosines absolute. `forward` is the
    key of what the passes give, where that is stored apart from the gradients; "" for nowhere.
    """
    forward = key if forward is None else forward
    seen = result.state.opt_state
    trees = {
        "gadv": seen.adversarial,
        "gclean": seen.clean,
        "grad": result.combined,
        "buf": optax.tree.get(seen.inner, "trace"),
        "update": jax.tree.map(jnp.negative, seen.updates),  # stored as before minus after
    }
    errors = {}
    for kind, tree in trees.items():
        # AWP's adversarial gradient does not depend on where the clean one is taken.
        stored = key if f"{key}{kind}_norm" in z.files else "agr64_"
        if kind == "gclean" and key.startswith("base"):
            continue
        worst = dict.fromkeys(("norm", "sum", "first32", "spread32"), 0.0)
        for i, name in enumerate(names):
            found = _leaf_errors(in_torch_layout(tree, name), z, f"{stored}{kind}", i)
            # `max` would drop a NaN.
            worst = {part: np.maximum(worst[part], found[part]) for part in worst}
        errors |= {f"{kind}_{part}": float(error) for part, error in worst.items()}
    if forward:
        errors |= _forward_errors(result, z, forward)
    if f"{key}cs" in z.files:
        errors |= _diagnostic_errors(result, z, key, names)
    return errors


def _leaf_errors(value: np.ndarray, z: Any, key: str, i: int) -> dict[str, float]:
    leaf = value.astype(np.float64).ravel()
    norm = z[f"{key}_norm"][i].astype(np.float64)
    spread = np.linspace(0, leaf.size - 1, 32).astype(int)
    first = np.pad(leaf[:32], (0, max(0, 32 - leaf.size)))
    rms = norm / leaf.size**0.5
    return {
        "norm": abs(np.linalg.norm(leaf) - norm) / norm,
        "sum": abs(leaf.sum() - z[f"{key}_sum"][i]) / norm,
        "first32": np.abs(first - z[f"{key}_first32"][i]).max() / rms,
        "spread32": np.abs(leaf[spread] - z[f"{key}_spread32"][i]).max() / rms,
    }


def _forward_errors(result: StepResult, z: Any, key: str) -> dict[str, float]:
    metrics = result.metrics
    errors = {
        "loss_clean": relative(metrics["clean_loss"], z[f"{key}loss_train_clean"]),
        "loss_adv": relative(metrics["adversarial_loss"], z[f"{key}loss_train_adv"]),
    }
    if f"{key}loss_mart" in z.files:
        errors["loss_mart_bce"] = relative(metrics["mart_bce"], z[f"{key}loss_adv"])
        errors["loss_mart_kl"] = relative(6 * metrics["mart_kl"], z[f"{key}loss_mart"])
    for part, logits in (
        ("clean_logits", result.clean_logits),
        ("output_adv_logits", result.adversarial_logits),
    ):
        expected = z[key + part]
        errors[part] = float(np.abs(logits - expected).max() / np.abs(expected).max())
    for part, kind in (("bn_mean", "running_mean"), ("bn_var", "running_var")):
        got, expected = statistics(result.state.batch_stats, kind), z[key + part]
        # The means cross zero: they are compared with the largest.
        scale = np.abs(expected).max() if part == "bn_mean" else np.abs(expected)
        errors[part] = float(np.max(np.abs(got - expected) / scale))
    return errors


def perturbation_errors(result: StepResult, z: Any, key: str, names: list[str], gamma: float):
    """AWP's v, kernel by kernel, against the stored norms and first entries; 0 elsewhere."""
    kernels = [name for name in names if in_torch_layout(result.moved, name).ndim > 1]
    assert len(kernels) == len(z[f"{key}awp_v_norm"]) == 21
    errors = {"v_norm": 0.0, "v_first32": 0.0}
    for i, name in enumerate(kernels):
        leaf = in_torch_layout(result.moved, name).astype(np.float64).ravel() / gamma
        norm = z[f"{key}awp_v_norm"][i]
        first = np.abs(leaf[:32] - z[f"{key}awp_v_first32"][i][: leaf.size]).max()
        found = {
            "v_norm": abs(np.linalg.norm(leaf) - norm) / norm,
            "v_first32": first / (norm / leaf.size**0.5),
        }
        errors = {part: float(np.maximum(errors[part], found[part])) for part in errors}
    for name in set(names) - set(kernels):
        assert not in_torch_layout(result.moved, name).any()
    return errors


def _diagnostic_errors(result: StepResult, z: Any, key: str, names: list[str]) -> dict[str, float]:
    metrics, seen = result.metrics, result.state.opt_state
    # AGR's vectors are in the order of our tree.
    row = {name: i for i, name in enumerate(leaf_names(result.state.params))}
    order = [row["/".join(path_of(name)[1:])] for name in names]
    cosine = np.asarray(metrics["leaf_cosine"])[order]
    distance = jax.tree.map(
        lambda a, c: jnp.linalg.norm((a - c).ravel()), seen.adversarial, seen.clean
    )
    errors = {
        "cs": float(np.abs(cosine - z[f"{key}cs"]).max()),
        "gop_count": float(abs(metrics["leaf_projected"].sum() - z[f"{key}gop_count"])),
    }
    if f"{key}gop_rate" in z.files:
        mean_distance = float(np.mean(jax.tree.leaves(distance)))
        errors |= {
            "gop_rate": float(abs(metrics["conflicting"] - z[f"{key}gop_rate"])),
            "mean_cos": float(abs(metrics["cosine"] - z[f"{key}mean_cos"])),
            "mean_l2dis": relative(mean_distance, z[f"{key}mean_l2dis"]),
            "mean_norm_adv": relative(metrics["adversarial_norm"], z[f"{key}mean_norm_adv"]),
            "mean_norm_clean": relative(metrics["clean_norm"], z[f"{key}mean_norm_clean"]),
        }
    return errors
