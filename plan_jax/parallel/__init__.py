"""Devices and hosts: how many there are, and how a step is distributed over them.

A step is written for one device, `step(state, batch) -> (state, metrics)`, and names the axis along
which devices communicate: `jax.lax.pmean(gradients, AXIS)`, `jax.lax.all_gather(embeddings, AXIS)`.
The state is replicated on every device and the batch is sharded along its first axis. The outputs
must be equal on every device, so the step averages them before it returns.

An evaluation is written for one device as well. Inside of `use_devices`, an `ExampleFunction`
divides examples among the devices of a host, a `BatchFunction` divides a batch among those of all
hosts, and hosts share examples by `own_examples` and `share_items`. Outside, one device computes.
"""

import collections
import contextlib
import functools
import glob
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from jax._src import hardware_utils
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree
from tqdm import tqdm

from plan_jax.parallel.cluster import host_name, initialize, leave, report_lost_host
from plan_jax.types import UserError

__all__ = ["host_name", "initialize", "leave", "report_lost_host"]  # of cluster.py

AXIS = "devices"
IMPLEMENTATIONS = ("shard_map", "pmap")
BFLOAT16_CAPABILITY = 8.0  # of NVIDIA's Ampere, the first with units for it
NO_GPU = "JAX sees no NVIDIA GPU, or its CUDA plugin is not installed"
NVIDIA_DEVICES = "/dev/nvidia[0-9]*"  # a container may have another one than the first
NO_NVIDIA = ("", "-1", "NoDevFiles")  # CUDA_VISIBLE_DEVICES, the last one by SLURM
PIECE_BYTES = 2**24  # that hosts exchange at once; each device holds as many from every host

Item = TypeVar("Item")

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
    if glob.glob(NVIDIA_DEVICES) and os.environ.get("CUDA_VISIBLE_DEVICES") not in NO_NVIDIA:
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


def ask_main(compute: Callable[[], Item]) -> Item:
    """Returns in all processes what a function returns in the main one, which alone calls it.

    Every process must call this, and waits for the answer.

    Args:
      compute: returns what JSON can hold.

    Raises:
      UserError: the function raised one; in every process.
    """
    if jax.process_count() == 1:
        return compute()
    answer, refusal = None, ""
    if is_main():
        try:
            answer = compute()
        except UserError as error:
            refusal = str(error)  # shared, because the other processes wait for an answer
    answer, refusal = json.loads(gather_strings(json.dumps([answer, refusal]))[0])
    if refusal:
        raise UserError(refusal)
    return answer  # type: ignore[return-value]


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
    return [content.decode() for content in gather_bytes(text.encode())]


def find_difference(text: str) -> tuple[str, str, str, str] | None:
    """Returns the first host whose text is not that of host 0; every process must call it.

    Returns:
      The host's name and text, and those of host 0; None if all have the same text.
    """
    first, *others = gather_strings(text)
    for index, other in enumerate(others, 1):
        if other != first:
            return host_name(index), other, host_name(0), first
    return None


def gather_bytes(content: bytes) -> list[bytes]:
    """Returns the bytes of all processes, in their order. Every process must call it.

    They pass through the devices in pieces, so that the memory of a device does not limit them.
    """
    # JAX gathers arrays of one shape only, of at most 32 bits: pieces are padded, and sizes split.
    size_parts = np.asarray(divmod(len(content), PIECE_BYTES), np.uint32)
    sizes = [
        int(pieces) * PIECE_BYTES + int(rest)
        for pieces, rest in np.reshape(multihost_utils.process_allgather(size_parts), (-1, 2))
    ]
    parts: list[list[bytes]] = [[] for _ in sizes]
    for start in range(0, max(sizes), PIECE_BYTES):
        own = np.frombuffer(content[start : start + PIECE_BYTES], np.uint8)
        # Powers of two, so that few programs are compiled.
        length = min(PIECE_BYTES, 1 << (max(sizes) - start - 1).bit_length())
        piece = np.zeros(length, np.uint8)
        piece[: own.size] = own
        rows = np.reshape(multihost_utils.process_allgather(piece), (-1, length))
        for part, row, size in zip(parts, rows, sizes, strict=True):
            part.append(row[: max(size - start, 0)].tobytes())
    return [b"".join(part) for part in parts]


def broadcast(tree: PyTree) -> PyTree:
    """Returns the arrays of the main process in all of them, in numpy and bit for bit.

    Every process must call it, with arrays of the same shapes and types. They pass through the
    devices in pieces.
    """
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, tree))
    # As bytes: JAX adds the zeros of the other processes, by which -0.0 becomes 0.0.
    content = np.frombuffer(b"".join(leaf.tobytes() for leaf in leaves), np.uint8).copy()
    for start in range(0, content.size, PIECE_BYTES):
        piece = slice(start, start + PIECE_BYTES)
        content[piece] = multihost_utils.broadcast_one_to_all(content[piece])
    parts = np.split(content, np.cumsum([leaf.nbytes for leaf in leaves])[:-1])
    values = [
        np.frombuffer(part.tobytes(), leaf.dtype).reshape(leaf.shape)
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, values)


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


# Evaluation --------------------------------------------------------------------------------------


class _Scope(NamedTuple):
    """The devices in use, and whether the hosts of the mesh work on the same examples."""

    mesh: Mesh
    is_shared: bool


_scope: ContextVar[_Scope | None] = ContextVar("scope", default=None)


@contextlib.contextmanager
def use_devices(count: int = 0) -> Iterator[None]:
    """Lets an evaluation inside use the first `count` devices; 0, or more than there are, use all.

    Several hosts use all of their devices. All of them must enter and do the same inside: they
    share examples, and wait for each other where they exchange results.
    """
    is_shared = jax.process_count() > 1
    is_part = not is_shared and 0 < count < len(list_devices())
    token = _scope.set(_Scope(make_mesh(count if is_part else None), is_shared))
    try:
        yield
    finally:
        _scope.reset(token)


@contextlib.contextmanager
def _without_hosts() -> Iterator[None]:
    """Lets this host work inside on what the other hosts do not see."""
    scope = _scope.get()
    token = _scope.set(scope and scope._replace(is_shared=False))
    try:
        yield
    finally:
        _scope.reset(token)


def _shares_examples() -> bool:
    scope = _scope.get()
    return scope is not None and scope.is_shared


@functools.cache
def _local_mesh(mesh: Mesh) -> Mesh:
    return Mesh(np.asarray(mesh.local_devices), (AXIS,), axis_types=(AxisType.Auto,))


def _devices_in_use() -> Mesh | None:
    """Returns the mesh of this host's devices, or None where one device works as JAX lets it."""
    scope = _scope.get()
    if scope is None or len(scope.mesh.local_devices) == 1:
        return None
    return _local_mesh(scope.mesh)


def num_devices_in_use() -> int:
    """Returns the number of devices of this host that an `ExampleFunction` runs on."""
    mesh = _devices_in_use()
    return 1 if mesh is None else mesh.size


def _place(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Returns arrays on every device of this host in use, from wherever they are."""

    sharding = None if mesh is None else NamedSharding(mesh, REPLICATED)

    def place(leaf: Any) -> Any:
        # What all hosts have together lies on the devices of this one already.
        is_spread = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
        if sharding is None:
            return leaf.addressable_data(0) if is_spread else jax.device_put(leaf)
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        if not is_spread:
            return jax.device_put(leaf, sharding)
        copies = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, copies)

    return jax.tree.map(place, tree)


class Replicas:
    """Arrays that every device in use has, copied to them once and not at each call."""

    def __init__(self, tree: PyTree) -> None:
        """Copies nothing yet."""
        self._tree = tree
        self._mesh: Mesh | None = None
        self._copies: PyTree = None

    def get(self) -> PyTree:
        """Returns the arrays on the devices in use."""
        mesh = _devices_in_use()
        if mesh is None:
            return self._tree
        if mesh is not self._mesh:
            self._mesh, self._copies = mesh, _place(self._tree, mesh)
        return self._copies


class ExampleFunction:
    """A function of examples, which every device of this host applies to its part of them.

    `function(constants, examples)` returns arrays with one row for each example; a row depends on
    its example and on the constants only. On one device it is `jax.jit` of the function.
    """

    def __init__(self, function: Callable[[PyTree, PyTree], PyTree]) -> None:
        """Compiles nothing yet."""
        self._function = function
        self._compiled: dict[Mesh | None, Callable] = {None: jax.jit(function)}

    def bind(self, constants: PyTree) -> Callable[[PyTree], PyTree]:
        """Returns a function from any number of examples to their rows, in numpy."""
        mesh = _devices_in_use()
        constants = _place(constants, mesh)
        compiled = self._compile(mesh)
        if mesh is None:
            return lambda examples: jax.device_get(compiled(constants, examples))

        def call(examples: PyTree) -> PyTree:
            count = len(jax.tree.leaves(examples)[0])
            if padding := -count % mesh.size:
                rows = np.minimum(np.arange(count + padding), count - 1)
                examples = jax.tree.map(lambda leaf: leaf[rows], examples)
            examples = jax.device_put(examples, NamedSharding(mesh, SHARDED))
            outputs = jax.device_get(compiled(constants, examples))
            return jax.tree.map(lambda leaf: leaf[:count], outputs) if padding else outputs

        return call

    def __call__(self, constants: PyTree, examples: PyTree) -> PyTree:
        """Returns the rows of the examples, in numpy."""
        return self.bind(constants)(examples)

    def _compile(self, mesh: Mesh | None) -> Callable:
        if mesh not in self._compiled:
            mapped = jax.shard_map(
                self._function,
                mesh=mesh,
                in_specs=(REPLICATED, SHARDED),
                out_specs=SHARDED,
                check_vma=False,
            )
            self._compiled[mesh] = jax.jit(mapped)
        return self._compiled[mesh]


class BatchFunction:
    """A function of a whole batch, over which all devices of all hosts divide the work.

    `function(state, batch, *numbers)` is written for one device. The compiler divides it, and adds
    the communication: means and statistics over the batch are those of one device. Devices that do
    not divide the batch compute parts of it together, each the same.
    """

    def __init__(self, function: Callable[..., PyTree]) -> None:
        """Compiles nothing yet."""
        self._function = function
        self._compiled: dict[Mesh | None, Callable] = {None: jax.jit(function)}

    def place(self, state: PyTree) -> PyTree:
        """Returns a state on all devices."""
        mesh = _batch_mesh(1)
        return state if mesh is None else replicate(state, mesh)

    def __call__(self, state: PyTree, batch: PyTree, count: int, *numbers: Any) -> PyTree:
        """Returns what the function does, on all devices.

        Args:
          state: arrays that `place` or an earlier call returned.
          batch: the rows `own_rows(count)` of the batch.
          count: the number of examples of the batch, over all hosts.
          *numbers: what else the function takes, equal on all hosts.
        """
        mesh = _batch_mesh(count)
        if mesh is None:
            return self._compiled[None](state, batch, *numbers)
        replicated, sharded = NamedSharding(mesh, REPLICATED), NamedSharding(mesh, SHARDED)
        if mesh not in self._compiled:
            shardings = (replicated, sharded, *[replicated] * len(numbers))
            self._compiled[mesh] = jax.jit(
                self._function, in_shardings=shardings, out_shardings=replicated
            )
        start = own_rows(count).start

        def place(leaf: Any) -> Array:
            def read(index: Any) -> Any:
                rows = range(count)[index[0]]
                return leaf[rows.start - start : rows.stop - start]

            return jax.make_array_from_callback((count, *leaf.shape[1:]), sharded, read)

        return self._compiled[mesh](state, jax.tree.map(place, batch), *numbers)


def _batch_mesh(count: int) -> Mesh | None:
    """Returns the devices for a batch of `count`, or None where one device works as JAX lets it.

    The first axis divides the batch, and the devices along the second have the same part of it.
    """
    scope = _scope.get()
    if scope is None:
        return None
    mesh = scope.mesh if scope.is_shared else _local_mesh(scope.mesh)
    return _divide_mesh(mesh, math.gcd(count, mesh.size)) if mesh.size > 1 else None


@functools.cache
def _divide_mesh(mesh: Mesh, parts: int) -> Mesh:
    devices = mesh.devices.reshape(parts, -1)
    return Mesh(devices, (AXIS, "copies"), axis_types=(AxisType.Auto,) * 2)


def own_rows(count: int) -> slice:
    """Returns the rows that this host reads of a batch for a `BatchFunction`."""
    mesh = _batch_mesh(count)
    if mesh is None:
        return slice(0, count)
    sharding = NamedSharding(mesh, SHARDED)
    indices = sharding.addressable_devices_indices_map((count,)).values()
    ranges = [range(count)[index[0]] for index in indices if index is not None]
    return slice(min(rows.start for rows in ranges), max(rows.stop for rows in ranges))


def own_examples(count: int) -> Int[np.ndarray, " N"]:
    """Returns the indices of this host's part of `count` examples, which `join_examples` joins.

    All hosts have as many: the last ones get copies of the last example.
    """
    if not _shares_examples():
        return np.arange(count)
    size = -(-count // jax.process_count())
    return np.minimum(jax.process_index() * size + np.arange(size), count - 1)


def join_examples(rows: PyTree, count: int) -> PyTree:
    """Returns the rows [count ...] of all examples, from those of each host's `own_examples`."""
    if not _shares_examples():
        return rows

    def join(leaf: Any) -> np.ndarray:
        joined = np.empty((count, *leaf.shape[1:]), leaf.dtype)
        # Some rows at a time: those of all hosts would be held twice.
        num_rows = max(1, PIECE_BYTES // max(1, leaf[:1].nbytes))
        for first in range(0, len(leaf), num_rows):
            own = leaf[first : first + num_rows]
            for process, content in enumerate(gather_bytes(own.tobytes())):
                part = np.frombuffer(content, leaf.dtype).reshape(own.shape)
                start = process * len(leaf) + first
                joined[start : start + len(part)] = part[: max(count - start, 0)]
        return joined

    return jax.tree.map(join, rows)


def share_items(items: Sequence[Item], compute: Callable[[Sequence[Item]], Any]) -> list[Any]:
    """Returns `compute(part)` of each host, for its part of the items; a part may be empty.

    Inside, a host works on its own. On one host the part is all items.

    Args:
      items: what the hosts share, equal on all of them.
      compute: returns a tree of dicts and lists with arrays, numbers, texts and bytes.
    """
    if not _shares_examples():
        return [compute(items)]
    with _without_hosts():
        tree = compute(items[jax.process_index() :: jax.process_count()])
    contents = gather_bytes(serialization.msgpack_serialize(tree))
    return [serialization.msgpack_restore(content) for content in contents]


def count_parts() -> int:
    """Returns into how many parts `share_items` divides items."""
    return jax.process_count() if _shares_examples() else 1


def from_main(content: bytes) -> bytes:
    """Returns the bytes of the main process where hosts share examples, else `content`."""
    return gather_bytes(content if is_main() else b"")[0] if _shares_examples() else content
