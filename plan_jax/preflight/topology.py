"""Chips, their peak rates, and the slices of TPUs that XLA can compile for without one.

The figures of TPUs are those of docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e. Those of GPUs
are of NVIDIA's data sheets (dense, without sparsity), or of its white papers for GeForce cards.
"""

import importlib.metadata
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from plan_jax import parallel
from plan_jax.types import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """The memory and the peak rates of one device.

    Attributes:
      name: the name in messages.
      memory: bytes that a program may use; on a TPU a part of the memory is reserved.
      flops: FLOP/s of matrix products of bfloat16, with sums in float32; 0 where there are none.
      float32_flops: FLOP/s of those of float32 at JAX's default precision: on a TPU they are one
        pass of bfloat16, on NVIDIA's cards since Ampere TF32.
      bandwidth: bytes/s between the memory and the cores.
      link: bytes/s that one chip sends to the others, over all its links; 0 if not known.
    """

    name: str
    memory: float
    flops: float
    float32_flops: float
    bandwidth: float
    link: float = 0.0


# A pattern of what JAX calls the device -> the chip. Names that contain others come first.
# `memory` of TPUs is what XLA's message "exceeds available HBM" says; the pages say 32, 16, 95 and
# 32 GB. That of GPUs is of the data sheet, for devices that do not tell. The interconnect of v5e
# and v6e is the rate in both directions, of which half is sent: 400 and 800 GB/s; that of a v5p is
# 4800 Gbit/s in one direction; that of a v4 is the all-reduce bandwidth of a pod, 1.1 PB/s, divided
# by its 4096 chips. Of NVLink, too, half is sent: 900 GB/s of an H100, 600 of an A100, 300 of a
# V100.
CHIPS: dict[str, Chip] = {
    "TPU v4": Chip("TPU v4", 30.75 * GIB, 275e12, 275e12, 1200e9, 268e9),
    "TPU v5 lite": Chip("TPU v5e", 15.75 * GIB, 197e12, 197e12, 819e9, 200e9),
    "TPU v5p?": Chip("TPU v5p", 95.74 * GIB, 459e12, 459e12, 2765e9, 600e9),
    "TPU v6 lite": Chip("TPU v6e", 31.25 * GIB, 918e12, 918e12, 1638e9, 400e9),
    "H200": Chip("H200", 141e9, 989.4e12, 494.7e12, 4800e9, 450e9),
    "H100 PCIe": Chip("H100 PCIe", 80e9, 756e12, 378e12, 2000e9),
    "H100": Chip("H100", 80e9, 989.4e12, 494.7e12, 3350e9, 450e9),
    "A100-SXM4-80GB": Chip("A100 80 GB", 80e9, 312e12, 156e12, 2039e9, 300e9),
    "A100-SXM4-40GB": Chip("A100 40 GB", 40e9, 312e12, 156e12, 1555e9, 300e9),
    "A100 80GB PCIe": Chip("A100 PCIe 80 GB", 80e9, 312e12, 156e12, 1935e9),
    "A100": Chip("A100 PCIe 40 GB", 40e9, 312e12, 156e12, 1555e9),
    "A10G?": Chip("A10", 24e9, 125e12, 62.5e12, 600e9),  # an A10G has no data sheet
    "L40S": Chip("L40S", 48e9, 362e12, 183e12, 864e9),
    "L4": Chip("L4", 24e9, 121e12, 60e12, 300e9),
    "V100": Chip("V100", 16e9, 0, 15.7e12, 900e9, 150e9),
    "P100": Chip("P100", 16e9, 0, 9.3e12, 732e9),  # on PCIe, as of Kaggle
    "T4": Chip("T4", 16e9, 0, 8.1e12, 320e9),
    "RTX 4090": Chip("RTX 4090", 24e9, 165.2e12, 82.6e12, 1008e9),
    "RTX 3090": Chip("RTX 3090", 24e9, 71e12, 35.6e12, 936e9),
}

# Slices by the names that clouds and notebooks give them. The number behind v4 and v5p is that of
# cores, of which a chip has two; behind v5e and v6e that of chips.
SLICES = {
    **{"v5e-1": "v5e:1x1", "v5e-4": "v5e:2x2", "v5e-8": "v5e:2x4", "v5e-16": "v5e:4x4"},
    **{"v5e-32": "v5e:4x8", "v5e-64": "v5e:8x8", "v5e-128": "v5e:8x16", "v5e-256": "v5e:16x16"},
    **{"v6e-1": "v6e:1x1", "v6e-4": "v6e:2x2", "v6e-8": "v6e:2x4", "v6e-16": "v6e:4x4"},
    **{"v6e-32": "v6e:4x8", "v6e-64": "v6e:8x8", "v6e-128": "v6e:8x16", "v6e-256": "v6e:16x16"},
    **{"v4-8": "v4:2x2x1", "v4-16": "v4:2x2x2", "v4-32": "v4:2x2x4", "v4-64": "v4:2x4x4"},
    **{"v4-128": "v4:4x4x4", "v5p-8": "v5p:2x2x1", "v5p-16": "v5p:2x2x2", "v5p-32": "v5p:2x2x4"},
    **{"v5p-64": "v5p:2x4x4", "v5p-128": "v5p:4x4x4"},
}
# Largest extent of a slice along each of its dimensions.
_LIMITS = {"v4": (16, 16, 16), "v5e": (16, 16), "v5p": (16, 16, 24), "v6e": (16, 16)}
# One device for both cores of a chip, as JAX has it on a v4 and a v5p by default.
_MEGACORE = ("v4", "v5p")
# libtpu asks the metadata server of Google Cloud and the environment about the machine, waits for
# other processes that hold a TPU, and logs what it misses; none of it matters to a compiler.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
NO_LIBTPU = "the compiler for TPUs is not installed; pip install 'plan_jax[tpu]'"


@dataclass(frozen=True)
class Target:
    """The devices that a step is compiled for.

    Attributes:
      name: the name in messages.
      mesh: the devices along `parallel.AXIS`.
      chip: what is known of one device; None if it is not in `CHIPS`.
      memory: bytes that a program may use on one device; 0 if not known.
      shape: chips along each dimension of the slice; the number of devices elsewhere.
      is_here: whether the devices are those of this machine.
    """

    name: str
    mesh: Mesh
    chip: Chip | None
    memory: float
    shape: tuple[int, ...]
    is_here: bool


def find_chip(device_kind: str) -> Chip | None:
    """Returns what is known of a device by its name in JAX or torch; None if it is not in `CHIPS`.

    >>> find_chip("NVIDIA A100-SXM4-40GB").name, find_chip("Tesla T4").name, find_chip("cpu")
    ('A100 40 GB', 'T4', None)
    """
    for pattern, chip in CHIPS.items():
        if re.search(rf"\b{pattern}\b(?! Laptop)", device_kind):
            return chip
    return None


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """Returns the generation of TPU and the shape of the slice that a name stands for.

    >>> parse_topology("v5e:2x4"), parse_topology("v4-32")
    (('v5e', (2, 4)), ('v4', (2, 2, 4)))

    Raises:
      UserError: there is no such slice.
    """
    match = re.fullmatch(r"(v4|v5e|v5p|v6e):(\d{1,2}(?:x\d{1,2})+)", SLICES.get(name, name))
    remedy = f"use one of {', '.join(SLICES)}, or a shape such as v5e:2x4 or v4:2x2x4"
    if not match:
        raise UserError(f"topology {name!r} is unknown; {remedy}")
    kind, shape = match.group(1), tuple(map(int, match.group(2).split("x")))
    limits = _LIMITS[kind]
    # Hosts have 2 x 2 chips; only a single chip is less.
    fits = len(shape) == len(limits) and all(
        1 <= n <= m for n, m in zip(shape, limits, strict=True)
    )
    if not fits or (np.prod(shape) > 1 and (shape[0] % 2 or shape[1] % 2)):
        raise UserError(f"topology {name!r} is not a shape of slices of {kind}; {remedy}")
    return kind, shape


def make_target(topology: str, devices: int = 0) -> Target:
    """Returns the devices of a slice of TPUs that need not exist, for `jax.jit(...).lower`.

    Args:
      topology: a name such as v5e:2x4, or a key of `SLICES`.
      devices: how many of the devices to use; 0 is all.

    Raises:
      UserError: there is no such slice, it has fewer devices, or libtpu is not installed.
    """
    kind, shape = parse_topology(topology)
    _require_libtpu()
    if not _has_tpu():  # a real one needs its own
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind in _MEGACORE else {}
    if np.prod(shape) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    layout = f"{kind}:{'x'.join(map(str, shape))}"
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=layout, **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"topology {topology!r} cannot be compiled for ({reason})") from None
    mesh = _make_mesh(description.devices, devices, topology)
    chip = find_chip(mesh.devices.flat[0].device_kind)
    name = topology if topology == layout else f"{topology} ({layout})"
    return Target(name, mesh, chip, chip.memory if chip else 0.0, shape, is_here=False)


def find_target(devices: int = 0) -> Target:
    """Returns the devices of this machine, and of the other hosts of the run.

    Args:
      devices: how many of them to use; 0 is all.

    Raises:
      UserError: there are fewer.
    """
    mesh = parallel.make_mesh(devices or None)
    device = mesh.devices.flat[0]
    chip = find_chip(device.device_kind)
    memory = chip.memory if chip else 0.0
    if device.platform == "cpu":
        memory = _host_memory() / mesh.size
    elif statistics := device.memory_stats():
        memory = float(statistics.get("bytes_limit", memory))
    count = "1 device" if mesh.size == 1 else f"{mesh.size} devices"
    name = f"this machine ({count} of kind {device.device_kind})"
    return Target(name, mesh, chip, memory, (mesh.size,), is_here=True)


def _has_tpu() -> bool:
    """Returns whether Linux has a device of a TPU."""
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def _require_libtpu() -> None:
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(NO_LIBTPU) from None


def _make_mesh(devices: Sequence[Any], count: int, topology: str) -> Mesh:
    count = count or len(devices)
    if count > len(devices):
        raise UserError(
            f"parallel.devices is {count} but topology {topology} has {len(devices)}; use 1 to"
            f" {len(devices)}, or 0 for all"
        )
    array = np.asarray(devices[:count])
    return Mesh(array, (parallel.AXIS,), axis_types=(AxisType.Auto,))


def _host_memory() -> float:
    """Returns the bytes of memory of this machine; 0 where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return 0.0
