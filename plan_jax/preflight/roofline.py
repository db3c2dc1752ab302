"""An estimate of the time of a step: the slowest of its matrix units, memory and interconnect."""

from collections.abc import Mapping
from dataclasses import dataclass

from plan_jax.preflight.collectives import Collective
from plan_jax.preflight.topology import Chip

# Shares of the peak rates that programs reach. They are our assumption: 0.3 to 0.6 is what
# published trainings of transformers report as their utilisation.
FLOPS_SHARE = 0.5
BANDWIDTH_SHARE = 0.8
LINK_SHARE = 0.8
HOP_SECONDS = 1e-6  # latency from one chip to the next


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step by what limits them, if nothing else did.

    Attributes:
      seconds: `compute`, `memory` and `interconnect` -> seconds, at the assumed shares of peaks.
      best: the same at the peaks, which no program reaches.
      images: pairs per step, over all devices.
    """

    seconds: Mapping[str, float]
    best: Mapping[str, float]
    images: int

    @property
    def limit(self) -> str:
        """The name of what limits the step."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def step_seconds(self) -> float:
        """Seconds of a step, if all three run side by side."""
        return self.seconds[self.limit]

    @property
    def images_per_second(self) -> float:
        """Images per second of all devices."""
        return self.images / self.step_seconds if self.step_seconds else 0.0


def estimate(
    chip: Chip,
    *,
    dtype: str,
    flops: float,
    traffic: float,
    collectives: Mapping[str, Collective],
    shape: tuple[int, ...],
    devices: int,
    images: int,
) -> Roofline:
    """Returns an estimate of the time of a step.

    Args:
      chip: the chip, whose link has to be known for several devices.
      dtype: `float32` or `bfloat16`, of the matrix products.
      flops: operations of one device in a step.
      traffic: bytes between its memory and its cores.
      collectives: what one device gives to collectives.
      shape: chips along each dimension of the slice.
      devices: number of devices.
      images: pairs per step, over all devices.
    """
    peak = chip.flops if dtype == "bfloat16" else chip.float32_flops
    best = {"compute": flops / peak, "memory": traffic / chip.bandwidth}
    shares = {"compute": FLOPS_SHARE, "memory": BANDWIDTH_SHARE}
    seconds = {name: best[name] / shares[name] for name in best}
    if devices > 1 and chip.link:
        sent = total_sent({kind: item.bytes for kind, item in collectives.items()}, devices)
        # A ring along each dimension in turn; an all-reduce goes round twice.
        hops = sum(extent - 1 for extent in shape)
        rounds = {kind: 2 if kind == "all-reduce" else 1 for kind in collectives}
        latency = sum(
            item.count * HOP_SECONDS * (1 if kind == "collective-permute" else hops * rounds[kind])
            for kind, item in collectives.items()
        )
        best["interconnect"] = sent / chip.link
        seconds["interconnect"] = best["interconnect"] / LINK_SHARE + latency
    return Roofline(seconds, best, images)


def total_sent(sizes: Mapping[str, float | int], devices: int) -> float:
    """Returns the bytes that one device sends around a ring, of operands' bytes by kind."""
    return sum((sent_bytes(kind, size, devices) for kind, size in sizes.items()), 0.0)


def sent_bytes(kind: str, size: float | int, devices: int) -> float:
    """Returns the bytes that one device sends in a collective around a ring.

    Args:
      kind: kind of the collective.
      size: bytes of its operand on one device.
      devices: number of devices N. An all-reduce sends 2 (N - 1) / N of its operand, a
        reduce-scatter and an all-to-all (N - 1) / N, and an all-gather passes on N - 1 operands.
    """
    rest = devices - 1
    factors = {
        "all-reduce": 2 * rest / devices,
        "all-gather": rest,
        "reduce-scatter": rest / devices,
        "all-to-all": rest / devices,
        "collective-permute": 1.0,
    }
    return float(size * factors[kind])
