"""The report of a preflight, as a text for the terminal and as plain values for JSON."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from plan_jax.preflight import roofline
from plan_jax.preflight.compile import Preflight
from plan_jax.preflight.memory import format_bytes, suggest_remedies

_WIDTH = 30  # of the first column


def format_report(result: Preflight) -> str:
    """Returns the report as lines of text."""
    return "\n".join(
        [
            *_title(result),
            "",
            *_memory_lines(result),
            *_cost_lines(result),
            *_collective_lines(result),
            *_time_lines(result),
            *_assumption_lines(result),
        ]
    )


def to_dict(result: Preflight) -> dict[str, Any]:
    """Returns the figures as plain values, for JSON; sizes are bytes of one device."""
    chip, times = result.target.chip, result.roofline
    collectives = result.collectives
    return {
        "method": result.config.method,
        "target": result.target.name,
        "chip": chip.name if chip else None,
        "devices": result.target.mesh.size,
        "batch": result.config.batch,
        "pairs_per_device": result.pairs,
        "microbatch": result.config.microbatch,
        "dtype": result.config.dtype,
        "memory": dict(result.memory.kinds),
        "memory_total": result.memory.total,
        "memory_limit": result.memory.limit,
        "fits": result.memory.fits,
        "flops": result.flops,
        "traffic": result.traffic,
        "xla_flops": result.xla_flops,
        "xla_bytes": result.xla_bytes,
        "collectives": None
        if collectives is None
        else {kind: dataclasses.asdict(item) for kind, item in collectives.items()},
        "minimum": dict(result.minimum),
        "seconds": dict(times.seconds) if times else None,
        "best_seconds": dict(times.best) if times else None,
        "step_seconds": times.step_seconds if times else None,
        "images_per_second": times.images_per_second if times else None,
        "effort": result.effort,
        "lower_seconds": result.lower_seconds,
        "compile_seconds": result.compile_seconds,
        "compile_cpu_seconds": result.compile_cpu_seconds,
        "assumptions": list(result.assumptions),
        "refusal": result.refusal,
    }


def _title(result: Preflight) -> Iterator[str]:
    config, devices = result.config, result.target.mesh.size
    share = f"{result.pairs} of them" if devices > 1 else "all"
    parts = f", {config.microbatch} at a time" if config.microbatch else ""
    yield (
        f"{config.method} on {result.target.name}: {config.batch} pairs, {share} on each device"
        f"{parts}, {config.dtype}"
    )
    tried = f", effort {result.effort:g}" if result.effort else ""
    yield (
        f"compiled in {result.compile_seconds:.0f} s, {result.compile_cpu_seconds:.0f} s of CPU"
        f" time{tried}, after {result.lower_seconds:.0f} s of tracing"
    )


def _memory_lines(result: Preflight) -> Iterator[str]:
    memory, chip = result.memory, result.target.chip
    yield "memory of one device"
    for kind, size in memory.kinds.items():
        if size:
            yield _row(kind, format_bytes(size))
    if result.refusal:
        yield _row("total, at least", format_bytes(memory.total))
    else:
        yield _row("total", format_bytes(memory.total))
    if not memory.limit:
        yield f"how much a {result.target.mesh.devices.flat[0].device_kind} has is not known"
        return
    owner = f"of a {chip.name}" if chip else "of this machine"
    share = memory.total / memory.limit
    fits = memory.fits and not result.refusal
    verdict = "it fits" if fits else "it does NOT fit"
    yield f"{verdict}: {share:.0%} of the {format_bytes(memory.limit)} {owner}"
    if not fits:
        yield "what would make it fit (rough estimates; compile again with what you choose):"
        for remedy in suggest_remedies(memory, result.config, result.pairs):
            yield f"  {remedy}"


def _cost_lines(result: Preflight) -> Iterator[str]:
    yield ""
    yield "one step of one device"
    yield _row("FLOPs of matrix products", _scientific(result.flops), _xla(result.xla_flops))
    if result.traffic is not None:
        xla = _xla(result.xla_bytes, size=True)
        yield _row("bytes from and to memory", format_bytes(result.traffic), xla)


def _xla(value: float, size: bool = False) -> str:
    if not value:
        return ""
    number = format_bytes(value) if size else _scientific(value)
    return f"  (XLA, which counts loops once: {number})"


def _collective_lines(result: Preflight) -> Iterator[str]:
    if not result.collectives or result.target.mesh.size == 1:
        return  # with itself a device exchanges nothing
    yield ""
    yield f"{'collectives of one device':<{_WIDTH}}{'bytes':>12}{'minimum':>12}{'count':>8}"
    for kind, item in result.collectives.items():
        least = format_bytes(result.minimum[kind]) if kind in result.minimum else "-"
        yield _row(kind, format_bytes(item.bytes), f"{least:>12}{item.count:>8}")
    devices = result.target.mesh.size
    sizes = {kind: item.bytes for kind, item in result.collectives.items()}
    sent = roofline.total_sent(sizes, devices)
    minimum = roofline.total_sent(result.minimum, devices)
    least = format_bytes(minimum) if result.minimum else "-"
    yield _row("sent around a ring", format_bytes(sent), f"{least:>12}")


def _time_lines(result: Preflight) -> Iterator[str]:
    times, chip = result.roofline, result.target.chip
    if result.refusal:
        return
    yield ""
    if times is None or chip is None:
        kind = result.target.mesh.devices.flat[0].device_kind
        yield f"time: not estimated, as the peak rates of a {kind} are not known"
        return
    peak = chip.flops if result.config.dtype == "bfloat16" else chip.float32_flops
    assumed = {
        "compute": f"at {roofline.FLOPS_SHARE:.0%} of {peak / 1e12:.3g} TFLOP/s",
        "memory": f"at {roofline.BANDWIDTH_SHARE:.0%} of {chip.bandwidth / 1e9:.4g} GB/s",
        "interconnect": f"at {roofline.LINK_SHARE:.0%} of {chip.link / 1e9:.4g} GB/s, and"
        f" {roofline.HOP_SECONDS * 1e6:g} us from chip to chip",
    }
    yield "time of a step (estimate)"
    for name, seconds in times.seconds.items():
        yield _row(name, f"{1e3 * seconds:.3g} ms", f"  {assumed[name]}")
    yield _row(
        "step",
        f"{1e3 * times.step_seconds:.3g} ms",
        f"  {times.images_per_second:.3g} images/s, limited by {times.limit}",
    )


def _assumption_lines(result: Preflight) -> Iterator[str]:
    sentences = list(result.assumptions)
    if result.config.parallel.implementation == "pmap":
        sentences.append("shard_map is compiled instead of pmap, which computes the same")
    if result.roofline:
        sentences.append(
            "compute, memory and interconnect run side by side; reading images is left out"
        )
        chip = result.target.chip
        if result.target.mesh.size > 1 and "interconnect" not in result.roofline.seconds:
            sentences.append("the interconnect takes no time: its rate is not known")
        if result.config.dtype == "float32" and chip and chip.name.startswith("TPU"):
            sentences.append("a float32 product is one pass of bfloat16, JAX's default on a TPU")
    if sentences:
        yield ""
        yield "assumed:"
        yield from (f"  {sentence}" for sentence in sentences)


def _row(name: str, value: str, rest: str = "") -> str:
    return f"  {name:<{_WIDTH - 2}}{value:>12}{rest}"


def _scientific(number: float) -> str:
    """Returns a number with a prefix of the SI.

    >>> _scientific(1.25e12), _scientific(3e6)
    ('1.25 T', '3 M')
    """
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.3g}"
