"""The run: restore or start, the epoch loop, checkpoints, and the final evaluation."""

from __future__ import annotations

import collections
import dataclasses
import functools
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from agr_jax import checkpoints, evaluate, leaf_names, mesh, methods, optim, run_folder
from agr_jax.checkpoints import Checkpoints
from agr_jax.config import Config
from agr_jax.data import Augmentation, Dataset
from agr_jax.data.batches import epoch_permutation, steps_per_epoch
from agr_jax.diagnostics import DiagnosticsLog
from agr_jax.errors import ConfigError, NonFiniteLossError
from agr_jax.interruption import StopOnSignal
from agr_jax.metrics import EpochMeter, JsonLines, Progress
from agr_jax.models import Classifier
from agr_jax.resume import restore_or_branch, training_description
from agr_jax.train_step import Trainer, TrainState

# Steps that may be dispatched before the oldest one's metrics are read: enough to keep a device
# busy, few enough for the bar to be honest.
_STEPS_IN_FLIGHT = 2


def run(config: Config, folder: Path) -> int:
    """Trains, or continues, the run in a folder, then evaluates it and prints its table.

    Args:
        config: settings of the run.
        folder: the run folder.

    Returns:
        0, or 128 plus the number of the signal that interrupted it; the same call continues it.

    Raises:
        UserError: on whatever the user can mend; nothing that was saved is lost.
    """
    with run_folder.locked(folder):
        dataset = evaluate.dataset_from_config(config)
        print(dataset.describe(), flush=True)
        on = mesh.data_mesh()
        trainer = create_trainer(config, dataset, on)
        _check_before_start(config, dataset, on)
        run_folder.check(folder, config)
        with StopOnSignal() as stop:
            interrupted = _train(config, folder, trainer, dataset, stop)
        if interrupted:
            return 128 + interrupted
        records = evaluate.evaluate_run(folder, config, dataset=dataset, on=on)
        print(f"\n{config.name}, {folder}\n\n{evaluate.table(records)}", flush=True)
        if config.data.validation_examples == 0:
            print(
                "No best checkpoint: nothing was held out to select it on "
                "(--config.data.validation_examples=N)."
            )
        return 0


def create_trainer(config: Config, dataset: Dataset, on: jax.sharding.Mesh) -> Trainer:
    """The pure part of a run, from its config.

    Raises:
        ConfigError: on fields that do not fit each other or the devices.
    """
    mesh.check_divisible(config.batch_size, on, "config.batch_size")
    data = config.data
    per_epoch = steps_per_epoch(len(dataset.train.labels), config.batch_size, data.last_batch)
    dtype = jnp.bfloat16 if config.precision.train == "bfloat16" else jnp.float32
    return Trainer(
        model=evaluate.model_from_config(config, dataset.num_classes, dtype),
        method=methods.from_config(config),
        optimizer=optim.create(config, per_epoch),
        augmentation=Augmentation(
            crop_padding=data.crop_padding,
            flip=data.flip,
            cutout=data.cutout,
            cutout_size=data.cutout_size,
        ),
        batch_size=config.batch_size,
        steps_per_epoch=per_epoch,
        batch_stats=config.batch_stats,
        on=on,
        average_decay=config.averaging.decay,
    )


def _check_before_start(config: Config, dataset: Dataset, on: jax.sharding.Mesh) -> None:
    """Refuses now what would otherwise fail after training."""
    evaluate.make_attacks(config)
    evaluate.test_split(config, dataset)
    last = len(dataset.train.labels) % config.batch_size
    if config.data.last_batch == "keep" and last:
        mesh.check_divisible(last, on, "config.data.last_batch=keep leaves a last batch")
    channels = dataset.image_shape[-1]
    for name in ("mean", "std"):
        entries = len(getattr(config.model, name))
        if entries not in (1, channels):
            raise ConfigError(
                f"config.model.{name}: needs one entry, or one for each of the images' {channels} "
                f"channels, got {entries}"
            )


def _train(
    config: Config, folder: Path, trainer: Trainer, dataset: Dataset, stop: StopOnSignal
) -> int:
    """Trains up to `config.epochs`; returns the signal that interrupted it, or 0."""
    per_epoch = trainer.steps_per_epoch
    total = config.epochs * per_epoch
    root = jax.random.key(config.seed)
    init_key, order_key, step_key = (jax.random.fold_in(root, i) for i in range(3))
    everywhere = mesh.replicated(trainer.on)
    with (
        JsonLines(run_folder.metrics_path(folder)) as log,
        Checkpoints(
            run_folder.checkpoints_path(folder),
            keep_steps=[epoch * per_epoch for epoch in config.checkpoints.keep_epochs],
            select_best=config.data.validation_examples > 0,
        ) as saved,
    ):
        fresh = trainer.init(init_key, dataset.image_shape)
        expected = evaluate.description(config, dataset)
        state, meter = restore_or_branch(
            config, folder, trainer, fresh=fresh, expected=expected, saved=saved
        )
        run_folder.write_config(folder, config)
        first_step = int(state.step)
        log.forget_after(first_step)
        diagnostics = None
        if config.diagnostics:
            diagnostics = DiagnosticsLog(
                run_folder.diagnostics_path(folder), leaf_names(state.params)
            )
            diagnostics.forget_after(first_step)
        print(_plan(config, trainer, state, total), flush=True)

        images, labels = jax.device_put((dataset.train.images, dataset.train.labels), everywhere)

        @functools.cache
        def compiled(method: methods.Method) -> Callable[..., Any]:
            """The step; the old state's memory is reused for the new one."""
            return jax.jit(
                dataclasses.replace(trainer, method=method).step,
                static_argnames=("clean_gradient", "batch_size"),
                donate_argnames="state",
                # What comes out must lie as what went in, or the second step would compile again.
                out_shardings=everywhere,
            )

        def save(step: int, score: float | None = None) -> None:
            if not _all_finite(state.variables):
                raise NonFiniteLossError(
                    f"parameters are not finite after step {step}: training diverged; the last "
                    "checkpoint is kept. Try a smaller config.optimizer.learning_rate"
                )
            if diagnostics is not None:
                diagnostics.write()
            saved.save(
                step,
                variables=state.variables,
                optimizer=state.opt_state,
                average=state.average,
                about={
                    **expected,
                    "training": training_description(config, trainer),
                    "step": step,
                    "epoch": step // per_epoch,
                    "epoch_so_far": meter.as_dict(),
                },
                selection_metric=score,
            )

        def leave(step: int, number: int) -> int:
            save(step)
            saved.wait()
            name = signal.Signals(number).name
            progress.print(
                f"stopped by {name}: step {step} of {total} is saved in {folder}; "
                "the same command continues"
            )
            return number

        progress = Progress("training", total, initial=first_step)
        with progress, _matmul_precision(config):
            for epoch in range(first_step // per_epoch, config.epochs):
                order = jax.device_put(
                    epoch_permutation(order_key, epoch, len(dataset.train.labels)), everywhere
                )
                clean_gradient = config.diagnostics or optim.uses_clean_gradient(config.agr, epoch)
                end = (epoch + 1) * per_epoch
                step = functools.partial(
                    compiled(methods.from_config(config, epoch)),
                    images=images,
                    labels=labels,
                    permutation=order,
                    key=step_key,
                    clean_gradient=clean_gradient,
                )
                steps = [
                    (number, size)
                    for number, size in _steps_of_epoch(trainer, epoch, len(dataset.train.labels))
                    if number > first_step
                ]
                state, reached = _run_steps(
                    step, state, steps, meter, stop, progress=progress, diagnostics=diagnostics
                )
                if stop.signal is not None and reached < end:
                    return leave(reached, stop.signal)

                scores = _validate(config, trainer, state, dataset, epoch)
                record = _epoch_record(config, per_epoch, epoch, meter, scores)
                progress.print(_epoch_line(config, record))
                log.write(record)
                meter = EpochMeter()
                done = epoch + 1
                if (
                    done % config.checkpoints.every_epochs == 0
                    or done == config.epochs
                    or done in config.checkpoints.keep_epochs
                    or scores  # the best epoch must be there to be chosen
                ):
                    save(end, scores.get(checkpoints.SELECTION_METRIC))
                if stop.signal is not None:
                    return leave(end, stop.signal)
    return 0


def _run_steps(
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    steps: Sequence[tuple[int, int]],
    meter: EpochMeter,
    stop: StopOnSignal,
    *,
    progress: Progress,
    diagnostics: DiagnosticsLog | None,
) -> tuple[TrainState, int]:
    """Takes the steps, given as (number, batch size), or fewer if asked to stop.

    Returns:
        The state, and the number of the last step taken.
    """
    in_flight: collections.deque[Any] = collections.deque()

    def read_oldest() -> None:
        number, size, metrics = in_flight.popleft()
        read = meter.read(number, size, metrics)
        if diagnostics is not None:
            diagnostics.add(number, read)

    started = time.perf_counter()
    reached = 0
    for reached, size in steps:
        state, metrics = step(state, batch_size=size)
        in_flight.append((reached, size, metrics))
        if len(in_flight) > _STEPS_IN_FLIGHT:
            read_oldest()
        progress.advance(note=meter.note())
        if stop.signal is not None:
            break
    while in_flight:
        read_oldest()
    meter.seconds += time.perf_counter() - started
    return state, reached


def _steps_of_epoch(trainer: Trainer, epoch: int, examples: int) -> list[tuple[int, int]]:
    """(number counted from 1 over the run, batch size) of each step; the last may be short."""
    first = epoch * trainer.steps_per_epoch + 1
    return [
        (first + i, min(trainer.batch_size, examples - i * trainer.batch_size))
        for i in range(trainer.steps_per_epoch)
    ]


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def _validate(
    config: Config, trainer: Trainer, state: TrainState, dataset: Dataset, epoch: int
) -> dict[str, float]:
    """Accuracy on the held-out split, clean and under PGD with as many steps as in training."""
    done = epoch + 1
    due = done % config.eval.every_epochs == 0 or done == config.epochs
    if dataset.validation is None or not due:
        return {}
    model = evaluate.model_from_config(config, dataset.num_classes)
    classifier = Classifier(model, state.variables)
    attack = methods.validation_attack(config.attack)
    names = {"validation_clean_accuracy": None, checkpoints.SELECTION_METRIC: attack}
    return {
        name: float(
            evaluate.correct_under_attack(
                classifier,
                attack,
                dataset.validation,
                seed=config.seed,
                batch_size=config.eval.batch_size,
                on=trainer.on,
            ).mean()
        )
        for name, attack in names.items()
    }


def _plan(config: Config, trainer: Trainer, state: TrainState, total: int) -> str:
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    device = trainer.on.devices.flat[0]
    gop, interpolation = optim.start_epochs(config.agr)
    agr = "off"
    if config.agr.enabled:
        agr = ", ".join(
            f"{name} {'never' if start is None else f'from epoch {start}'}"
            for name, start in (("GOP", gop), (f"{config.agr.interpolation} mix", interpolation))
        )
    return (
        f"{config.name} ({config.profile}): {config.method}, AGR {agr}\n"
        f"{config.model.name}, {count:,} parameters, on {trainer.on.size} x {device.device_kind}; "
        f"steps {int(state.step)} to {total}, {trainer.steps_per_epoch} an epoch"
    )


def _epoch_record(
    config: Config, per_epoch: int, epoch: int, meter: EpochMeter, scores: dict[str, float]
) -> dict[str, Any]:
    """One line of `metrics.jsonl`."""
    last_step = (epoch + 1) * per_epoch - 1
    learning_rate = optim.schedule(config.optimizer, config.epochs, per_epoch)(last_step)
    return {
        "step": last_step + 1,
        "epoch": epoch + 1,
        "learning_rate": float(learning_rate),
        "seconds": round(meter.seconds, 3),
        "images_per_second": round(meter.images / meter.seconds, 1),
        **meter.means(),
        **scores,
    }


def _epoch_line(config: Config, record: dict[str, Any]) -> str:
    parts = [f"epoch {record['epoch']}/{config.epochs}"]
    shown = {
        "clean_loss": "clean loss {:.3f}",
        "adversarial_loss": "adversarial loss {:.3f}",
        "adversarial_accuracy": "training robust accuracy {:.1%}",
        "validation_clean_accuracy": "held-out clean {:.1%}",
        checkpoints.SELECTION_METRIC: "robust {:.1%}",
        "projected": "projected {:.0%}",
        "images_per_second": "{:.0f} images/s",
    }
    if config.method == "standard":
        shown["adversarial_loss"] = "loss {:.3f}"
        shown["adversarial_accuracy"] = "training accuracy {:.1%}"
    parts += [text.format(record[name]) for name, text in shown.items() if name in record]
    return ", ".join(parts)


def _matmul_precision(config: Config) -> Any:
    names = {"float32": "float32", "tf32": "tensorfloat32", "bfloat16": "bfloat16"}
    return jax.default_matmul_precision(names[config.precision.train])
