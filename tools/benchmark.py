"""Measures speed and memory, e.g. `python tools/benchmark.py step --config configs/demo.py`.

input     images per second of the loader: decoded, shifted and tokenised
step      ms per step and images per second, `shard_map` against `pmap` in turns
memory    temporary memory of a method's loss and gradient, as the batch grows
evaluation  peak memory of a linear probe, retrieval and zero-shot, as the records grow
losses    GLoRIA's and MGCA's losses against their originals in torch (no --config; needs torch)
encoders  the towers at the papers' sizes against torch's (no --config; needs `make parity`)
kernels   the CPU kernels in whole towers against XLA's own operations (no --config)
records   the loader from records and from films, and preparation, against torch (no --config)
traffic   bytes that the losses exchange on 8 devices, against the least they need (no --config)
augment   decoding and each preset of `data.augment`, against a compiled batch (no --config)
device    a training step of each method at paper size, against torch's (no --config; needs torch,
          except with --sides jax); --config.field=value overrides a field of all methods
scale     memory, traffic and compile time of the methods at paper size on slices of TPUs that need
          not be there (no --config); --config.field=value overrides a field of all methods

Times are meaningful only on a quiet machine. The share of the CPUs that other processes use is read
before and during a measurement; above 5 % nothing is measured, unless `--anyway` is given.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import benchmark_device

MAX_LOAD = 0.05  # share of all CPUs that other processes may use
MIN_REPEATS = 10  # with fewer readings a median means little
MEMORY_BATCHES = (16, 32, 64, 128)
AGAINST_TORCH = ("losses", "encoders", "records")
WITH_CONFIG = ("input", "step", "memory", "evaluation")
WITHOUT_CONFIG = (*AGAINST_TORCH, "kernels", "augment", "traffic", "device", "scale")
WITHOUT_TIMES = ("memory", "evaluation", "traffic", "scale")  # the load changes no result


# The load of other processes ---------------------------------------------------------------------


class LoadMeter:
    """The share of all CPUs that other processes have used since the meter was created.

    Worker processes of the loader count as other processes until they have ended.
    """

    def __init__(self) -> None:
        self.start = self.read_busy_time()

    @staticmethod
    def read_busy_time() -> tuple[float, float]:
        """Returns the seconds that other processes were busy, over all CPUs, and the time."""
        try:
            fields = Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
        except OSError:
            return float("nan"), time.monotonic()
        ticks = [int(field) for field in fields]
        idle_ticks = ticks[3] + ticks[4]  # idle, and waiting for a disk
        busy = (sum(ticks) - idle_ticks) / os.sysconf("SC_CLK_TCK")
        return busy - sum(os.times()[:4]), time.monotonic()

    def share(self) -> float:
        """Returns the share in [0, 1]; nan on systems without /proc/stat."""
        busy, elapsed = (b - a for a, b in zip(self.start, self.read_busy_time(), strict=True))
        share = busy / (elapsed * (os.cpu_count() or 1))
        return min(max(share, 0.0), 1.0) if share == share else share

    def report(self) -> None:
        """Prints the share, with a warning if it makes the times unreliable."""
        share = self.share()
        warning = "" if share <= MAX_LOAD else "; these times are rough"
        print(f"other processes used {share:.1%} of the CPUs meanwhile{warning}")


def require_quiet_machine(anyway: bool) -> None:
    """Exits with one sentence if other processes are busy, after watching them for a second."""
    meter = LoadMeter()
    time.sleep(1.0)
    share = meter.share()
    if not share <= MAX_LOAD and not anyway:
        load = "cannot be measured" if share != share else f"is {share:.0%} of the CPUs"
        sys.exit(f"load of other processes {load}; stop them, or accept rough times with --anyway")


# Configs and tables ------------------------------------------------------------------------------


def load_config(path: str, overrides: list[str]) -> Any:
    """Returns a checked config, with overrides such as `--config.batch=16`."""
    from plan_jax import main
    from plan_jax.config import Config

    content = main.apply_overrides(main.load_config_file(path), split_overrides(overrides))
    return Config.from_dict(content)


def split_overrides(overrides: list[str]) -> dict[str, str]:
    """Returns the fields and values of overrides such as `--config.batch=16`."""
    fields = [override.removeprefix("--config.").partition("=") for override in overrides]
    return {name: value for name, _, value in fields}


def print_header() -> None:
    """Prints the header of a table of times."""
    print(f"{'':<12}{'min ms':>10}{'median':>10}{'images/s':>12}")


def print_times(name: str, seconds: list[float], images: int, note: str = "") -> None:
    """Prints one row: least and median ms, and images per second at the median."""
    median = statistics.median(seconds)
    times = f"{1e3 * min(seconds):>10.1f}{1e3 * median:>10.1f}"
    print(f"{name:<12}{times}{images / median:>12.1f}  {note}")


# Measurements ------------------------------------------------------------------------------------


def measure_input(args: argparse.Namespace, config: Any) -> None:
    """Measures the loader alone, an upper bound of the images per second in training."""
    from plan_jax import evaluate, train
    from plan_jax.model import build_components

    dataset = evaluate.open_split(config, "train")
    stream = train.iterate_batches(config, build_components(config), dataset)
    start = time.perf_counter()
    next(stream)
    print(f"first batch after {time.perf_counter() - start:.1f} s; batch {config.batch}")
    meter, seconds = LoadMeter(), []
    for _ in range(max(args.repeats, MIN_REPEATS)):
        start = time.perf_counter()
        for _ in range(args.steps):
            next(stream)
        seconds.append((time.perf_counter() - start) / args.steps)
    print_header()
    print_times("loader", seconds, config.batch)
    meter.report()


class CompiledStep(NamedTuple):
    """A training step after its first call, with its inputs and the seconds of that call."""

    run: Callable[[Any, Any], tuple[Any, Any]]
    state: Any
    batch: Any
    first_seconds: float


def compile_step(config: Any, implementation: str) -> CompiledStep:
    """Returns the training step of a config, called once."""
    import jax

    from plan_jax import evaluate, parallel, train
    from plan_jax.model import build_components
    from plan_jax.state import init_state
    from plan_jax.step import make_step

    mesh = parallel.make_mesh(config.parallel.devices or None)
    components = build_components(config, parallel.AXIS)
    dataset = evaluate.open_split(config, "train")
    batch = next(train.iterate_batches(config, components, dataset))
    state, optimiser = init_state(components, config, batch, dataset.findings)
    step = make_step(components, optimiser, config.ema_decay, parallel.AXIS)
    step = parallel.parallelise(step, mesh, implementation=implementation)
    state, batch = parallel.replicate(state, mesh), parallel.shard(batch, mesh)
    start = time.perf_counter()
    state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    return CompiledStep(step, state, batch, time.perf_counter() - start)


def record_compilations() -> list[str]:
    """Returns a list that grows by one entry whenever a program is compiled from now on."""
    import jax

    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: events.append(event) if "backend_compile" in event else None
    )
    return events


def measure_step(args: argparse.Namespace, config: Any) -> None:
    """Measures both implementations of the step, in turns, on a batch that stays on the devices.

    In turns, so that a change of the machine's clock or load hits both alike.
    """
    import jax

    from plan_jax import parallel

    steps = {name: compile_step(config, name) for name in parallel.IMPLEMENTATIONS}
    compilations = record_compilations()
    states = {name: step.state for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    meter = LoadMeter()
    for _ in range(max(args.repeats, MIN_REPEATS)):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(args.steps):
                states[name], metrics = step.run(states[name], step.batch)
            jax.block_until_ready((states[name], metrics))
            seconds[name].append((time.perf_counter() - start) / args.steps)
    print(f"{jax.device_count()} {jax.default_backend()} device(s), batch {config.batch}")
    print_header()
    for name, step in steps.items():
        note = f"first step with compilation: {step.first_seconds:.1f} s"
        print_times(name, seconds[name], config.batch, note)
    print(f"compilations after the first step: {len(compilations)}")
    meter.report()


def loss_memory(config: Any, batch_size: int) -> int:
    """Returns the temporary bytes of the loss and its gradient, which are compiled but not run.

    The gradient is with respect to the method's own parameters and the encoders' outputs; the
    encoders themselves are left out.
    """
    import jax
    import jax.numpy as jnp

    from plan_jax.model import build_components
    from plan_jax.types import Batch, MethodContext, TextBatch

    components = build_components(config)
    encoder, method, hyper = components.encoder, components.method, components.hyper
    if method.REQUIRES:
        names = ", ".join(method.REQUIRES)
        sys.exit(f"config.method {config.method} needs {names}; memory measures a method without")
    data = config.data
    image = jax.ShapeDtypeStruct((batch_size, data.size, data.size, 1), jnp.uint8)
    pieces = jax.ShapeDtypeStruct((batch_size, data.max_tokens), jnp.int32)
    words = jax.ShapeDtypeStruct((batch_size, data.max_words), jnp.int32)
    text = TextBatch(tokens=pieces, word_index=pieces, word_id=words, sentence=words)
    (images, texts), _ = jax.eval_shape(
        encoder.init_with_output, jax.random.key(0), Batch(image, text)
    )
    params, memory = jax.eval_shape(
        lambda key: method.init(key, MethodContext(encoder.dim), hyper), jax.random.key(0)
    )

    # Masks and word ids are integers, which have no gradient: they travel apart from the features.
    constants = images.mask, texts.mask, texts.word_id, texts.sentence
    features = images.replace(mask=None), texts.replace(mask=None, word_id=None, sentence=None)

    def loss(learned: Any, constants: Any, memory: Any, key: Any, step: Any) -> Any:
        params, (images, texts) = learned
        image_mask, text_mask, word_id, sentence = constants
        images = images.replace(mask=image_mask)
        texts = texts.replace(mask=text_mask, word_id=word_id, sentence=sentence)
        return method.loss(params, memory, images, texts, {}, key=key, step=step, hyper=hyper)[0]

    step = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = jax.jit(jax.grad(loss)).lower(
        (params, features), constants, memory, jax.random.key(0), step
    )
    return lowered.compile().memory_analysis().temp_size_in_bytes


def measure_memory(args: argparse.Namespace, config: Any) -> None:
    """Prints the memory of the loss by batch; a growth of 2.00 per doubling is linear."""
    print(f"{config.method}, loss and gradient from the encoders' outputs on")
    print(f"{'batch':>6}{'MiB':>10}{'MiB a pair':>14}{'growth':>10}")
    previous = None
    for batch_size in MEMORY_BATCHES:
        mib = loss_memory(config, batch_size) / 2**20
        growth = f"{mib / previous:.2f}" if previous else ""
        print(f"{batch_size:>6}{mib:>10.1f}{mib / batch_size:>14.2f}{growth:>10}", flush=True)
        previous = mib


def measure_evaluation(args: argparse.Namespace, config: Any) -> None:
    """Prints the peak memory of evaluations of a random model by number of records."""
    import benchmark_evaluation

    benchmark_evaluation.main(config.to_dict())


def compare_with_torch(args: argparse.Namespace) -> None:
    """Compares losses or towers with torch's, on all cores of the CPU or in one thread."""
    threads = 1 if args.one_thread else os.cpu_count() or 1
    try:
        if args.what == "losses":
            import benchmark_losses as comparison
        elif args.what == "records":
            import benchmark_records
        else:
            import benchmark_encoders as comparison
    except ModuleNotFoundError as error:
        sys.exit(f"{args.what} needs {error.name}; pip install {error.name}, or make parity")
    meter = LoadMeter()
    repeats = max(args.repeats, MIN_REPEATS)
    if args.what == "records":
        benchmark_records.main(repeats, args.steps)
    else:
        comparison.main(repeats, threads)
    meter.report()


def measure_kernels(args: argparse.Namespace) -> None:
    """Measures the CPU kernels in whole towers, on all cores or in one thread."""
    import benchmark_kernels

    meter = LoadMeter()
    # Other work disturbs the CPU time of one thread less than the wall-clock time of several.
    clock = time.process_time if args.one_thread else time.perf_counter
    benchmark_kernels.main(max(args.repeats, MIN_REPEATS), clock)
    meter.report()


def count_traffic(overrides: list[str]) -> None:
    """Prints the bytes that the methods' losses exchange; `--config.field=value` applies to all."""
    import benchmark_traffic

    benchmark_traffic.main(split_overrides(overrides))


def measure_augmentation(args: argparse.Namespace) -> None:
    """Measures the presets of augmentation by one thread, and as a compiled batch."""
    import benchmark_augmentation

    meter = LoadMeter()
    benchmark_augmentation.main(max(args.repeats, MIN_REPEATS))
    meter.report()


def measure_device(args: argparse.Namespace, overrides: list[str]) -> None:
    """Measures the whole step of each method on the device, against torch's."""
    meter = LoadMeter()
    try:
        benchmark_device.main(args, split_overrides(overrides))
    except ModuleNotFoundError as error:
        sys.exit(f"device needs {error.name}; make parity, or measure JAX alone by --sides jax")
    meter.report()


def measure_scale(args: argparse.Namespace, overrides: list[str]) -> None:
    """Compiles the methods for slices of TPUs, and prints what they need."""
    import benchmark_scale

    from plan_jax.types import check_local

    check_local("--results", args.results)
    benchmark_scale.main(
        Path(args.results),
        methods=args.methods,
        topologies=args.topologies,
        effort=args.effort,
        overrides=split_overrides(overrides),
        is_compiling=not args.print_only,
    )


# The command line --------------------------------------------------------------------------------


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Returns the parsed command line and the overrides of the config."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=(*WITH_CONFIG, *WITHOUT_CONFIG))
    parser.add_argument("--config", help="a config file; --config.field=value overrides a field")
    parser.add_argument("--devices", type=int, default=0, help="virtual CPU devices (0: none)")
    parser.add_argument("--repeats", type=int, default=MIN_REPEATS, help="readings, at least 10")
    parser.add_argument("--steps", type=int, default=3, help="steps or batches per reading")
    parser.add_argument("--one-thread", action="store_true", help="without a config: CPU time")
    parser.add_argument("--anyway", action="store_true", help="measure on a busy machine too")
    benchmark_device.add_arguments(parser)
    scale = parser.add_argument_group("scale")
    scale.add_argument("--results", default="runs/scale.jsonl", help="file of what was compiled")
    slices = ("v5e-8", "v5e-1", "v6e-1", "v4-32", "v5e-256")
    scale.add_argument("--topologies", nargs="+", choices=slices, default=slices)
    scale.add_argument("--effort", type=float, default=0.0, help="of the compiler, -1 is soonest")
    scale.add_argument("--print-only", action="store_true", help="compile nothing")
    args, overrides = parser.parse_known_args()
    unknown = [override for override in overrides if not override.startswith("--config.")]
    if unknown:
        parser.error(f"{unknown[0]} is not an option; see --help")
    if (args.config is None) != (args.what in WITHOUT_CONFIG):
        parser.error(f"{', '.join(WITH_CONFIG)} need --config FILE, the others take none")
    return args, overrides


def main() -> None:
    """Parses the command line and runs one measurement."""
    args, overrides = parse_arguments()
    # These must be set before jax is imported, which is why the functions above import it.
    if args.devices:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"
    if args.what == "device":
        benchmark_device.prepare_environment(args)
    elif args.what in WITHOUT_CONFIG:
        os.environ["JAX_PLATFORMS"] = "cpu"
    if args.one_thread:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    if args.what == "traffic":  # its programs are compiled and never run
        os.environ["XLA_FLAGS"] = (
            "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
            " --xla_cpu_use_fusion_emitters=false"
        )
    from plan_jax.types import UserError

    measurements = {
        "input": measure_input,
        "step": measure_step,
        "memory": measure_memory,
        "evaluation": measure_evaluation,
    }
    if args.what not in WITHOUT_TIMES:
        require_quiet_machine(args.anyway)
    try:
        if args.what in AGAINST_TORCH:
            compare_with_torch(args)
        elif args.what == "kernels":
            measure_kernels(args)
        elif args.what == "augment":
            measure_augmentation(args)
        elif args.what == "traffic":
            count_traffic(overrides)
        elif args.what == "device":
            measure_device(args, overrides)
        elif args.what == "scale":
            measure_scale(args, overrides)
        else:
            measurements[args.what](args, load_config(args.config, overrides))
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
