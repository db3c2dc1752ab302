"""Devices and hosts: the one file that knows how many there are and how a step is spread over them.

A step is written for one device, `step(state, batch) -> (state, metrics)`, and names the axis where
devices meet: `jax.lax.pmean(gradients, AXIS)`, `jax.lax.all_gather(embeddings, AXIS)`. The state is
a copy on every device, the batch is cut along its first axis, and what comes out has to be the same
on every device: the step averages it before returning.
"""

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from plan_jax.types import UserError

AXIS = "devices"
IMPLEMENTATIONS = ("shard_map", "pmap")


def initialize() -> None:
    """Join the other hosts, if the environment speaks of any; to be called before JAX is used.

    `JAX_COORDINATOR_ADDRESS` (host:port), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` name a cluster
    by hand; with `JAX_DISTRIBUTED=auto` JAX asks the cluster itself (SLURM, TPU slices, GKE).

    Raises:
      UserError: some of the three variables are set and others are not, or are no numbers.
    """
    if jax.distributed.is_initialized():
        return
    if os.environ.get("JAX_DISTRIBUTED") == "auto":
        jax.distributed.initialize()
        return
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    values = [os.environ.get(name) for name in names]
    if not any(values):
        return
    for name, value, number in zip(names, values, (False, True, True), strict=True):
        if not value or (number and not value.isdigit()):
            raise UserError(
                f"{name} is {value or 'not set'}; a run on several hosts needs {', '.join(names)}"
            )
    address, count, index = values
    jax.distributed.initialize(address, int(count), int(index))


def configure_backend(cpu_devices: int, cache: str | Path) -> None:
    """Keep compiled programs in the folder `cache`, and cut a lone CPU into `cpu_devices` devices.

    XLA spreads the small operations of small towers badly over cores: a device of one thread for
    each core, sharing the batch, is faster. Without effect where there is an accelerator, where
    XLA_FLAGS or JAX_COMPILATION_CACHE_DIR say otherwise, or once JAX has been used.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path(cache).expanduser().absolute()))
    flags = os.environ.get("XLA_FLAGS", "")
    if cpu_devices > 1 and "xla_force_host_platform_device_count" not in flags:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", cpu_devices)
            os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()


class Programs:
    """Counts the programs that were compiled, and those found in the cache, since it was made."""

    def __init__(self) -> None:
        """Begin to count."""
        self.compiled = self.found = 0
        jax.monitoring.register_event_listener(self._count)

    def _count(self, event: str, **_: Any) -> None:
        self.found += event == "/jax/compilation_cache/cache_hits"
        self.compiled += event == "/jax/compilation_cache/cache_misses"


def is_main() -> bool:
    """Whether this process is the one that writes files and talks."""
    return jax.process_index() == 0


def barrier(name: str = "barrier") -> None:
    """Wait until every process has come to the point called `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process; every process has to ask at the same step."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def gather_strings(text: str) -> list[str]:
    """Give the text of every process, in their order; every process has to ask."""
    if jax.process_count() == 1:
        return [text]
    mine = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(mine.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: mine.size] = mine
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


@functools.cache
def mesh(count: int | None = None) -> Mesh:
    """Give the first `count` devices, of all hosts, in a row called `AXIS`; None or 0 means all.

    Raises:
      UserError: there are fewer devices, none of the kind that JAX_PLATFORMS asks for, or `count`
        leaves one of several hosts without work.
    """
    try:
        devices = jax.devices()
    except RuntimeError as error:
        wanted, why = os.environ.get("JAX_PLATFORMS"), str(error).splitlines()[0]
        raise UserError(f"JAX_PLATFORMS is {wanted}: {why}; unset it, or use cpu") from None
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
    return Mesh(np.asarray(devices[:count]), (AXIS,), axis_types=(AxisType.Auto,))


def split_batch(batch: int, devices: int) -> int:
    """Give the number of examples on each device.

    >>> split_batch(32, 8)
    4
    >>> split_batch(30, 8)
    Traceback (most recent call last):
    plan_jax.types.UserError: batch 30 does not divide over 8 devices; use 24 or 32

    Raises:
      UserError: `batch` does not divide over `devices`; the sentence names the neighbours that do.
    """
    share, rest = divmod(batch, devices)
    if batch < 1 or rest:
        above = f"{(max(share, 0) + 1) * devices}"
        remedy = f"{share * devices} or {above}" if share > 0 else above
        raise UserError(f"batch {batch} does not divide over {devices} devices; use {remedy}")
    return share


def replicate(tree: PyTree, over: Mesh | None = None) -> PyTree:
    """Copy every leaf to every device; the copies share no buffer with `tree`.

    With several hosts each of them has to hold the same values.
    """
    over = over or mesh()
    tree = jax.tree.map(_strong_copy, tree)
    if jax.process_count() > 1:
        return multihost_utils.host_local_array_to_global_array(tree, over, PartitionSpec())
    return jax.device_put(tree, NamedSharding(over, PartitionSpec()))


def _strong_copy(leaf: Any) -> Array:
    """Copy a leaf, as `device_put` would share it with the first device, and donation take it.

    A type that is weak (that of a Python number) becomes a plain one, as it will be after a step:
    or the second step would be compiled anew.
    """
    return jnp.array(leaf, dtype=getattr(leaf, "dtype", None) or jnp.result_type(leaf).name)


def shard(batch: PyTree, over: Mesh | None = None) -> PyTree:
    """Cut this process's arrays [B ...] along B over its devices, into arrays of all processes.

    Raises:
      UserError: B does not divide over the devices of this process.
    """
    over = over or mesh()
    sharding = NamedSharding(over, PartitionSpec(AXIS))
    for leaf in jax.tree.leaves(batch):
        split_batch(len(leaf), len(over.local_devices))
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def to_host(tree: PyTree) -> PyTree:
    """Bring every leaf to this process as a numpy array, gathered from other hosts if it is cut."""

    def fetch(leaf: Any) -> np.ndarray:
        whole = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
        if whole or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(fetch, tree)


def parallelise(
    step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    over: Mesh | None = None,
    *,
    implementation: str = "shard_map",
    donate: bool = True,
) -> Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]:
    """Compile `step` for all devices: state and metrics replicated, batch cut along its first axis.

    Args:
      step: (state, batch of one device) -> (state, metrics), written with the axis name `AXIS`.
      over: the devices; all of them if None.
      implementation: `shard_map` (jit of shard_map) or `pmap`; they give the same numbers.
      donate: the memory of the state that goes in is reused for the one that comes out.

    Raises:
      UserError: there is no such implementation.
    """
    over = over or mesh()
    if implementation == "pmap":
        return _pmap(step, over, donate)
    if implementation != "shard_map":
        raise UserError(
            f"parallel.implementation is {implementation!r}; use {' or '.join(IMPLEMENTATIONS)}"
        )
    same, cut = PartitionSpec(), PartitionSpec(AXIS)
    # With check_vma=True the gradient of replicated parameters arrives already summed over the
    # devices, and the step's own mean would leave it too large by their number, silently.
    mapped = jax.shard_map(
        step, mesh=over, in_specs=(same, cut), out_specs=(same, same), check_vma=False
    )
    places = NamedSharding(over, same), NamedSharding(over, cut)
    return jax.jit(
        mapped,
        in_shardings=places,
        out_shardings=places[0],
        donate_argnums=(0,) if donate else (),
    )


def _pmap(step: Callable, over: Mesh, donate: bool) -> Callable:
    """Spread `step` by `jax.pmap`, between arrays of the same kind that `shard_map` is given."""
    mapped = jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=None,
        devices=tuple(over.devices.flat),
        donate_argnums=(0,) if donate else (),
    )
    several = jax.process_count() > 1
    same, cut = PartitionSpec(), PartitionSpec(AXIS)

    @functools.partial(jax.jit, out_shardings=NamedSharding(over, cut))
    def fold(batch: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x.reshape(over.size, -1, *x.shape[1:]), batch)

    def call(state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        batch = fold(batch)
        if several:
            state = multihost_utils.global_array_to_host_local_array(state, over, same)
            batch = multihost_utils.global_array_to_host_local_array(batch, over, cut)
        out = mapped(state, batch)
        if several:
            out = multihost_utils.host_local_array_to_global_array(out, over, same)
        return out

    return call


def mean(tree: PyTree, axis: str | None = AXIS) -> PyTree:
    """Average every leaf over the devices, inside a step; without an axis, leave it as it is."""
    return tree if axis is None else jax.lax.pmean(tree, axis)


def step_key(key: Array, step: Array | int) -> Array:
    """Derive the random key of a step, the same on every device."""
    return jax.random.fold_in(key, step)


def device_key(key: Array, axis: str | None = AXIS) -> Array:
    """Derive this device's own random key, inside a step; without an axis, that of device 0."""
    return jax.random.fold_in(key, 0 if axis is None else jax.lax.axis_index(axis))
