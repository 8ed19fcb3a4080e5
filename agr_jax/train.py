"""The run: restore or start, the epoch loop, checkpoints, and the final evaluation."""

from __future__ import annotations

import collections
import dataclasses
import functools
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from agr_jax import (
    checkpoints,
    evaluate,
    leaf_names,
    mesh,
    methods,
    network,
    optim,
    run_folder,
    run_log,
)
from agr_jax.batch_picture import save_picture
from agr_jax.checkpoints import Checkpoints
from agr_jax.config import Config
from agr_jax.data import Augmentation, Dataset
from agr_jax.data.batches import steps_per_epoch
from agr_jax.data.extra import read_extra
from agr_jax.data.feed import Feed, TrainingImages
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
        images = training_images(config, dataset)
        run_folder.check(folder, config)
        run_folder.check_data(folder, dataset.digests)
        with StopOnSignal() as stop:
            interrupted = _train(config, folder, trainer, dataset, images, stop)
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
    model = network.from_config(config, dataset.num_classes, dtype)
    if ":" in config.model.name:
        network.check(model, dataset.num_classes, dataset.image_shape)
    return Trainer(
        model=model,
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


def training_images(config: Config, dataset: Dataset) -> TrainingImages:
    """The training set, with the extra images that a config asks for.

    Raises:
        ConfigError: a file of extra images without a share of the batches for them, or the reverse.
        DataError: a file that is missing, damaged, or does not fit the data set.
    """
    data = config.data
    if bool(data.extra) != (data.extra_fraction > 0):
        raise ConfigError(
            "config.data.extra_fraction: must be above 0 if and only if config.data.extra names a "
            f"file, got {data.extra_fraction} with extra {data.extra!r}"
        )
    if not data.extra:
        return TrainingImages(dataset.train)
    extra = read_extra(data.extra, image_shape=dataset.image_shape, num_classes=dataset.num_classes)
    print(
        f"extra: {len(extra):,} images from {data.extra}, {data.extra_fraction:.0%} of each batch",
        flush=True,
    )
    return TrainingImages(dataset.train, extra, data.extra_fraction, config.seed)


def _train(
    config: Config,
    folder: Path,
    trainer: Trainer,
    dataset: Dataset,
    images: TrainingImages,
    stop: StopOnSignal,
) -> int:
    """Trains up to `config.epochs`; returns the signal that interrupted it, or 0."""
    per_epoch = trainer.steps_per_epoch
    total = config.epochs * per_epoch
    root = jax.random.key(config.seed)
    init_key, order_key, step_key = (jax.random.fold_in(root, i) for i in range(3))
    with (
        JsonLines(run_folder.metrics_path(folder)) as log,
        Checkpoints(
            run_folder.checkpoints_path(folder),
            keep_steps=[epoch * per_epoch for epoch in config.checkpoints.keep_epochs],
            select_best=config.data.validation_examples > 0,
            metric=selection_metric(trainer.method),
        ) as saved,
    ):
        fresh = trainer.init(init_key, dataset.image_shape)
        expected = network.description(config, dataset)
        state, meter = restore_or_branch(
            config, folder, trainer, fresh=fresh, expected=expected, saved=saved
        )
        run_folder.write_config(folder, config)
        run_folder.write_data_record(folder, {**dataset.as_dict(), **images.as_dict()})
        first_step = int(state.step)
        log.forget_after(first_step)
        diagnostics = _open_diagnostics(config, folder, state)
        feed = Feed(images, trainer.on, budget_mb=config.data.device_budget_mb)
        print(run_log.plan(config, trainer, state, total, feed), flush=True)
        compiled = _compiler(trainer, feed)
        if config.data.picture and first_step == 0:
            order = images.order(order_key, 0, _batch_sizes(trainer, len(dataset.train)))
            batch = images.batch(order[: config.batch_size])
            save_picture(folder, trainer, state, batch, step_key, dataset.class_names)

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

        with (
            Progress("training", total, initial=first_step) as progress,
            matmul_precision(config.precision.train),
        ):
            for epoch in range(first_step // per_epoch, config.epochs):
                end = (epoch + 1) * per_epoch
                sizes = _batch_sizes(trainer, len(dataset.train))
                first = max(first_step - epoch * per_epoch, 0)
                shared, batches = feed.epoch(images.order(order_key, epoch, sizes), sizes, first)
                step = functools.partial(
                    compiled(methods.from_config(config, epoch)),
                    key=step_key,
                    clean_gradient=config.diagnostics
                    or optim.uses_clean_gradient(config.agr, epoch),
                    **shared,
                )
                numbered = [(epoch * per_epoch + i + 1, sizes[i]) for i in range(first, per_epoch)]
                state, reached = _run_steps(
                    step,
                    state,
                    zip(numbered, batches, strict=True),
                    meter,
                    stop,
                    progress=progress,
                    diagnostics=diagnostics,
                )
                if stop.signal is not None and reached < end:
                    return leave(reached, stop.signal)

                scores = _validate(config, trainer, state, dataset, epoch)
                record = run_log.epoch_record(config, per_epoch, epoch, meter, scores)
                progress.print(run_log.epoch_line(config, record))
                log.write(record)
                meter = EpochMeter()
                done = epoch + 1
                if (
                    done % config.checkpoints.every_epochs == 0
                    or done == config.epochs
                    or done in config.checkpoints.keep_epochs
                    or scores  # the best epoch must be there to be chosen
                ):
                    save(end, scores.get(selection_metric(trainer.method)))
                if stop.signal is not None:
                    return leave(end, stop.signal)
    return 0


def _open_diagnostics(config: Config, folder: Path, state: TrainState) -> DiagnosticsLog | None:
    """The log that a config asks for, without the steps that are yet to come."""
    if not config.diagnostics:
        return None
    path = run_folder.diagnostics_path(folder)
    diagnostics = DiagnosticsLog(path, leaf_names(state.params))
    diagnostics.forget_after(int(state.step))
    return diagnostics


def _compiler(trainer: Trainer, feed: Feed) -> Callable[[methods.Method], Callable[..., Any]]:
    """Makes the step of a method, once; the old state's memory is reused for the new one."""

    @functools.cache
    def compiled(method: methods.Method) -> Callable[..., Any]:
        own = dataclasses.replace(trainer, method=method)
        return jax.jit(
            own.step if feed.on_device else own.step_on_batch,
            static_argnames=["clean_gradient", *(["batch_size"] if feed.on_device else [])],
            donate_argnames="state",
            # What comes out must lie as what went in, or the second step would compile again.
            out_shardings=mesh.replicated(trainer.on),
        )

    return compiled


def _run_steps(
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    steps: Iterable[tuple[tuple[int, int], dict[str, Any]]],
    meter: EpochMeter,
    stop: StopOnSignal,
    *,
    progress: Progress,
    diagnostics: DiagnosticsLog | None,
) -> tuple[TrainState, int]:
    """Takes the steps, given as (number, batch size) and arguments, or fewer if asked to stop.

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
    for (reached, size), arguments in steps:
        state, metrics = step(state, **arguments)
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


def _batch_sizes(trainer: Trainer, examples: int) -> list[int]:
    """Of an epoch's steps; the last may be short."""
    return [
        min(trainer.batch_size, examples - i * trainer.batch_size)
        for i in range(trainer.steps_per_epoch)
    ]


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def _validate(
    config: Config, trainer: Trainer, state: TrainState, dataset: Dataset, epoch: int
) -> dict[str, float]:
    """Accuracy on the held-out split, clean and under PGD with as many steps as in training.

    Of the moving average where one is kept: the network that the run is for.
    """
    done = epoch + 1
    due = done % config.eval.every_epochs == 0 or done == config.epochs
    if dataset.validation is None or not due:
        return {}
    model = network.from_config(config, dataset.num_classes)
    classifier = Classifier(model, state.average or state.variables)
    attack = methods.validation_attack(config.attack)
    names = {checkpoints.CLEAN_SELECTION_METRIC: None, checkpoints.SELECTION_METRIC: attack}
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


def selection_metric(method: methods.Method) -> str:
    """By which of the held-out split's accuracies a method's best checkpoint is chosen.

    Under attack a network that was trained without one is near chance in every epoch.
    """
    if method.is_adversarial:
        return checkpoints.SELECTION_METRIC
    return checkpoints.CLEAN_SELECTION_METRIC


def matmul_precision(name: str) -> Any:
    """A context in which products have the precision of `config.precision.train`."""
    names = {"float32": "float32", "tf32": "tensorfloat32", "bfloat16": "bfloat16"}
    return jax.default_matmul_precision(names[name])
