"""The training loop: resume or start, epochs of steps, checkpoints, and the final evaluation."""

from __future__ import annotations

import collections
import dataclasses
import functools
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from agr_jax import distributed, leaf_names, methods, sharding
from agr_jax.attacks import named
from agr_jax.config import Config
from agr_jax.data.extra import read_extra
from agr_jax.data.feed import Feed, TrainingImages
from agr_jax.diagnostics import DiagnosticsLog
from agr_jax.errors import ConfigError, NonFiniteLossError
from agr_jax.evaluation import correct_under_attack, evaluate_run, render_table
from agr_jax.files import JsonLines
from agr_jax.models import Classifier
from agr_jax.progress import Progress
from agr_jax.runs import Run, checkpoints
from agr_jax.runs.checkpoints import Checkpoints
from agr_jax.runs.folder import (
    CHECKPOINTS,
    DIAGNOSTICS,
    METRICS,
    check_data,
    check_same_run,
    locked,
    write_config,
    write_data_record,
)
from agr_jax.training import optimizers, run_log
from agr_jax.training.batch_picture import save_picture
from agr_jax.training.meter import EpochMeter
from agr_jax.training.resume import description, resume_or_branch
from agr_jax.training.signals import StopOnSignal
from agr_jax.training.step import Trainer, TrainState

# Steps that may be dispatched before the oldest one's metrics are read: enough to keep a device
# busy, few enough for the bar to be honest.
_STEPS_IN_FLIGHT = 2
# Of several processes, name of the flag that says which was asked to stop.
_STOP = "stop"


def train_run(config: Config, folder: Path) -> int:
    """Trains the run in a folder, or resumes it, then evaluates it and prints its table.

    Args:
        config: settings of the run.
        folder: the run folder.

    Returns:
        0, or 128 plus the number of the signal that interrupted it; the same call resumes it.

    Raises:
        UserError: on whatever the user can mend; nothing that was saved is lost.
    """
    with locked(folder):
        run = Run.from_config(config, folder)
        distributed.say(run.dataset.describe())
        _check_before_start(run)
        trainer = Trainer.from_run(run)
        images = training_images(run)
        check_same_run(folder, config)
        check_data(folder, run.dataset.digests)
        with StopOnSignal() as stop:
            interrupted = _train(run, trainer, images, stop)
        if interrupted:
            return 128 + interrupted
        records = evaluate_run(run)
        distributed.say(f"\n{config.name}, {folder}\n\n{render_table(records)}")
        if config.data.validation_examples == 0:
            distributed.say(
                "No best checkpoint: nothing was held out to select it on "
                "(--config.data.validation_examples=N)."
            )
        return 0


def _check_before_start(run: Run) -> None:
    """Refuses now what would otherwise fail after training."""
    named.from_config(run.config)
    run.test_split()
    data, channels = run.config.data, run.dataset.image_shape[-1]
    last = len(run.dataset.train.labels) % run.config.batch_size
    if data.last_batch == "keep" and last:
        field = "config.data.last_batch=keep leaves a last batch"
        sharding.check_divisible(last, run.mesh, field, parts=run.config.accumulate)
    for name in ("mean", "std"):
        entries = len(getattr(run.config.model, name))
        if entries not in (1, channels):
            raise ConfigError(
                f"config.model.{name}: needs one entry, or one for each of the images' {channels} "
                f"channels, got {entries}"
            )


def training_images(run: Run) -> TrainingImages:
    """The training set, with the extra images that a config asks for.

    Raises:
        ConfigError: a file of extra images without a share of the batches for them, or the reverse.
        DataError: a file that is missing, damaged, or does not fit the data set.
    """
    data, dataset = run.config.data, run.dataset
    if bool(data.extra) != (data.extra_fraction > 0):
        raise ConfigError(
            "config.data.extra_fraction: must be above 0 if and only if config.data.extra names a "
            f"file, got {data.extra_fraction} with extra {data.extra!r}"
        )
    if not data.extra:
        return TrainingImages(dataset.train)
    extra = read_extra(data.extra, image_shape=dataset.image_shape, num_classes=dataset.num_classes)
    distributed.say(
        f"extra: {len(extra):,} images from {data.extra}, {data.extra_fraction:.0%} of each batch",
    )
    return TrainingImages(dataset.train, extra, data.extra_fraction, run.config.seed)


class _Keys(NamedTuple):
    """The random keys of a run."""

    init: jax.Array
    order: jax.Array
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class _Position:
    """How far a run is: the state, and the metrics of the epoch so far."""

    state: TrainState
    meter: EpochMeter

    @functools.cached_property
    def step(self) -> int:
        """Steps that were taken."""
        return int(self.state.step)


def _train(run: Run, trainer: Trainer, images: TrainingImages, stop: StopOnSignal) -> int:
    """Trains up to `config.epochs`; returns the signal that interrupted it, or 0."""
    config, folder = run.config, run.folder
    root = jax.random.key(config.seed)
    keys = _Keys(*(jax.random.fold_in(root, i) for i in range(3)))
    with (
        JsonLines(folder / METRICS) as log,
        Checkpoints(
            folder / CHECKPOINTS,
            keep_steps=[
                epoch * trainer.steps_per_epoch for epoch in config.checkpoints.keep_epochs
            ],
            select_best=config.data.validation_examples > 0,
            metric=selection_metric(trainer.method),
        ) as saved,
    ):
        fresh = trainer.init(keys.init, run.dataset.image_shape)
        position = _Position(*resume_or_branch(run, trainer, fresh=fresh, saved=saved))
        write_config(folder, config)
        write_data_record(folder, {**run.dataset.as_dict(), **images.as_dict()})
        log.forget_after(position.step)
        diagnostics = _open_diagnostics(run, position)
        feed = Feed(images, run.mesh, budget_mb=config.data.device_budget_mb)
        distributed.say(run_log.plan(run, trainer, position.state, feed))
        total = config.epochs * trainer.steps_per_epoch
        with (
            Progress("training", total, initial=position.step) as progress,
            matmul_precision(config.precision.train),
        ):
            loop = _Loop(
                run=run,
                trainer=trainer,
                images=images,
                feed=feed,
                keys=keys,
                saved=saved,
                log=log,
                diagnostics=diagnostics,
                progress=progress,
                stop=stop,
            )
            return loop.train(position)


def _open_diagnostics(run: Run, position: _Position) -> DiagnosticsLog | None:
    """The log that a config asks for, without the steps that are yet to come."""
    if not run.config.diagnostics:
        return None
    diagnostics = DiagnosticsLog(run.folder / DIAGNOSTICS, leaf_names(position.state.params))
    diagnostics.forget_after(position.step)
    return diagnostics


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Loop:
    """What stays the same from epoch to epoch."""

    run: Run
    trainer: Trainer
    images: TrainingImages
    feed: Feed
    keys: _Keys
    saved: Checkpoints
    log: JsonLines
    diagnostics: DiagnosticsLog | None
    progress: Progress
    stop: StopOnSignal

    def train(self, position: _Position) -> int:
        """All epochs that are left; returns the signal that interrupted it, or 0."""
        config, per_epoch = self.run.config, self.trainer.steps_per_epoch
        if config.data.picture and position.step == 0:
            self._save_picture(position.state)
        for epoch in range(position.step // per_epoch, config.epochs):
            position = self._epoch(epoch, position)
            if self.stop.signal is not None and position.step < (epoch + 1) * per_epoch:
                return self._leave(position, self.stop.signal)
            scores = _validate(self.run, position.state, epoch)
            record = run_log.epoch_record(self.run, self.trainer, epoch, position.meter, scores)
            self.progress.print(run_log.epoch_line(self.run, self.trainer, record))
            self.log.write(record)
            position = _Position(position.state, EpochMeter())
            if scores or self._is_kept(epoch + 1):  # the best epoch must be there to be chosen
                self._save(position, scores.get(selection_metric(self.trainer.method)))
            self.stop.agree()
            if self.stop.signal is not None:
                return self._leave(position, self.stop.signal)
        return 0

    def _epoch(self, epoch: int, position: _Position) -> _Position:
        """Takes the steps of an epoch that are left, or fewer if asked to stop."""
        config, per_epoch = self.run.config, self.trainer.steps_per_epoch
        sizes = self._batch_sizes()
        first = position.step - epoch * per_epoch
        order = self.images.order(self.keys.order, epoch, sizes)
        shared, batches = self.feed.epoch(order, sizes, first)
        step = functools.partial(
            self._compiled(methods.from_config(config, epoch)),
            key=self.keys.step,
            clean_gradient=config.diagnostics or optimizers.uses_clean_gradient(config.agr, epoch),
            **shared,
        )
        numbered = [(epoch * per_epoch + i + 1, sizes[i]) for i in range(first, per_epoch)]
        return self._steps(step, position, zip(numbered, batches, strict=True))

    def _steps(
        self,
        step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
        position: _Position,
        steps: Iterable[tuple[tuple[int, int], dict[str, Any]]],
    ) -> _Position:
        """Takes the steps, given as (number, batch size) and arguments."""
        state, meter = position.state, position.meter
        in_flight: collections.deque[Any] = collections.deque()

        def read_oldest() -> None:
            number, size, metrics = in_flight.popleft()
            if _STOP in metrics:
                self.stop.hear(metrics.pop(_STOP))
            read = meter.read(number, size, metrics)
            if self.diagnostics is not None:
                self.diagnostics.add(number, read)

        started = time.perf_counter()
        for (number, size), arguments in steps:
            flag = self.stop.flag(self.run.mesh)
            if flag is not None:
                arguments |= {_STOP: flag}
            state, metrics = step(state, **arguments)
            in_flight.append((number, size, metrics))
            if len(in_flight) > _STEPS_IN_FLIGHT:
                read_oldest()
            self.progress.advance(note=meter.note())
            if self.stop.signal is not None:
                break
        while in_flight:
            read_oldest()
        meter.seconds += time.perf_counter() - started
        return _Position(state, meter)

    @functools.cached_property
    def _compiled(self) -> Callable[[methods.Method], Callable[..., Any]]:
        """Makes the step of a method, once; the old state's memory is reused for the new one."""

        @functools.cache
        def compiled(method: methods.Method) -> Callable[..., Any]:
            own = dataclasses.replace(self.trainer, method=method)
            on_device = self.feed.on_device
            step = own.step if on_device else own.step_on_batch
            return jax.jit(
                _with_stop(step) if distributed.current().count > 1 else step,
                static_argnames=["clean_gradient", *(["batch_size"] if on_device else [])],
                donate_argnames="state",
                # What comes out must be placed as what went in, or the second step would compile
                # again.
                out_shardings=sharding.replicated(self.run.mesh),
            )

        return compiled

    def _batch_sizes(self) -> list[int]:
        """Of an epoch's steps; the last may be short."""
        size, examples = self.trainer.batch_size, len(self.run.dataset.train)
        return [min(size, examples - i * size) for i in range(self.trainer.steps_per_epoch)]

    def _is_kept(self, done: int) -> bool:
        """Whether a checkpoint is written after so many epochs."""
        config, kept = self.run.config, self.run.config.checkpoints
        return done % kept.every_epochs == 0 or done == config.epochs or done in kept.keep_epochs

    def _save_picture(self, state: TrainState) -> None:
        order = self.images.order(self.keys.order, 0, self._batch_sizes())
        batch = self.images.batch(order[: self.trainer.batch_size])
        names = self.run.dataset.class_names
        save_picture(self.run.folder, self.trainer, state, batch, self.keys.step, names)

    def _save(self, position: _Position, score: float | None = None) -> None:
        """Writes a checkpoint.

        Raises:
            NonFiniteLossError: if a parameter is not finite.
        """
        state, step = position.state, position.step
        if not _all_finite(state.variables):
            raise NonFiniteLossError(
                f"parameters are not finite after step {step}: training diverged; the last "
                "checkpoint is kept. Try a smaller config.optimizer.learning_rate"
            )
        if self.diagnostics is not None:
            self.diagnostics.write()
        self.saved.save(
            step,
            variables=state.variables,
            optimizer=state.opt_state,
            average=state.average,
            about={
                **description(self.run, self.trainer),
                "step": step,
                "epoch": step // self.trainer.steps_per_epoch,
                "epoch_so_far": position.meter.as_dict(),
            },
            selection_metric=score,
        )

    def _leave(self, position: _Position, number: int) -> int:
        """Saves where the run was interrupted, and says how to resume it."""
        self._save(position)
        self.saved.wait()
        total = self.run.config.epochs * self.trainer.steps_per_epoch
        line = (
            f"stopped by {signal.Signals(number).name}: step {position.step} of {total} is saved "
            f"in {self.run.folder}; the same command resumes it"
        )
        if distributed.is_first():
            self.progress.print(line)
        else:
            print(line, flush=True)  # whoever looks at this process's output alone sees it too
        return number


def _with_stop(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step that also tells every process what one was asked to do."""

    @functools.wraps(step)
    def both(state: TrainState, *, stop: jax.Array, **arguments: Any) -> Any:
        state, metrics = step(state, **arguments)
        return state, {**metrics, _STOP: jnp.max(stop)}

    return both


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def _validate(run: Run, state: TrainState, epoch: int) -> dict[str, float]:
    """Accuracy on the held-out split, clean and under PGD with as many steps as in training.

    Of the moving average where one is kept: the network that the run is for.
    """
    config, validation, done = run.config, run.dataset.validation, epoch + 1
    due = done % config.eval.every_epochs == 0 or done == config.epochs
    if validation is None or not due:
        return {}
    classifier = Classifier(run.model(), state.average or state.variables)
    attack = methods.validation_attack(config.attack)
    names = {checkpoints.CLEAN_SELECTION_METRIC: None, checkpoints.SELECTION_METRIC: attack}
    return {
        name: float(
            correct_under_attack(
                classifier,
                attack,
                validation,
                seed=config.seed,
                batch_size=config.eval.batch_size,
                mesh=run.mesh,
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
