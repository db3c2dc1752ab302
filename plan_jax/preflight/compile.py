"""Compiles the training step of a config for devices that need not exist, and measures it."""

import contextlib
import dataclasses
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from plan_jax import parallel
from plan_jax.config import Config
from plan_jax.preflight import hlo
from plan_jax.preflight.collectives import Collective, count_collectives
from plan_jax.preflight.flops import count_jaxpr_flops
from plan_jax.preflight.memory import Memory, measure_memory, overflow_memory
from plan_jax.preflight.minimum import minimum_bytes, read_sizes
from plan_jax.preflight.roofline import Roofline, estimate
from plan_jax.preflight.shapes import local_batch, make_shapes
from plan_jax.preflight.topology import Target
from plan_jax.preflight.traffic import count_traffic
from plan_jax.step import WATCH_SHAPE, make_step, split_microbatches, watch_numbers

# What XLA says of a program that does not fit, as "(40.25G) exceeds available HBM (15.75G)" or
# "Used 20.93G of 15.75G hbm".
_OVERFLOW = (
    re.compile(r"temporaries \(([\d.]+)([KMGT])\) exceeds available"),
    re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm"),
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
PROGRESS_SECONDS = 30


@dataclasses.dataclass(frozen=True)
class Preflight:
    """The needs of one training step on one device.

    Attributes:
      config: the config.
      target: the devices.
      pairs: pairs of one device.
      memory: bytes by kind.
      flops: operations of its matrix products and convolutions.
      traffic: bytes between its memory and its cores; None if the compiler refused the step.
      collectives: what it gives to collectives; None likewise.
      roofline: an estimate of the time; None if the chip's rates are not known, or likewise.
      xla_flops, xla_bytes: XLA's own counts, which take the body of a loop once; 0 if it has none.
      minimum: the least that the algorithm needs to give to them, in bytes by kind.
      effort: how much the compiler tried, see `compile_step`.
      lower_seconds: time to trace and lower the step.
      compile_seconds: time to compile it.
      compile_cpu_seconds: time of all cores that it took, which other programs do not prolong.
      assumptions: what was assumed, in sentences.
      refusal: what the compiler said if the step does not fit, or "".
    """

    config: Config
    target: Target
    pairs: int
    memory: Memory
    flops: float
    traffic: int | None
    collectives: Mapping[str, Collective] | None
    roofline: Roofline | None
    xla_flops: float
    xla_bytes: float
    minimum: Mapping[str, int]
    effort: float
    lower_seconds: float
    compile_seconds: float
    compile_cpu_seconds: float
    assumptions: tuple[str, ...]
    refusal: str = ""


def compile_step(config: Config, target: Target, effort: float = 0.0) -> Preflight:
    """Compiles the training step that `train` runs, and returns what it needs.

    The state is donated, as in training. Nothing is run, and no file is read or written.

    Args:
      config: the config.
      target: the devices.
      effort: XLA's `exec_time_optimization_effort`, from -1 (compiles soonest) to 1; 0 is what
        training uses.

    Raises:
      UserError: the batch is not divisible by the devices, or a device's part of it by
        `config.microbatch`; the dtype is not one of the chip; or the shapes cannot be known, see
        `shapes.make_shapes`.
    """
    devices = target.mesh.size
    pairs = parallel.split_batch(config.batch, devices)
    split_microbatches(pairs, config.microbatch)
    parallel.require_dtype(config.dtype, target.mesh.devices.flat)
    # The collectives of one device do nothing, and XLA removes them. With less effort it does not,
    # and its compiler for TPUs ends the process at them.
    axis = None if devices == 1 and effort < 0 else parallel.AXIS
    shapes = make_shapes(config, axis)
    config, components = shapes.config, shapes.components
    step = make_step(
        components,
        shapes.optimiser,
        config.ema_decay,
        axis,
        config.microbatch,
        config.hard_negatives,
    )
    # pmap computes the same; only shard_map can be lowered for devices that are not there.
    parallel_step: Any = parallel.parallelise(watch_numbers(step), target.mesh)
    # XLA takes the number as a float only, and of some platforms not at all.
    compiler_options = {"exec_time_optimization_effort": float(effort)} if effort else None
    carry = (shapes.state, jax.ShapeDtypeStruct(WATCH_SHAPE, jnp.int32))
    start = time.monotonic()
    with _without_cache(), _progress(f"{config.method} for {target.name}"):
        traced = parallel_step.trace(carry, shapes.batch)
        flops = count_jaxpr_flops(traced.jaxpr.jaxpr)
        lowered = traced.lower()
        lower_seconds, start = time.monotonic() - start, time.monotonic()
        cpu_start = time.process_time()
        try:
            compiled, refusal = lowered.compile(compiler_options=compiler_options), ""
        except jax.errors.JaxRuntimeError as error:
            compiled, refusal = None, str(error)
        compile_seconds = time.monotonic() - start
        compile_cpu_seconds = time.process_time() - cpu_start

    batch = local_batch(shapes.batch, devices)
    sizes = read_sizes(config, components, shapes.state, devices)
    result = Preflight(
        config=config,
        target=target,
        pairs=pairs,
        memory=Memory({}, target.memory),
        flops=flops,
        traffic=None,
        collectives=None,
        roofline=None,
        xla_flops=0.0,
        xla_bytes=0.0,
        minimum=minimum_bytes(config.method, config.hyper, sizes),
        effort=effort,
        lower_seconds=lower_seconds,
        compile_seconds=compile_seconds,
        compile_cpu_seconds=compile_cpu_seconds,
        assumptions=shapes.assumptions,
    )
    if compiled is None:
        temporaries = _parse_overflow(refusal)
        memory = overflow_memory(temporaries, shapes.state, batch, target.memory)
        refusal = refusal.splitlines()[0]
        return dataclasses.replace(result, memory=memory, refusal=refusal)
    return _measure(result, compiled, shapes.state, batch)


def _measure(result: Preflight, compiled: Any, state: Any, batch: Any) -> Preflight:
    target, config, chip = result.target, result.config, result.target.chip
    module = hlo.parse(compiled.as_text())
    collectives, traffic = count_collectives(module), count_traffic(module)
    roofline = None
    if chip:
        roofline = estimate(
            chip,
            dtype=config.dtype,
            flops=result.flops,
            traffic=float(traffic),
            collectives=collectives,
            shape=target.shape,
            devices=target.mesh.size,
            images=config.batch,
        )
    costs = compiled.cost_analysis() or {}
    return dataclasses.replace(
        result,
        memory=measure_memory(compiled.memory_analysis(), state, batch, target.memory),
        traffic=traffic,
        collectives=collectives,
        roofline=roofline,
        xla_flops=float(costs.get("flops", 0.0)),
        xla_bytes=float(costs.get("bytes accessed", 0.0)),
    )


def _parse_overflow(message: str) -> int:
    """Returns the bytes of temporaries that XLA could not place; raises its error if it is other.

    Raises:
      RuntimeError: the compiler failed for another reason.
    """
    for pattern in _OVERFLOW:
        if match := pattern.search(message):
            return int(float(match.group(1)) * _UNITS[match.group(2)])
    raise RuntimeError(message)


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Compiles inside, where a program might be read from the cache: its time is a result."""
    is_enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks once whether there is one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", is_enabled)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def _progress(subject: str) -> Iterator[None]:
    """Prints on stderr that something is being compiled, and again every half minute."""
    start, done = time.monotonic(), threading.Event()
    sentence = f"compiling {subject}"
    is_terminal = sys.stderr.isatty()
    parallel.print_once(sentence)

    def report() -> None:
        while not done.wait(1 if is_terminal else PROGRESS_SECONDS):
            elapsed = f"{sentence}: {time.monotonic() - start:.0f} s"
            if is_terminal:
                print(f"\r{elapsed}", end="", file=sys.stderr, flush=True)
            else:
                parallel.print_once(elapsed)

    thread = threading.Thread(target=report, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if is_terminal:
            print(file=sys.stderr)
