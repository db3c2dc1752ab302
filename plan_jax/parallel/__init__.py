"""Devices and hosts: how many there are, and how a step is distributed over them.

A step is written for one device, `step(state, batch) -> (state, metrics)`, and names the axis along
which devices communicate: `jax.lax.pmean(gradients, AXIS)`, `jax.lax.all_gather(embeddings, AXIS)`.
The state is replicated on every device and the batch is sharded along its first axis. The outputs
must be equal on every device, so the step averages them before it returns.
"""

import collections
import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import hardware_utils
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree
from tqdm import tqdm

from plan_jax.parallel.cluster import host_name, initialize, leave, report_lost_host
from plan_jax.types import UserError

__all__ = ["host_name", "initialize", "leave", "report_lost_host"]  # of cluster.py

AXIS = "devices"
IMPLEMENTATIONS = ("shard_map", "pmap")
BFLOAT16_CAPABILITY = 8.0  # of NVIDIA's Ampere, the first with units for it
NO_GPU = "JAX sees no NVIDIA GPU, or its CUDA plugin is not installed"

NVIDIA_DEVICE = Path("/dev/nvidia0")

# How an array lies on a mesh: a copy on every device, or its first axis divided among them.
REPLICATED, SHARDED = PartitionSpec(), PartitionSpec(AXIS)


# Setting up --------------------------------------------------------------------------------------


def configure_backend(cpu_devices: int, cache: str | Path) -> None:
    """Sets the folder of compiled programs, and divides a lone CPU into `cpu_devices` devices.

    XLA distributes the small operations of small towers badly over cores. One device of one thread
    per core, each with its share of the batch, is faster. Neither setting overrides
    JAX_COMPILATION_CACHE_DIR or XLA_FLAGS, and the devices have no effect where there is an
    accelerator or once JAX has been used.

    Raises:
      UserError: there is no device of the kind that JAX_PLATFORMS names, or there is an accelerator
        that JAX does not use.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path(cache).expanduser().absolute()))
        # JAX looks at the folder once, at its first program. A notebook may have loaded a model or
        # trained another run before.
        compilation_cache.reset_cache()
    flags = os.environ.get("XLA_FLAGS", "")
    if cpu_devices > 1 and "xla_force_host_platform_device_count" not in flags:
        with contextlib.suppress(RuntimeError):  # JAX has been used: its devices are fixed
            jax.config.update("jax_num_cpu_devices", cpu_devices)
            os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    platforms, platform = os.environ.get("JAX_PLATFORMS", ""), list_devices()[0].platform
    if platforms.startswith("cuda,") and platform != "gpu":
        print_once(f"JAX_PLATFORMS is {platforms}: {NO_GPU}; using {platform}")
    elif platform == "cpu" and not (platforms or getattr(jax.config, "jax_platforms", "")):
        _require_accelerators()


def _require_accelerators() -> None:
    """Checks that this machine has no accelerator, when JAX has chosen the CPU by itself.

    Raises:
      UserError: there is one. JAX only warns, and training would take days instead of hours.
    """
    name, extra = "", ""
    if NVIDIA_DEVICE.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        name, extra = "an NVIDIA GPU", "cuda12"
    with contextlib.suppress(OSError, AttributeError, ValueError):
        if hardware_utils.num_available_tpu_chips_and_device_id()[0]:
            name, extra = "a TPU", "tpu"
    if name:
        raise UserError(
            f"this machine has {name}, and JAX uses its CPU; pip install -U 'jax[{extra}]' for this"
            " version of JAX, or set JAX_PLATFORMS=cpu to use the CPU"
        )


class CompilationCounter:
    """Counts the programs that were compiled or read from the cache since it was created."""

    def __init__(self) -> None:
        """Starts counting."""
        self._start = _count_events().copy()

    @property
    def compiled(self) -> int:
        """The number of programs that were compiled."""
        return self._count("/jax/compilation_cache/cache_misses")

    @property
    def cache_hits(self) -> int:
        """The number of programs that were read from the cache."""
        return self._count("/jax/compilation_cache/cache_hits")

    def _count(self, event: str) -> int:
        return _count_events()[event] - self._start[event]


@functools.cache  # JAX keeps each listener, so one serves all counters
def _count_events() -> collections.Counter[str]:
    """Returns how often JAX has reported each event, which grows from now on."""
    events: collections.Counter[str] = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
    return events


# Processes ---------------------------------------------------------------------------------------


def is_main() -> bool:
    """Returns whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def print_once(sentence: str) -> None:
    """Prints one line on stderr, in the main process only and above an open progress bar."""
    if is_main():
        tqdm.write(sentence, file=sys.stderr)
        sys.stderr.flush()


def barrier(name: str = "barrier") -> None:
    """Blocks until every process has reached the barrier called `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Returns whether `flag` is true in any process. Every process must call it together."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


class Agreement:
    """Agrees in every step on the flags that any process has raised, without waiting for an answer.

    The answer to a call comes two calls later. It has arrived by then, so that the host need not
    wait for the devices, and it is the same in all processes. All flags share one collective.
    """

    def __init__(self, mesh: Mesh, delay: int = 2) -> None:
        """Starts without flags; `delay` is the number of steps until an answer."""
        self.mesh, self.delay = mesh, delay
        self.is_alone = jax.process_count() == 1
        self.pending: collections.deque[Array] = collections.deque()
        any_device = functools.partial(jnp.any, axis=0)
        self.any = jax.jit(any_device, out_shardings=NamedSharding(mesh, REPLICATED))

    def any_process(self, *flags: bool) -> tuple[bool, ...]:
        """Returns for each flag whether any process had raised it, `delay` calls ago.

        Every process calls it in every step, with as many flags. With one process the answer is
        `flags`.
        """
        if self.is_alone:
            return flags
        copies = np.tile(flags, (len(self.mesh.local_devices), 1))
        self.pending.append(self.any(shard(copies, self.mesh)))
        if len(self.pending) <= self.delay:
            return (False,) * len(flags)
        return tuple(to_host(self.pending.popleft()).tolist())


def gather_strings(text: str) -> list[str]:
    """Returns the texts of all processes, in their order. Every process must call it."""
    if jax.process_count() == 1:
        return [text]
    # JAX gathers arrays of one shape only: the bytes are padded to the longest text.
    content = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(content.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: content.size] = content
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


# Devices -----------------------------------------------------------------------------------------


def list_devices() -> list[jax.Device]:
    """Returns the devices of all hosts.

    Raises:
      UserError: there are none of the kind that JAX_PLATFORMS names.
    """
    try:
        return jax.devices()
    # JAX passes over `cuda` where it sees no GPU, and asserts that another device is there.
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS")
        reason = (str(error).splitlines() or [NO_GPU])[0]
        raise UserError(f"JAX_PLATFORMS is {platforms}: {reason}; unset it, or use cpu") from None


@functools.cache
def make_mesh(count: int | None = None) -> Mesh:
    """Returns a mesh of the first `count` devices of all hosts along `AXIS`; None or 0 means all.

    Raises:
      UserError: there are fewer devices, none of the kind that JAX_PLATFORMS names, or `count`
        leaves one of several hosts without a device.
    """
    devices = list_devices()
    count = count or len(devices)
    if not 0 < count <= len(devices):
        raise UserError(
            f"parallel.devices is {count} but there are {len(devices)};"
            f" use 1 to {len(devices)}, or 0 for all"
        )
    if jax.process_count() > 1 and count != len(devices):
        raise UserError(
            f"parallel.devices is {count} but {jax.process_count()} hosts share {len(devices)}"
            " devices; use 0 for all"
        )
    # Auto: the compiler places arrays inside a step. Explicit axes would put the sharding into the
    # types, and the step would have to state it at each operation.
    return Mesh(np.asarray(devices[:count]), (AXIS,), axis_types=(AxisType.Auto,))


def require_dtype(dtype: str, devices: Iterable[Any]) -> None:
    """Checks that devices compute in `dtype`: NVIDIA's do in bfloat16 from capability 8.0 on.

    Raises:
      UserError: `dtype` is bfloat16, and a device is an older card, such as a T4 or V100.
    """
    for device in devices if dtype == "bfloat16" else ():
        # TPUs and CPUs have no such attribute, and AMD's cards have a name in it.
        capability = str(getattr(device, "compute_capability", ""))
        if re.fullmatch(r"\d+\.\d+", capability) and float(capability) < BFLOAT16_CAPABILITY:
            raise UserError(
                f"config.dtype is bfloat16, which {device.device_kind} (compute capability"
                f" {capability}) does not have; use config.dtype=float32"
            )


def split_batch(batch: int, devices: int) -> int:
    """Returns the number of examples on each device.

    >>> split_batch(32, 8)
    4
    >>> split_batch(30, 8)
    Traceback (most recent call last):
    plan_jax.types.UserError: batch 30 is not divisible by 8 devices; use 24 or 32

    Raises:
      UserError: `batch` is not divisible by `devices`; the sentence names the neighbours that are.
    """
    per_device, remainder = divmod(batch, devices)
    if batch < 1 or remainder:
        larger = f"{(max(per_device, 0) + 1) * devices}"
        remedy = f"{per_device * devices} or {larger}" if per_device > 0 else larger
        raise UserError(f"batch {batch} is not divisible by {devices} devices; use {remedy}")
    return per_device


def replicate(tree: PyTree, mesh: Mesh | None = None) -> PyTree:
    """Returns a copy of every leaf on every device; the copies share no buffer with `tree`.

    With several hosts each of them must hold the same values.
    """
    mesh = mesh or make_mesh()
    tree = jax.tree.map(_copy_leaf, tree)
    if jax.process_count() > 1:
        return multihost_utils.host_local_array_to_global_array(tree, mesh, REPLICATED)
    return jax.device_put(tree, NamedSharding(mesh, REPLICATED))


def _copy_leaf(leaf: Any) -> Array:
    """Returns a strongly typed copy of a leaf.

    A copy, because `device_put` shares the buffer with the first device, and a step that donates
    its state would delete the caller's array. Strongly typed, because a step returns strong types,
    and a weak type (that of a Python number) on input would compile the second step anew.
    """
    return jnp.array(leaf, dtype=getattr(leaf, "dtype", None) or jnp.result_type(leaf).name)


def shard(batch: PyTree, mesh: Mesh | None = None) -> PyTree:
    """Divides this process's arrays [B ...] along B among its devices, as arrays of all processes.

    Raises:
      UserError: B is not divisible by the number of devices of this process.
    """
    mesh = mesh or make_mesh()
    sharding = NamedSharding(mesh, SHARDED)
    for leaf in jax.tree.leaves(batch):
        split_batch(len(leaf), len(mesh.local_devices))
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def to_host(tree: PyTree) -> PyTree:
    """Returns every leaf as a numpy array; sharded leaves are gathered from all hosts."""

    def fetch(leaf: Any) -> np.ndarray:
        is_local = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
        if is_local or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(fetch, tree)


# Steps -------------------------------------------------------------------------------------------


def parallelise(
    step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    mesh: Mesh | None = None,
    *,
    implementation: str = "shard_map",
    donate: bool = True,
) -> Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]:
    """Compiles `step` for all devices: state and metrics replicated, the batch sharded.

    Args:
      step: (state, batch of one device) -> (state, metrics), written with the axis name `AXIS`.
      mesh: the devices; all of them if None.
      implementation: `shard_map` (jit of shard_map) or `pmap`; both return the same numbers.
      donate: whether the memory of the input state is reused for the output state.

    Raises:
      UserError: `implementation` is neither of the two.
    """
    mesh = mesh or make_mesh()
    if implementation == "pmap":
        return _parallelise_by_pmap(step, mesh, donate)
    if implementation != "shard_map":
        raise UserError(
            f"parallel.implementation is {implementation!r}; use {' or '.join(IMPLEMENTATIONS)}"
        )
    # With check_vma=True the gradient of replicated parameters arrives already summed over the
    # devices, and the step's own mean would leave it too large by their number, silently.
    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(REPLICATED, SHARDED),
        out_specs=(REPLICATED, REPLICATED),
        check_vma=False,
    )
    replicated, sharded = NamedSharding(mesh, REPLICATED), NamedSharding(mesh, SHARDED)
    return jax.jit(
        mapped,
        in_shardings=(replicated, sharded),
        out_shardings=replicated,
        donate_argnums=(0,) if donate else (),
    )


def _parallelise_by_pmap(step: Callable, mesh: Mesh, donate: bool) -> Callable:
    """Compiles `step` by `jax.pmap`, with the same arrays as `shard_map` for inputs and outputs."""
    mapped = jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=None,
        devices=tuple(mesh.devices.flat),
        donate_argnums=(0,) if donate else (),
    )
    num_processes = jax.process_count()

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, SHARDED))
    def split_by_device(batch: PyTree) -> PyTree:
        # pmap maps over a leading axis of devices: [B ...] -> [devices, B / devices, ...].
        return jax.tree.map(lambda x: x.reshape(mesh.size, -1, *x.shape[1:]), batch)

    def run_step(state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        batch = split_by_device(batch)
        # pmap takes and returns the part of an array that lies on this host's devices.
        if num_processes > 1:
            state = multihost_utils.global_array_to_host_local_array(state, mesh, REPLICATED)
            batch = multihost_utils.global_array_to_host_local_array(batch, mesh, SHARDED)
        outputs = mapped(state, batch)
        if num_processes > 1:
            outputs = multihost_utils.host_local_array_to_global_array(outputs, mesh, REPLICATED)
        return outputs

    return run_step


def mean(tree: PyTree, axis: str | None = AXIS) -> PyTree:
    """Returns the mean of every leaf over the devices, inside a step; `tree` if `axis` is None."""
    return tree if axis is None else jax.lax.pmean(tree, axis)


def step_key(key: Array, step: Array | int) -> Array:
    """Returns the random key of a step, the same on every device."""
    return jax.random.fold_in(key, step)
