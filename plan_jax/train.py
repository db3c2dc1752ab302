"""Training: the loop around the step; the metrics of step n - 1 are fetched while step n runs."""

import functools
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from plan_jax import checkpoint, evaluate, parallel
from plan_jax import model as assembly
from plan_jax.data import loader
from plan_jax.data.dataset import Dataset
from plan_jax.logger import Logger
from plan_jax.step import State, init_state, make_step, optimiser_of
from plan_jax.types import Batch, Metrics, Result


class Stop:
    """Notes SIGTERM, so that the loop can save and leave."""

    def __init__(self) -> None:
        """Nobody has asked yet."""
        self.asked = False
        self.before = None

    def __enter__(self) -> "Stop":
        """Listen."""

        def note(*_: Any) -> None:
            self.asked = True

        try:
            self.before = signal.signal(signal.SIGTERM, note)
        except ValueError:  # not the main thread: a notebook's worker; nobody will signal it
            self.before = None
        return self

    def __exit__(self, *_: Any) -> None:
        """Listen no more."""
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)


def batches(
    config: Mapping[str, Any], system: assembly.Components, dataset: Dataset
) -> loader.BatchIterator:
    """Iterate over this process's share of every batch of a dataset, shuffled, for ever."""
    data, hosts = config["data"], jax.process_count()
    return loader.train_batches(
        dataset,
        system.tokenizer,
        batch_size=parallel.split_batch(config["batch"], hosts),
        size=data["size"],
        max_shift=data["shift"],
        max_tokens=data["length"],
        max_words=data["words"],
        seed=config["seed"],
        workers=data["workers"],
        shard=(jax.process_index(), hosts),
        extra=system.method.REQUIRES,
    )


def train(config: Mapping[str, Any], workdir: str | Path) -> dict[str, float]:
    """Train a config in `workdir`, resuming what is there, then evaluate; return final metrics.

    A run stopped by SIGTERM returns {} after saving.

    Raises:
      UserError: for a batch that does not divide, a dataset that cannot be read, and the like.
    """
    workdir = Path(workdir)
    mesh = parallel.make_mesh(config["parallel"]["devices"] or None)
    parallel.split_batch(config["batch"], mesh.size)
    system = assembly.build_components(config, parallel.AXIS)
    evaluate.open_eval_data(config, config["eval"]["split"])
    dataset = evaluate.open_split(config, "train")
    stream = batches(config, system, dataset)
    at_start = stream.get_state()
    example = next(stream)
    stream.set_state(at_start)

    begin = functools.partial(
        init_state,
        system,
        example,
        optimiser_of(config, system),
        config["seed"],
        config["ema"] > 0,
        dataset.findings,
    )
    folder, settings = workdir / checkpoint.FOLDER, config["checkpoint"]
    fresh = not folder.exists()
    state, tx = begin(config["weights"] if fresh else None)
    manager = checkpoint.open_manager(folder, settings["keep"], settings["best"] or None)
    found = checkpoint.restore(manager, parallel.replicate(state, mesh))
    if any(config["weights"].values()) and not (fresh or found):
        state, tx = begin(config["weights"])
    state = parallel.replicate(state, mesh)
    if found:
        state = found.state
        stream.set_state(found.data)
    step = make_step(system, tx, config["ema"], parallel.AXIS)
    step = parallel.parallelise(step, mesh, implementation=config["parallel"]["implementation"])
    run = Run(config, system, mesh, step, stream, manager)
    start = found.step if found else 0
    with Logger(workdir, plain(config), config["steps"], start) as logger, Stop() as stop:
        if found:
            logger.info(f"resumed at step {start} of {config['steps']}")
        if not (found or config["steps"]):
            save(run, 0, state, None)
        state = loop(run, state, start, logger, stop)
        stopped = int(state.step) < config["steps"]
        if stopped:
            logger.info(f"stopped at step {int(state.step)} and saved; the same command resumes")
        checkpoint.close(manager)
        return {} if stopped else finish(run, state, logger)


class Run(NamedTuple):
    """What stays the same while a run trains."""

    config: Mapping[str, Any]
    system: assembly.Components
    mesh: Any
    step: Callable[[State, Batch], tuple[State, Metrics]]
    stream: Any
    manager: Any


def loop(run: Run, state: State, start: int, logger: Logger, stop: Stop) -> State:
    """Take the steps from `start` on; save, evaluate and log in between."""
    config, pace = run.config, Pace(run.config["batch"])
    waiting: Metrics | None = None  # of the step before, fetched while this one runs
    programs, began = parallel.CompilationCounter(), time.monotonic()
    for n in range(start, config["steps"]):
        batch = parallel.shard(next(run.stream), run.mesh)
        state, metrics = run.step(state, batch)
        if n == start:
            jax.block_until_ready(metrics)
            logger.summary["first_step_s"] = time.monotonic() - began
            how = (
                f"{programs.compiled} programs compiled, {programs.cache_hits} read from the cache"
            )
            logger.info(f"first step after {logger.summary['first_step_s']:.1f} s ({how})")
        if waiting is not None and n % config["log_every"] == 0:
            logger.log(n, parallel.to_host(waiting) | pace.measure(n))
        waiting = metrics
        logger.advance()
        done = n + 1
        leave = done % config["log_every"] == 0 and parallel.any_process(stop.asked)
        every = config["eval"]["every"]
        measured = None
        if every and done % every == 0 and done < config["steps"]:
            measured = validate(run, state)
            logger.log(done, measured)
        last = done == config["steps"]
        if leave or last or done % config["checkpoint"]["every"] == 0 or measured:
            if done % config["log_every"] == 0 or last:
                logger.log(done, parallel.to_host(metrics) | pace.measure(done))
                waiting = None
            save(run, done, state, measured)
        if leave:
            break
    return state


class Pace:
    """Measures images per second; the first step, which compiles, is left out."""

    def __init__(self, batch: int) -> None:
        """Note the size of a batch."""
        self.batch = batch
        self.seen: tuple[int, float] | None = None

    def measure(self, step: int) -> dict[str, float]:
        """Give the rate since the last call; {} at the first."""
        now, before = time.monotonic(), self.seen
        self.seen = step, now
        if before is None or step == before[0]:
            return {}
        return {"images_per_s": (step - before[0]) * self.batch / (now - before[1])}


def save(run: Run, step: int, state: State, measured: Mapping[str, float] | None) -> None:
    """Begin to save a step."""
    config = plain(run.config)
    checkpoint.save(run.manager, step, state, run.stream.get_state(), config, measured)


def plain(config: Any) -> Any:
    """Turn a config into what JSON can hold."""
    if isinstance(config, Mapping):
        return {name: plain(value) for name, value in config.items()}
    return list(config) if isinstance(config, tuple) else config


def weights(state: State) -> dict[str, PyTree]:
    """Take what a model needs: the averaged parameters if an average is kept."""
    params = state.average or state.params
    return parallel.to_host(
        {"params": params, "batch_stats": state.batch_stats, "memory": state.memory}
    )


def validate(run: Run, state: State) -> dict[str, float]:
    """Evaluate on the validation split, without writing anything."""
    model = assembly.make_model(run.system, run.config, weights(state))
    return evaluate.evaluate_model(model, run.config, "val").metrics


def finish(run: Run, state: State, logger: Logger) -> dict[str, float]:
    """Evaluate the final state, and write `metrics.json` and the page of the run."""
    held = weights(state)
    rates = [row["images_per_s"] for row in logger.history if "images_per_s" in row]
    about = {
        "steps": float(int(state.step)),
        "images_per_s": float(np.median(rates)) if rates else float("nan"),
        "params_sha256": checkpoint.fingerprint(parallel.to_host(state.params)),
    }
    if not parallel.is_main():
        parallel.barrier("evaluated")
        return about
    logger.info("evaluating")
    model = assembly.make_model(run.system, run.config, held)
    result = evaluate.evaluate_model(model, run.config, run.config["eval"]["split"], logger.folder)
    metrics = result.metrics | about | logger.summary | {"wall_s": logger.elapsed()}
    evaluate.write_results(
        logger.folder, plain(run.config), Result(metrics, result.rows), logger.history
    )
    parallel.barrier("evaluated")
    return metrics
