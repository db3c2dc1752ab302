"""Measures a training step of each method beside an equal one in torch: `benchmark.py device`.

A step is the forward pass, the backward pass and the update by AdamW at the sizes of the method's
paper config, on random images and texts of true lengths that stay on the device. Weights are
random, so nothing is downloaded. The sides are `jax`, the step that training runs; `torch`, see
`benchmark_device_torch.py`; and `compile`, the same with `torch.compile`. They run in turns on the
same batch. Each method and type is a process of its own, so that memory is free and its peak is
that of the method.

FLOPs are three times those of the products and convolutions of the forward pass, the same count for
all sides; the utilisation is FLOPs over time over the peak of the device's data sheet.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SIDES = ("jax", "torch", "compile")
METHODS = ("convirt", "gloria", "mgca", "asg", "place", "plan")
DTYPES = ("float32", "bfloat16")
VOCAB_SIZE = 28996  # pieces of Bio_ClinicalBERT
HEADER = (
    "| method | type | batch | side | ms, min | median | images/s | TFLOP | utilisation | peak GB"
    " | JAX : this, min | median | first step s |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


class Side(NamedTuple):
    """A compiled step: `run` takes one step, `wait` blocks until all steps have ended.

    `peak_bytes` is None where the device does not tell.
    """

    run: Callable[[], Any]
    wait: Callable[[], Any]
    first_loss: float
    first_seconds: float
    peak_bytes: int | None


class Row(NamedTuple):
    """The readings of one side: seconds a step, or the reason why there are none."""

    side: str
    seconds: list[float]
    first_seconds: float = 0.0
    peak_bytes: int | None = None
    failure: str = ""


# Peaks and FLOPs ---------------------------------------------------------------------------------


def peak_flops(device_name: str, dtype: str) -> float:
    """Returns the peak of a device in FLOP/s for a type of the towers; nan if it is unknown.

    >>> peak_flops("NVIDIA A100-SXM4-40GB", "bfloat16"), peak_flops("cpu", "float32")
    (312000000000000.0, nan)

    Raises:
      UserError: the device is known, and has no units for the type.
    """
    from plan_jax.preflight.topology import find_chip
    from plan_jax.types import UserError

    chip = find_chip(device_name)
    if not chip:
        return float("nan")
    if dtype == "bfloat16" and not chip.flops:
        raise UserError(f"{device_name} does not compute in bfloat16; use --dtypes float32")
    return chip.flops if dtype == "bfloat16" else chip.float32_flops


def count_step_flops(components: Any, state: Any, batch: Any) -> int:
    """Returns three times the FLOPs of the forward pass of towers, heads and loss.

    The backward pass has two products for each one of the forward pass. What a side computes twice,
    to save memory, does not count.
    """
    import jax

    from plan_jax.layers.cpu import use_xla_only
    from plan_jax.preflight.flops import count_jaxpr_flops

    encoder = components.encoder.clone(axis=None)
    method, hyper = components.method, components.hyper

    def loss(state: Any, batch: Any) -> Any:
        key = jax.random.key(0)
        (images, texts), _ = encoder.apply(
            {"params": state.params["encoders"], "batch_stats": state.batch_stats},
            batch,
            True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        images = images.select(method.IMAGE_FEATURES)
        texts = texts.select(method.TEXT_FEATURES)
        options = {"key": key, "step": state.step, "hyper": hyper}
        params, memory = state.params["method"], state.memory
        return method.loss(params, memory, images, texts, dict(batch.extra), **options)[0]

    with use_xla_only():  # the kernels of a CPU need fewer products for a convolution
        jaxpr = jax.make_jaxpr(loss)(state, batch)
    return 3 * int(count_jaxpr_flops(remove_unread(jaxpr)))


def remove_unread(closed: Any) -> Any:
    """Returns a jaxpr without the equations that its result does not read."""
    from jax.interpreters import partial_eval

    jaxpr = closed.jaxpr
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


# Configs and batches -----------------------------------------------------------------------------


def load_paper_config(
    method: str, dtype: str, batch: int, vocabulary: Path, overrides: Mapping[str, str]
) -> Any:
    """Returns the paper config of a method, with random weights and a vocabulary of that size.

    A `batch` of 0 is that of the config.
    """
    from plan_jax.command.config_files import load_config_file
    from plan_jax.config import Config
    from plan_jax.main import apply_overrides

    fields = {
        "data.tokenizer": str(vocabulary),
        "weights.vision": "",
        "weights.text": "",
        "dtype": dtype,
        **({"batch": str(batch)} if batch else {}),
        **overrides,
    }
    return Config.from_dict(apply_overrides(load_config_file(method), fields))


def write_vocabulary(path: Path, size: int = VOCAB_SIZE) -> Path:
    """Writes a vocabulary of BERT's kind: special pieces, letters and numbered words."""
    letters = [chr(ord("a") + n) for n in range(26)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters)]
    pieces += [f"word{n}" for n in range(size - len(pieces))]
    path.write_text("\n".join(pieces) + "\n")
    return path


def draw_batch(config: Any, num_findings: int, num_regions: int) -> Any:
    """Returns a batch of random images, and of texts with the lengths of reports.

    Reports have 20 words to as many as fit, in sentences of 4 to 16 words; a caption of a single
    sentence (ConVIRT, GLoRIA) has 5 to 40. Words have one or two pieces, and the words of a
    vocabulary of 3000 are as frequent as by Zipf's law.
    """
    import numpy as np

    from plan_jax.model import METHODS
    from plan_jax.types import Batch, TextBatch

    rng = np.random.default_rng(0)
    size, data = config.batch, config.data
    length, num_words = data.max_tokens, data.max_words
    is_sentence = data.caption in ("convirt", "gloria")
    low, high = (5, 40) if is_sentence else (20, num_words)
    tokens = np.zeros((size, length), np.int32)
    word_index = np.full((size, length), -1, np.int32)
    word_id = np.zeros((size, num_words), np.int32)
    sentence = np.full((size, num_words), -1, np.int32)
    for row in range(size):
        target = rng.integers(min(low, num_words), min(high, num_words) + 1)
        tokens[row, 0], piece, word, sentence_end, number = 2, 1, 0, 0, -1
        while word < target:
            num_pieces = 1 + int(rng.random() < 0.2)
            if piece + num_pieces > length - 1:
                break
            if word == sentence_end:
                number += 1
                sentence_end += num_words if is_sentence else int(rng.integers(4, 17))
            name = int(rng.zipf(1.3)) % 3000
            tokens[row, piece : piece + num_pieces] = 100 + name
            word_index[row, piece : piece + num_pieces] = word
            word_id[row, word], sentence[row, word] = 100 + name, number
            piece, word = piece + num_pieces, word + 1
        tokens[row, piece] = 3
    corners = np.sort(rng.uniform(0.05, 0.95, (size, num_regions, 2, 2)), 2)
    region_words = sentence[:, None, :] == rng.integers(0, 12, (size, num_regions))[..., None]
    extra = {
        "labels": rng.integers(-1, 2, (size, num_findings)).astype(np.int8),
        "regions": corners.reshape(size, num_regions, 4).astype(np.float32),
        "region_words": region_words & (word_id > 0)[:, None],
    }
    return Batch(
        image=rng.integers(0, 256, (size, data.size, data.size, 1)).astype(np.uint8),
        text=TextBatch(tokens, word_index, word_id, sentence),
        extra={name: extra[name] for name in METHODS[config.method].REQUIRES},
    )


# The two sides -----------------------------------------------------------------------------------


class JaxSide(NamedTuple):
    """The step of training, with what the other sides and the count of FLOPs need of it."""

    side: Side
    flops: int
    tags: Any
    vocab_size: int


def make_jax_side(config: Any, batch: Any, findings: Sequence[str], is_measured: bool) -> JaxSide:
    """Builds the step that training runs for a config, and runs it twice.

    If it is not measured, only the FLOPs are counted.
    """
    import jax
    import jax.numpy as jnp

    from plan_jax import parallel
    from plan_jax.model import build_components
    from plan_jax.state import init_state
    from plan_jax.step import FIRST_NONFINITE, WATCH_SHAPE, make_step, watch_numbers

    mesh = parallel.make_mesh(1)
    components = build_components(config, parallel.AXIS)
    state, optimiser = init_state(components, config, batch, findings)
    flops = count_step_flops(components, state, batch)
    tags = None if "tags" not in state.memory else jax.device_get(state.memory["tags"])
    vocab_size = components.tokenizer.vocab_size
    if not is_measured:
        nothing = Side(lambda: None, lambda: None, float("nan"), 0.0, None)
        return JaxSide(nothing, flops, tags, vocab_size)
    step = watch_numbers(make_step(components, optimiser, config.ema_decay, parallel.AXIS))
    step = parallel.parallelise(step, mesh)
    carry = parallel.replicate((state, jnp.zeros(WATCH_SHAPE, jnp.int32)), mesh)
    on_device = parallel.shard(batch, mesh)
    del state

    def run() -> Any:
        nonlocal carry
        carry, metrics = step(carry, on_device)
        return metrics

    start = time.perf_counter()
    metrics = jax.device_get(run())
    seconds = time.perf_counter() - start
    assert not metrics[FIRST_NONFINITE].any(), "the first loss is not finite"
    jax.block_until_ready((run(), carry))
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    side = Side(run, lambda: jax.block_until_ready(carry), float(metrics["loss"]), seconds, peak)
    return JaxSide(side, flops, tags, vocab_size)


def make_torch_side(config: Any, batch: Any, jax_side: JaxSide, device: str, name: str) -> Side:
    """Builds the step in torch, eager or compiled, and runs it twice."""
    import benchmark_device_torch

    step = benchmark_device_torch.TorchStep(
        config,
        batch,
        jax_side.vocab_size,
        device=device,
        compiled=name == "compile",
        tags=jax_side.tags,
    )
    return Side(step.run, step.synchronise, step.first_loss, step.first_seconds, step.peak_bytes)


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether a library failed because the device's memory is full."""
    text = f"{type(error).__name__} {error}"
    return any(word in text for word in ("RESOURCE_EXHAUSTED", "OutOfMemory", "out of memory"))


# Measurement -------------------------------------------------------------------------------------


def measure(
    sides: Mapping[str, Side], repeats: int, steps: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Returns the seconds a step of each side, in turns of `steps` steps, one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            start = clock()
            for _ in range(steps):
                side.run()
            side.wait()
            if turn:
                seconds[name].append((clock() - start) / steps)
    return seconds


def measure_method(
    config: Any,
    sides: Sequence[str],
    *,
    repeats: int,
    steps: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Measures the sides of one config; returns rows, FLOPs, the device's name and first losses.

    Raises:
      UserError: there is no such device, it has no units for the type, or torch has no equal of
        the config.
    """
    from plan_jax import parallel
    from plan_jax.data.builders.chest_imagenome import FINDINGS, REGIONS

    device = parallel.list_devices()[0]
    device_name = device.device_kind
    peak = peak_flops(device_name, config.dtype)
    batch = draw_batch(config, len(FINDINGS), len(REGIONS))
    made: dict[str, Side] = {}
    failures: dict[str, str] = {}
    jax_side = None
    for name in ("jax", *(name for name in sides if name != "jax")):
        try:
            if name == "jax":
                jax_side = make_jax_side(config, batch, FINDINGS, "jax" in sides)
                if "jax" in sides:
                    made[name] = jax_side.side
                continue
            assert jax_side is not None
            kind = "cuda" if device.platform == "gpu" else device.platform
            made[name] = make_torch_side(config, batch, jax_side, kind, name)
        except Exception as error:
            if not is_out_of_memory(error) or jax_side is None:
                raise
            failures[name] = "out of memory"
    seconds = measure(made, repeats, steps, clock)
    rows = [
        Row(name, seconds[name], made[name].first_seconds, made[name].peak_bytes)
        if name in made
        else Row(name, [], failure=failures[name])
        for name in sides
    ]
    return {
        "method": config.method,
        "dtype": config.dtype,
        "batch": config.batch,
        "device": device_name,
        "flops": jax_side.flops if jax_side else 0,
        "peak_flops": peak,
        "rows": [row._asdict() for row in rows],
        "first_losses": {name: side.first_loss for name, side in made.items()},
    }


def format_rows(result: Mapping[str, Any]) -> list[str]:
    """Returns the rows of the table of one method and type."""
    rows = {row["side"]: Row(**row) for row in result["rows"]}
    ours = rows["jax"].seconds if "jax" in rows else []
    lines = []
    for name, row in rows.items():
        cells = [result["method"], result["dtype"], str(result["batch"]), name]
        if not row.seconds:
            lines.append(f"| {' | '.join([*cells, row.failure, *['-'] * 8])} |")
            continue
        least, median = min(row.seconds), statistics.median(row.seconds)
        share = result["flops"] / median / result["peak_flops"]
        ratios = ["-", "-"]
        if ours and name != "jax":
            ratios = [f"{min(ours) / least:.2f}", f"{statistics.median(ours) / median:.2f}"]
        cells += [
            f"{1e3 * least:.0f}",
            f"{1e3 * median:.0f}",
            f"{result['batch'] / median:.1f}",
            f"{result['flops'] / 1e12:.2f}",
            f"{share:.0%}" if share == share else "-",
            f"{row.peak_bytes / 1e9:.1f}" if row.peak_bytes else "-",
            *ratios,
            f"{row.first_seconds:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


# The command line --------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `device`."""
    group = parser.add_argument_group("device")
    group.add_argument("--platform", choices=("cpu", "gpu"), help="default: gpu if there is one")
    group.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    group.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: both, float32 on cpu")
    group.add_argument("--sides", nargs="+", choices=SIDES, help="default: all, on cpu two")
    group.add_argument("--batch", type=int, default=0, help="pairs a step; 0: as in the papers")


def prepare_environment(args: argparse.Namespace) -> None:
    """Chooses the platform, and sets what JAX reads when it is imported."""
    args.platform = args.platform or ("gpu" if shutil.which("nvidia-smi") else "cpu")
    os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda"}[args.platform]
    # Else JAX takes three quarters of a GPU's memory, and leaves too little to torch.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def main(args: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    """Prints the table, one process after the other for each method and type.

    With `--one-thread` the clock is CPU time, which other processes disturb less.

    Raises:
      UserError: the config has a mistake, or torch has no equal of it.
    """
    is_cpu = args.platform == "cpu"
    dtypes = args.dtypes or (("float32",) if is_cpu else DTYPES)
    sides = args.sides or (SIDES[:2] if is_cpu else SIDES)
    runs = [(method, dtype) for method in args.methods for dtype in dtypes]
    if len(runs) == 1:
        print_header(sides, args.repeats, 1 if is_cpu else args.steps)
        with tempfile.TemporaryDirectory() as folder:
            vocabulary = write_vocabulary(Path(folder) / "vocab.txt")
            config = load_paper_config(*runs[0], args.batch, vocabulary, overrides)
            if args.one_thread and set(sides) != {"jax"}:
                import torch

                torch.set_num_threads(1)
            result = measure_method(
                config,
                sides,
                repeats=args.repeats,
                steps=1 if is_cpu else args.steps,
                clock=time.process_time if args.one_thread else time.perf_counter,
            )
        print("\n".join(format_rows(result)), flush=True)
        losses = ", ".join(f"{name} {x:.4f}" for name, x in result["first_losses"].items())
        print(f"{result['device']}; first losses: {losses}", file=sys.stderr)
        return
    command = [sys.executable, *sys.argv, "--anyway"]
    for number, (method, dtype) in enumerate(runs):
        child = [*command, "--methods", method, "--dtypes", dtype]
        output = subprocess.run(child, capture_output=True, text=True, check=False)
        before, row, rest = output.stdout.partition(f"| {method} |")
        if number == 0:
            print(before if row else HEADER, end="" if row else "\n")
        reason = (output.stderr.strip().splitlines() or ["no reason given"])[-1]
        rows = [line for line in (row + rest).splitlines() if line.startswith("|")]
        print("\n".join(rows) if row else f"{method}, {dtype}: {reason}", flush=True)


def print_header(sides: Sequence[str], repeats: int, steps: int) -> None:
    """Prints the versions and the header of the table."""
    from importlib import metadata

    names = ("jax",) if set(sides) == {"jax"} else ("jax", "torch")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    print(
        f"{versions}; {repeats} turns of {steps} step(s); JAX : this is JAX's time by this side's"
    )
    print(f"\n{HEADER}")
