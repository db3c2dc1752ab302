"""Measure speed and memory, e.g. `python tools/benchmark.py step --config configs/demo.py`.

input   images a second that the loader gives, decoded, shifted and tokenised
step    ms a step and images a second, `shard_map` against `pmap`, taken in turns
memory  bytes that a method's loss and its gradient need in between, as the batch grows
losses  GLoRIA's and MGCA's losses against the originals' way in torch (no --config; needs torch)
encoders  the towers at the papers' sizes against torch's, as `make parity` installs them

A time is worth something only on a quiet machine: what other processes use of the CPUs is read
before and while measuring; above 5 % nothing is measured, unless `--anyway` is given.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

LIMIT = 0.05  # share of all CPUs that others may use
BATCHES = (16, 32, 64, 128)
COMPARED = ("losses", "encoders")  # with torch


class Others:
    """The share of all CPUs that other processes use, since this was made.

    Worker processes of the loader count as others until they have ended.
    """

    def __init__(self) -> None:
        self.start = self.now()

    @staticmethod
    def now() -> tuple[float, float]:
        """Read the seconds that other processes were busy so far, on all CPUs, and the clock."""
        try:
            ticks = [int(t) for t in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        except OSError:
            return float("nan"), time.monotonic()
        idle = ticks[3] + ticks[4]
        busy = (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK")
        return busy - sum(os.times()[:4]), time.monotonic()

    def share(self) -> float:
        """Return the share, 0 to 1; nan where the system does not tell."""
        busy, clock = (b - a for a, b in zip(self.start, self.now(), strict=True))
        share = busy / (clock * (os.cpu_count() or 1))
        return min(max(share, 0.0), 1.0) if share == share else share

    def tell(self) -> None:
        """Print the share, with a warning where it spoils the times."""
        share = self.share()
        warning = "" if share <= LIMIT else "; these times are rough"
        print(f"others used {share:.1%} of the CPUs meanwhile{warning}")


def be_alone(anyway: bool) -> None:
    """Watch for a second; leave with one sentence if other processes are at work."""
    others = Others()
    time.sleep(1.0)
    share = others.share()
    if not share <= LIMIT and not anyway:
        found = "cannot be told" if share != share else f"{share:.0%} of the CPUs"
        sys.exit(f"use by other processes: {found}; stop them, or take rough times with --anyway")


def read_config(path: str, changes: list[str]) -> dict[str, Any]:
    """Read and check a config, with changes such as `--config.batch=16`."""
    from plan_jax import config, main

    loaded = main.load(path)
    fields = [change.removeprefix("--config.").partition("=") for change in changes]
    config.override(loaded, {name: value for name, _, value in fields})
    config.check(loaded)
    return loaded


def line(name: str, seconds: list[float], images: int, note: str = "") -> None:
    """Print one row of a table: least and median ms, images a second of the median."""
    middle = statistics.median(seconds)
    least, rate = 1e3 * min(seconds), images / middle
    print(f"{name:<12}{least:>10.1f}{1e3 * middle:>10.1f}{rate:>12.1f}  {note}")


def measure_input(args: argparse.Namespace, config: Any) -> None:
    """Take batches from the loader alone: what the input could feed at most."""
    from plan_jax import evaluate, train
    from plan_jax import model as assembly

    dataset = evaluate.open_split(config, "train")
    stream = iter(train.batches(config, assembly.build_components(config), dataset))
    started = time.perf_counter()
    next(stream)
    print(f"first batch after {time.perf_counter() - started:.1f} s; batch {config['batch']}")
    others, seconds = Others(), []
    for _ in range(max(args.repeats, 10)):
        started = time.perf_counter()
        for _ in range(args.steps):
            next(stream)
        seconds.append((time.perf_counter() - started) / args.steps)
    print(f"{'':<12}{'min ms':>10}{'median':>10}{'images/s':>12}")
    line("loader", seconds, config["batch"])
    others.tell()


def first_step(config: Any, implementation: str) -> tuple[Any, Any, Any, float]:
    """Compile the step of a config and run it once; return step, state, batch and seconds."""
    import jax

    from plan_jax import evaluate, parallel, train
    from plan_jax import model as assembly
    from plan_jax.step import init_state, make_step, optimiser_of

    mesh = parallel.make_mesh(config["parallel"]["devices"] or None)
    system = assembly.build_components(config, parallel.AXIS)
    dataset = evaluate.open_split(config, "train")
    batch = next(iter(train.batches(config, system, dataset)))
    tx_of = optimiser_of(config, system)
    state, tx = init_state(system, batch, tx_of, 0, config["ema"] > 0, dataset.findings)
    pure = make_step(system, tx, config["ema"], parallel.AXIS)
    step = parallel.parallelise(pure, mesh, implementation=implementation)
    state, batch = parallel.replicate(state, mesh), parallel.shard(batch, mesh)
    started = time.perf_counter()
    state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    return step, state, batch, time.perf_counter() - started


def count_compilations() -> list[str]:
    """Return a list that grows by one whenever something is compiled from now on."""
    import jax

    seen: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: seen.append(event) if "backend_compile" in event else None
    )
    return seen


def measure_step(args: argparse.Namespace, config: Any) -> None:
    """Run the same step compiled in both ways in turns, on one batch that stays on the devices."""
    import jax

    from plan_jax import parallel

    built = {name: first_step(config, name) for name in parallel.IMPLEMENTATIONS}
    compiled = count_compilations()
    states = {name: state for name, (_, state, _, _) in built.items()}
    times = {name: [] for name in built}
    others = Others()
    for _ in range(max(args.repeats, 10)):
        for name, (step, _, batch, _) in built.items():
            started = time.perf_counter()
            for _ in range(args.steps):
                states[name], metrics = step(states[name], batch)
            jax.block_until_ready((states[name], metrics))
            times[name].append((time.perf_counter() - started) / args.steps)
    print(f"{jax.device_count()} {jax.default_backend()} device(s), batch {config['batch']}")
    print(f"{'':<12}{'min ms':>10}{'median':>10}{'images/s':>12}")
    for name, seconds in times.items():
        line(name, seconds, config["batch"], f"first step with compilation: {built[name][3]:.1f} s")
    print(f"compiled again after the first step: {len(compiled)} times")
    others.tell()


def loss_memory(config: Any, batch: int) -> int:
    """Compile the loss and its gradient for `batch` pairs, without running it: bytes in between."""
    import jax
    import jax.numpy as jnp

    from plan_jax import model as assembly
    from plan_jax.types import Batch, MethodContext, TextBatch

    system = assembly.build_components(config)
    data, method, hyper = config["data"], system.method, system.hyper
    if method.REQUIRES:
        needs = ", ".join(method.REQUIRES)
        sys.exit(f"config.method {config['method']} needs {needs}; memory takes one without")
    size = data["size"]
    image = jax.ShapeDtypeStruct((batch, size, size, 1), jnp.uint8)
    whole = {
        name: jax.ShapeDtypeStruct((batch, data[length]), jnp.int32)
        for name, length in (
            ("tokens", "length"),
            ("word_index", "length"),
            ("word_id", "words"),
            ("sentence", "words"),
        )
    }
    features, _ = jax.eval_shape(
        system.dual.init_with_output, jax.random.key(0), Batch(image, TextBatch(**whole))
    )
    own, memory = jax.eval_shape(
        lambda key: method.init(key, MethodContext(system.dual.dim), hyper), jax.random.key(0)
    )

    def value(learned: Any, fixed: Any, memory: Any, key: Any, step: Any) -> Any:
        own, (images, texts) = learned
        images = images.replace(mask=fixed[0])
        texts = texts.replace(mask=fixed[1], word_id=fixed[2], sentence=fixed[3])
        return method.loss(own, memory, images, texts, {}, key=key, step=step, hyper=hyper)[0]

    images, texts = features
    bare = images.replace(mask=None), texts.replace(mask=None, word_id=None, sentence=None)
    fixed = images.mask, texts.mask, texts.word_id, texts.sentence
    step = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = jax.jit(jax.grad(value)).lower((own, bare), fixed, memory, jax.random.key(0), step)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def measure_memory(args: argparse.Namespace, config: Any) -> None:
    """Tell how the memory of the loss grows: twice the batch should need about twice as much."""
    print(f"{config['method']}, loss and gradient between the encoders' outputs and the value")
    print(f"{'batch':>6}{'MiB':>10}{'MiB a pair':>14}{'growth':>10}")
    before = None
    for batch in BATCHES:
        used = loss_memory(config, batch) / 2**20
        growth = f"{used / before:.2f}" if before else ""
        print(f"{batch:>6}{used:>10.1f}{used / batch:>14.2f}{growth:>10}", flush=True)
        before = used


def compare_with_torch(args: argparse.Namespace) -> None:
    """Compare losses or towers with torch's on the CPU, on all of it or in one thread."""
    threads = 1 if args.one_thread else os.cpu_count() or 1
    try:
        if args.what == "losses":
            import benchmark_losses as comparison
        else:
            import benchmark_encoders as comparison
    except ModuleNotFoundError as error:
        sys.exit(f"{args.what} needs {error.name}; pip install {error.name}, or make parity")
    others = Others()
    comparison.main(max(args.repeats, 10), threads)
    others.tell()


def main() -> None:
    """Read the command line and measure one thing."""
    about = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(allow_abbrev=False, **about)
    parser.add_argument("what", choices=("input", "step", "memory", *COMPARED))
    parser.add_argument("--config", help="a file; --config.field=value changes it")
    parser.add_argument("--devices", type=int, default=0, help="virtual CPU devices (0: none)")
    parser.add_argument("--repeats", type=int, default=10, help="readings, at least 10")
    parser.add_argument("--steps", type=int, default=3, help="steps or batches a reading")
    parser.add_argument("--one-thread", action="store_true", help="losses, encoders: CPU time")
    parser.add_argument("--anyway", action="store_true", help="measure on a busy machine too")
    args, changes = parser.parse_known_args()
    if wrong := [change for change in changes if not change.startswith("--config.")]:
        parser.error(f"{wrong[0]} is not known")
    if (args.config is None) != (args.what in COMPARED):
        parser.error("input, step and memory need --config FILE, losses and encoders take none")
    if args.devices:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"
    if args.what in COMPARED:
        os.environ["JAX_PLATFORMS"] = "cpu"
    if args.one_thread:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    from plan_jax.types import UserError

    measure = {"input": measure_input, "step": measure_step, "memory": measure_memory}
    if args.what != "memory":
        be_alone(args.anyway)
    try:
        if args.what in COMPARED:
            return compare_with_torch(args)
        measure[args.what](args, read_config(args.config, changes))
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
