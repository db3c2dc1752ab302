"""Training: the resume decision, the loop around the step, checkpoints and validation.

The metrics of step n - 1 are fetched while step n runs, so that the device does not wait for the
host.
"""

import dataclasses
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from plan_jax import checkpoint, evaluate, parallel
from plan_jax.config import Config
from plan_jax.data import loader
from plan_jax.data.dataset import Dataset, open_once
from plan_jax.logger import Logger
from plan_jax.model import Components, build_components, make_model
from plan_jax.state import State, init_state
from plan_jax.step import make_step
from plan_jax.types import Batch, Metrics


class Run(NamedTuple):
    """The parts of a run that do not change while it trains."""

    config: Config
    components: Components
    mesh: Any
    step: Callable[[State, Batch], tuple[State, Metrics]]
    batches: loader.BatchIterator
    manager: Any


@open_once()
def train(config: Config, workdir: str | Path) -> dict[str, Any]:
    """Trains a config in `workdir`, evaluates the result and returns the final metrics.

    Returns {} if the run was stopped by SIGTERM; its state is saved.

    Raises:
      UserError: the batch is not divisible by the devices, another run holds `workdir`, the dataset
        cannot be read or lacks what a task needs, a checkpoint does not fit, and other mistakes of
        the user.
    """
    mesh = parallel.make_mesh(config.parallel.devices or None)
    parallel.split_batch(config.batch, mesh.size)
    with checkpoint.lock_workdir(Path(workdir)):
        return train_locked(config, Path(workdir), mesh)


def train_locked(config: Config, workdir: Path, mesh: Any) -> dict[str, Any]:
    """Trains a config in a folder that no other run may use meanwhile; see `train`."""
    components = build_components(config, parallel.AXIS)
    # Missing annotations should end a run before it trains, not after.
    evaluate.open_eval_data(config, config.eval.split)
    dataset = evaluate.open_split(config, "train")
    # Stored with the run, which then accepts the same data in any folder, and no others.
    data = dataclasses.replace(config.data, fingerprint=dataset.fingerprint)
    config = dataclasses.replace(config, data=data)
    unknown_share = loader.check_texts(dataset, components.tokenizer)
    batches = iterate_batches(config, components, dataset)
    example = read_example(batches)

    # Where the run starts:
    #   1. Fresh: there is no checkpoint folder. Initialise, from published weights if given.
    #   2. Resume: the folder has a complete checkpoint. Its state replaces the initial one, and the
    #      data iterator continues at its position. Published weights are not even read.
    #   3. Fresh after all: the folder exists, but the run was killed before its first checkpoint.
    #      As 1, and only now is it known that published weights are needed.
    folder = workdir / checkpoint.FOLDER
    is_fresh = not folder.exists()
    state, optimiser = init_state(
        components, config, example, dataset.findings, load_weights=is_fresh
    )
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

    step = parallel.parallelise(
        make_step(components, optimiser, config.ema_decay, parallel.AXIS),
        mesh,
        implementation=config.parallel.implementation,
    )
    run = Run(config, components, mesh, step, batches, manager)
    with Logger(workdir, config.to_dict(), config.steps, start) as logger, StopSignal() as stop:
        if unknown_share > 0:
            name = components.tokenizer.name
            logger.info(f"{unknown_share:.1%} of the texts' pieces are unknown to tokenizer {name}")
        if restored:
            logger.info(f"resumed at step {start} of {config.steps}")
        elif config.steps == 0:
            save(run, 0, state, None)  # published weights become a checkpoint of this library
        state = run_steps(run, state, start, logger, stop)
        is_stopped = int(state.step) < config.steps
        if is_stopped:
            logger.info(f"stopped at step {int(state.step)} and saved; the same command resumes")
        checkpoint.close(manager)
        return {} if is_stopped else finish(run, state, logger)


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
        max_tokens=data.max_tokens,
        max_words=data.max_words,
        seed=config.seed,
        workers=data.workers,
        shard=(jax.process_index(), num_processes),
        extra=components.method.REQUIRES,
    )


def read_example(batches: loader.BatchIterator) -> Batch:
    """Returns the next batch without consuming it."""
    position = batches.get_state()
    example = next(batches)
    batches.set_state(position)
    return example


def run_steps(run: Run, state: State, start: int, logger: Logger, stop: "StopSignal") -> State:
    """Takes the steps from `start` on; logs, validates and saves between them."""
    config, rate = run.config, ThroughputMeter(run.config.batch)
    programs, start_time = parallel.CompilationCounter(), time.monotonic()
    pending: Metrics | None = None  # of the previous step, fetched while this one runs
    for step in range(start, config.steps):
        state, metrics = run.step(state, parallel.shard(next(run.batches), run.mesh))
        if step == start:
            jax.block_until_ready(metrics)
            seconds = time.monotonic() - start_time
            logger.summary["first_step_s"] = seconds
            logger.info(
                f"first step after {seconds:.1f} s ({programs.compiled} programs compiled, "
                f"{programs.cache_hits} read from the cache)"
            )
        if pending is not None and step % config.log_every == 0:
            logger.log(step, parallel.to_host(pending) | rate.measure(step))
        pending = metrics
        logger.advance()

        done = step + 1
        is_last = done == config.steps
        # All processes must leave at the same step, so they agree on it now and then.
        must_stop = done % config.log_every == 0 and parallel.any_process(stop.requested)
        validation = None
        if config.eval.every and done % config.eval.every == 0 and not is_last:
            validation = validate(run, state)
            logger.log(done, validation)
        if must_stop or is_last or done % config.checkpoint.every == 0 or validation:
            # A row of this step has to be on disk before its checkpoint: a resumed run does not
            # take the step again.
            if done % config.log_every == 0 or is_last:
                logger.log(done, parallel.to_host(metrics) | rate.measure(done))
                pending = None
            save(run, done, state, validation)
        if must_stop:
            break
    return state


def save(run: Run, step: int, state: State, validation: Mapping[str, float] | None) -> None:
    """Starts saving a step, with the position in the data and the config."""
    position = run.batches.get_state()
    checkpoint.save(run.manager, step, state, position, run.config.to_dict(), validation)


def validate(run: Run, state: State) -> dict[str, float]:
    """Evaluates the state on the validation split, and writes nothing."""
    model = make_model(run.components, run.config, model_variables(state))
    return evaluate.evaluate_model(model, run.config, "val").metrics


def finish(run: Run, state: State, logger: Logger) -> dict[str, Any]:
    """Evaluates the final state, writes its metrics and the page, and returns the metrics."""
    # Every process takes part in gathering arrays, also those that do not evaluate.
    variables = model_variables(state)
    rates = [row["images_per_s"] for row in logger.history if "images_per_s" in row]
    summary = {
        "steps": float(int(state.step)),
        "images_per_s": float(np.median(rates)) if rates else float("nan"),
        "params_sha256": checkpoint.fingerprint(parallel.to_host(state.params)),
    }
    if not parallel.is_main():
        parallel.barrier("evaluated")
        return summary
    logger.info("evaluating")
    model = make_model(run.components, run.config, variables)
    result = evaluate.evaluate_model(model, run.config, run.config.eval.split, logger.folder)
    metrics: dict[str, Any] = {
        **result.metrics,
        **summary,
        **logger.summary,
        "wall_s": logger.elapsed(),
    }
    result = dataclasses.replace(result, metrics=metrics)
    evaluate.write_results(logger.folder, run.config, result, logger.history)
    parallel.barrier("evaluated")
    return metrics


def model_variables(state: State) -> dict[str, PyTree]:
    """Returns what a model needs, on the host: the averaged parameters if an average is kept."""
    params = state.ema_params or state.params
    return parallel.to_host(
        {"params": params, "batch_stats": state.batch_stats, "memory": state.memory}
    )


class StopSignal:
    """Remembers that SIGTERM arrived, so that the loop can save and leave; a context manager."""

    def __init__(self) -> None:
        """Starts without a request."""
        self.requested = False
        self.previous_handler: Any = None

    def __enter__(self) -> "StopSignal":
        """Installs the handler."""

        def handle(*_: Any) -> None:
            self.requested = True

        try:
            self.previous_handler = signal.signal(signal.SIGTERM, handle)
        except ValueError:
            # Only the main thread may install handlers; in a notebook's worker nobody signals us.
            self.previous_handler = None
        return self

    def __exit__(self, *_: object) -> None:
        """Restores the previous handler."""
        if self.previous_handler is not None:
            signal.signal(signal.SIGTERM, self.previous_handler)


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
