"""Training: the resume decision, the loop around the step, checkpoints and validation.

The metrics of step n - 1 are fetched while step n runs, so that the device does not wait for the
host.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from plan_jax import checkpoint, evaluate, parallel
from plan_jax.checkpoint.checksums import find_nonfinite
from plan_jax.checkpoint.folders import list_steps
from plan_jax.checkpoint.mirror import open_run
from plan_jax.command import StopSignal, describe_interruption
from plan_jax.config import Config
from plan_jax.data import loader
from plan_jax.data.dataset import Dataset
from plan_jax.data.preparation import open_once
from plan_jax.logger import Logger
from plan_jax.model import Components, build_components, make_model
from plan_jax.state import State, choose_normalisation, init_state
from plan_jax.step import (
    FIRST_NONFINITE,
    WATCH_SHAPE,
    group_leaves,
    loss_terms,
    make_step,
    split_microbatches,
    watch_numbers,
)
from plan_jax.types import Batch, DivergedError, Metrics, Model, UserError

# Steps after which the run looks for NaN and infinity, if it does not log or save before.
FINITE_EVERY = 100


class Run(NamedTuple):
    """The parts of a run that do not change while it trains."""

    config: Config
    components: Components
    mesh: Any
    step: Callable[[tuple[State, Array], Batch], tuple[tuple[State, Array], Metrics]]
    batches: loader.BatchIterator
    manager: Any
    logger: Logger
    stop: StopSignal


class NotFinite(Exception):
    """Names the first numbers of a run that are NaN or infinite."""

    def __init__(self, subject: str, step: int) -> None:
        """Stores the subject of a sentence, and the step."""
        super().__init__(subject, step)
        self.subject, self.step = subject, step


class Stopped(Exception):
    """A signal arrived in the middle of a validation."""


@open_once()
def train(config: Config, workdir: str | Path) -> dict[str, Any]:
    """Trains a config in `workdir`, evaluates the result and returns the final metrics.

    Returns {} if the run was stopped by a signal; its state is saved. A run at an address, as
    gs://bucket/run, is written into a local folder and uploaded at each save. Of several hosts the
    main one alone reads and writes the run.

    Raises:
      UserError: the batch is not divisible by the devices, or its part on one device by
        `microbatch`; a device has no bfloat16, another run holds `workdir`, the dataset cannot be
        read or lacks what a task needs, a checkpoint does not fit, and other mistakes of the user.
      DivergedError: the loss, the gradient or the weights are NaN or infinite.
    """
    with open_run(workdir) as folder:
        return _train(config, folder)


def _train(config: Config, workdir: Path) -> dict[str, Any]:
    config = choose_normalisation(config)
    mesh = parallel.make_mesh(config.parallel.devices or None)
    parallel.require_dtype(config.dtype, mesh.devices.flat)
    split_microbatches(parallel.split_batch(config.batch, mesh.size), config.microbatch)
    components = build_components(config, parallel.AXIS)
    # Missing annotations should end a run before it trains, not after.
    evaluate.open_eval_data(config, config.eval.split)
    all_pairs = evaluate.open_split(config, "train")
    dataset = all_pairs.select_texts()
    # Stored with the run, which then accepts the same data in any folder, and no others.
    data = dataclasses.replace(config.data, fingerprint=dataset.fingerprint)
    config = dataclasses.replace(config, data=data)
    evaluate.require_same_data(dataset.fingerprint)
    unknown_share = loader.check_texts(dataset, components.tokenizer)
    about_variants = loader.describe_variants(dataset, config.hard_negatives.kinds)
    batches = iterate_batches(config, components, dataset)
    example = read_example(batches)

    # Where the run starts:
    #   1. Fresh: there is no checkpoint folder. Initialise, from published weights if given.
    #   2. Resume: the folder has a complete checkpoint. Its state replaces the initial one, and the
    #      data iterator continues at its position. Published weights are not even read.
    #   3. Fresh after all: the folder exists, but the run was killed before its first checkpoint.
    #      As 1, and only now is it known that published weights are needed.
    folder = workdir / checkpoint.FOLDER
    is_fresh = parallel.ask_main(lambda: not folder.exists())
    state, optimiser = init_state(
        components, config, example, dataset.findings, load_weights=is_fresh
    )
    # Nothing is written before: a mistake that shows up until here leaves no folder behind.
    with checkpoint.lock_workdir(workdir):
        best_metric = config.checkpoint.best or None
        manager = checkpoint.open_manager(folder, config.checkpoint.keep, best_metric)
        restored = checkpoint.restore(manager, parallel.replicate(state, mesh))
        if restored:
            state = restored.state
            batches.set_state(restored.data)
        else:
            if any(vars(config.weights).values()) and not is_fresh:
                state, optimiser = init_state(components, config, example, dataset.findings)
            state = parallel.replicate(state, mesh)
        start = restored.step if restored else 0
        require_finite_start(state, config, folder, start)

        step = parallel.parallelise(
            watch_numbers(
                make_step(
                    components,
                    optimiser,
                    config.ema_decay,
                    parallel.AXIS,
                    config.microbatch,
                    config.hard_negatives,
                )
            ),
            mesh,
            implementation=config.parallel.implementation,
        )
        with Logger(workdir, config.to_dict(), config.steps, start) as logger, StopSignal() as stop:
            run = Run(config, components, mesh, step, batches, manager, logger, stop)
            if unknown_share > 0:
                name = components.tokenizer.name
                logger.info(
                    f"{unknown_share:.1%} of the texts' pieces are unknown to tokenizer {name}"
                )
            about_images = loader.describe_augmentation(dataset, data.augment, data.size)
            about_texts = loader.describe_lengths(
                dataset, components.tokenizer, data.max_tokens, data.max_words
            )
            for sentence in (*about_texts, *about_images, *about_variants):
                logger.info(sentence)
            if left_out := len(all_pairs) - len(dataset):
                rule = f" under caption rule {config.data.caption}" if config.data.caption else ""
                logger.info(
                    f"{left_out} of {len(all_pairs)} training records have no text{rule} and are "
                    "left out"
                )
            if restored:
                logger.info(f"resumed at step {start} of {config.steps}")
                validate_again(run, state)
            elif config.steps == 0:
                save(run, 0, state, None)  # published weights become a checkpoint of this library
            try:
                state = run_steps(run, state, start)
            except NotFinite as error:
                checkpoint.close(manager)
                raise diverged_error(error, config, folder) from None
            except KeyboardInterrupt:
                # A save in the background has to end before the lock does.
                checkpoint.close(manager)
                raise
            checkpoint.close(manager)
            batches.close()
        describe_interruption("the state is saved, and the same command continues", is_saved=True)
        if parallel.any_process(stop.number != 0):
            logger.info(f"stopped at step {int(state.step)} and saved; the same command resumes")
            return {}
        return finish(run, state)


def iterate_batches(
    config: Config, components: Components, dataset: Dataset
) -> loader.BatchIterator:
    """Returns an endless iterator over this process's part of shuffled batches."""
    data, num_processes = config.data, jax.process_count()
    return loader.train_batches(
        dataset,
        components.tokenizer,
        batch_size=parallel.split_batch(config.batch, num_processes),
        size=data.size,
        max_shift=data.max_shift,
        augment=data.augment,
        max_tokens=data.max_tokens,
        max_words=data.max_words,
        seed=config.seed,
        workers=data.workers,
        shard=(jax.process_index(), num_processes),
        extra=components.method.REQUIRES,
        variants=config.hard_negatives.kinds,
    )


def read_example(batches: loader.BatchIterator) -> Batch:
    """Returns the next batch without consuming it."""
    position = batches.get_state()
    example = next(batches)
    batches.set_state(position)
    return example


def run_steps(run: Run, state: State, start: int) -> State:
    """Takes the steps from `start` on, until a signal; logs, validates and saves between them.

    Raises:
      NotFinite: the loss, the gradient or the weights are NaN or infinite.
    """
    config, logger, rate = run.config, run.logger, ThroughputMeter(run.config.batch)
    programs, start_time = parallel.CompilationCounter(), time.monotonic()
    agreement, timer = parallel.Agreement(run.mesh), SaveTimer(config.checkpoint.minutes)
    first_nonfinite = parallel.replicate(jnp.zeros(WATCH_SHAPE, jnp.int32), run.mesh)
    pending: Metrics | None = None  # of the previous step, fetched while this one runs
    for step in range(start, config.steps):
        try:
            batch = parallel.shard(next(run.batches), run.mesh)
        except UserError:
            # A signal to all processes of a job may have ended those that read batches.
            if not run.stop.number or jax.process_count() > 1:
                raise
            if pending is not None:  # else this step was saved with its row
                save_last(run, state, pending, rate)
            break
        (state, first_nonfinite), metrics = run.step((state, first_nonfinite), batch)
        if step == start:
            jax.block_until_ready(metrics)
            # Until now there was nothing to save, and a signal need not wait for the compiler.
            run.stop.start()
            timer.restart()
            seconds = time.monotonic() - start_time
            logger.summary["first_step_s"] = seconds
            logger.info(
                f"first step after {seconds:.1f} s ({programs.compiled} programs compiled, "
                f"{programs.cache_hits} read from the cache)"
            )
        is_logged = step % config.log_every == 0
        if pending is not None and (is_logged or step % FINITE_EVERY == 0):
            require_finite(pending, state)
            if is_logged:
                log_metrics(run, step, pending, rate)
        pending = metrics
        logger.advance()

        done = step + 1
        is_last = done == config.steps
        # All processes leave at the same step, and save when the clock of the main process says so.
        is_late = parallel.is_main() and timer.is_late()
        must_stop, must_save = agreement.any_process(run.stop.number != 0, is_late)
        validation = None
        if is_validated(config, done) and not must_stop:
            require_finite(metrics, state)
            try:
                validation = validate(run, state)
                logger.log(done, validation)
            except Stopped:
                must_stop = True
        is_regular = is_last or done % config.checkpoint.every == 0
        if must_stop or must_save or is_regular or validation:
            require_finite(metrics, state, is_saved=True)
            # A row of this step has to be on disk before its checkpoint: a resumed run does not
            # take the step again.
            if done % config.log_every == 0 or is_last:
                log_metrics(run, done, metrics, rate)
                pending = None
            save(run, done, state, validation)
            timer.restart()
        if must_stop:
            break
    return state


def save_last(run: Run, state: State, metrics: Metrics, rate: "ThroughputMeter") -> None:
    """Logs and saves the last step, which neither was due for."""
    step = int(state.step)
    require_finite(metrics, state, is_saved=True)
    if step % run.config.log_every == 0:
        log_metrics(run, step, metrics, rate)
    save(run, step, state, None)


def log_metrics(run: Run, step: int, metrics: Metrics, rate: "ThroughputMeter") -> None:
    """Logs the metrics of a step, with the images per second since the last call."""
    values = parallel.to_host({name: x for name, x in metrics.items() if name != FIRST_NONFINITE})
    row = {name: float(value) for name, value in values.items()}
    run.logger.log(step, row | rate.measure(step))


def save(run: Run, step: int, state: State, validation: Mapping[str, float] | None) -> None:
    """Starts saving a step, with the position in the data and the config."""
    position = run.batches.get_state()
    checkpoint.save(run.manager, step, state, position, run.config.to_dict(), validation)


def is_validated(config: Config, step: int) -> bool:
    """Returns whether the state after a step is evaluated on the validation split."""
    every = config.eval.every
    return bool(every) and 0 < step < config.steps and step % every == 0


def validate(run: Run, state: State) -> dict[str, float]:
    """Evaluates the state on the validation split, and writes nothing.

    Raises:
      Stopped: a signal arrived; with several processes it waits, since all of them take part.
    """

    def check_stop() -> None:
        if run.stop.number and jax.process_count() == 1:
            raise Stopped

    model = make_model(run.components, run.config, model_variables(state))
    model = check_before_calls(model, check_stop)
    result = evaluate.evaluate_model(model, run.config, "val", check_stop=check_stop)
    return result.metrics


def check_before_calls(model: Model, check: Callable[[], None]) -> Model:
    """Returns a model each of whose functions calls `check` first."""

    def with_check(function: Callable) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            check()
            return function(*args, **options)

        return call

    return dataclasses.replace(
        model,
        encode_image=with_check(model.encode_image),
        encode_text=with_check(model.encode_text),
        similarity=with_check(model.similarity),
        heatmap=with_check(model.heatmap),
    )


def validate_again(run: Run, state: State) -> None:
    """Evaluates a restored state whose validation a signal has prevented."""
    step = int(state.step)
    keys = {key for row in run.logger.history if row["step"] == step for key in row}
    is_due = is_validated(run.config, step) and not any("/" in key for key in keys)
    # Only the main process has the rows, and all processes take part in a validation.
    if not parallel.any_process(parallel.is_main() and is_due):
        return
    validation = validate(run, state)
    if run.config.checkpoint.best:
        checkpoint.add_metrics(run.manager, step, validation)
    # The row comes last: after a kill before it, the step is validated once more.
    run.logger.log(step, validation)


def finish(run: Run, state: State) -> dict[str, Any]:
    """Evaluates the final state, writes its metrics and the page, and returns the metrics."""
    logger = run.logger
    variables = model_variables(state)
    rates = [row["images_per_s"] for row in logger.history if "images_per_s" in row]
    summary = {
        "steps": float(int(state.step)),
        "images_per_s": float(np.median(rates)) if rates else float("nan"),
        "params_sha256": checkpoint.fingerprint(variables["params"]),
    }
    logger.info("evaluating")
    model = make_model(run.components, run.config, variables)
    # Every process takes part. One that fails ends the others: no barrier may wait for it.
    result = evaluate.evaluate_model(model, run.config, run.config.eval.split, logger.folder)
    metrics: dict[str, Any] = {
        **result.metrics,
        **summary,
        **logger.summary,
        "wall_s": logger.elapsed(),
    }
    try:
        if parallel.is_main():
            result = dataclasses.replace(result, metrics=metrics)
            evaluate.write_results(logger.folder, run.config, result, logger.history)
    finally:
        parallel.barrier("evaluated")
    return metrics


def model_variables(state: State) -> dict[str, PyTree]:
    """Returns what a model needs, on the host: the averaged parameters if an average is kept."""
    params = state.ema_params or state.params
    return parallel.to_host(
        {"params": params, "batch_stats": state.batch_stats, "memory": state.memory}
    )


# Finite numbers ----------------------------------------------------------------------------------


def require_finite(metrics: Metrics, state: State, *, is_saved: bool = False) -> None:
    """Checks the metrics of a step, which know of all steps before.

    Args:
      metrics: those of the step.
      state: the state, whose names a sentence needs.
      is_saved: whether the state is about to be saved, and its arrays are checked too.

    Raises:
      NotFinite: the loss, the gradient or an array of the state is NaN or infinite.
    """
    loss, gradient = parallel.to_host(metrics[FIRST_NONFINITE]).tolist()
    # A loss that is not finite has no finite gradient, so it is the cause in the same step.
    if loss[0] and (not gradient[0] or loss[0] <= gradient[0]):
        raise NotFinite(f"the loss{name_parts(loss_terms(metrics), *loss[1:])} is", loss[0])
    if gradient[0]:
        groups = list(group_leaves(state.params))
        raise NotFinite(f"the gradient{name_parts(groups, *gradient[1:])} is", gradient[0])
    if is_saved and (name := find_nonfinite(state)):
        raise NotFinite(f"{name} is", int(state.step))


def name_parts(names: Sequence[str], index: int, number: int) -> str:
    """Returns the name at an index in brackets, and how many more of `number` there are.

    >>> name_parts(["loss_report", "loss_word"], 0, 2)
    ' (loss_report and 1 more)'
    """
    more = f" and {number - 1} more" if number > 1 else ""
    return f" ({names[index]}{more})" if number else ""


def require_finite_start(state: State, config: Config, folder: Path, start: int) -> None:
    """Raises UserError if the state that a run starts from is NaN or infinite anywhere."""
    name = find_nonfinite(state)
    if not name:
        return
    if start:
        raise UserError(
            f"checkpoint {folder / str(start)} has values in {name} that are not finite; delete it,"
            " and the same command resumes from an older one"
        )
    sources = {key: source for key, source in vars(config.weights).items() if source}
    raise UserError(
        f"the initial weights have values in {name} that are not finite; use others than"
        f" config.weights {sources or 'random'}"
    )


def diverged_error(error: NotFinite, config: Config, folder: Path) -> DivergedError:
    """Returns the error that names what is not finite, the remedy, and the last checkpoint."""
    optim = config.optim
    remedies = [f"lower config.optim.learning_rate, now {optim.learning_rate:g}"]
    if not optim.clip_norm:
        remedies.append("set config.optim.clip_norm, now 0")
    if error.step == 1:
        # No update has been made yet.
        remedies = ["look at config.hyper, config.weights and the data of the first batch"]
    if config.dtype != "float32":
        remedies.append("use config.dtype=float32")
    steps = parallel.ask_main(lambda: list_steps(folder))
    saved = (
        f"checkpoint {folder / str(steps[-1])} has the last finite weights that were saved"
        if steps
        else "no checkpoint was saved before"
    )
    return DivergedError(
        f"{error.subject} not finite from step {error.step} of {config.steps} on;"
        f" {', or '.join(remedies)}, with another --workdir; {saved}"
    )


class SaveTimer:
    """Measures the time since the last save, which `checkpoint.minutes` limits."""

    def __init__(self, minutes: float) -> None:
        """Starts measuring; with 0 minutes there is no limit."""
        self.seconds = 60 * minutes or math.inf
        self.restart()

    def restart(self) -> None:
        """Measures from now on."""
        self.start = time.monotonic()

    def is_late(self) -> bool:
        """Returns whether the limit is reached, and then restarts: the save may come later."""
        is_late = time.monotonic() - self.start >= self.seconds
        if is_late:
            self.restart()
        return is_late


class ThroughputMeter:
    """Measures images per second between calls; the first step, which compiles, is left out."""

    def __init__(self, batch: int) -> None:
        """Stores the number of images per step."""
        self.batch = batch
        self.previous: tuple[int, float] | None = None

    def measure(self, step: int) -> dict[str, float]:
        """Returns the rate since the last call as a row of metrics, or {} at the first call."""
        now, previous = time.monotonic(), self.previous
        self.previous = step, now
        if previous is None or step == previous[0]:
            return {}
        return {"images_per_s": (step - previous[0]) * self.batch / (now - previous[1])}
