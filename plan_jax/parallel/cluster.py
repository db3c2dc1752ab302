"""Joins the hosts of a run by JAX's distributed runtime, and says which one has been lost."""

import atexit
import contextlib
import ctypes
import functools
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import jax
from jax._src import clusters
from jaxlib import _jax

from plan_jax.parallel import hosts
from plan_jax.types import UserError

CLUSTER_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SIGNAL_CODE = 128  # plus the number of the signal is an exit code
_CONNECTION = re.compile(r"gloo|nccl|connection|heartbeat|barrier|UNAVAILABLE|DEADLINE_EX", re.I)
_COLLECTIVE = re.compile(r"gloo|nccl|heartbeat|coordination", re.I)

_is_ending = threading.Lock()  # taken for good by the thread that ends this process
_is_done = threading.Event()  # this process has done its work, and waits for the others at its exit
_watch: hosts.Watch | None = None  # of this process, which belongs to one run


class _Runs:
    """The runs of this process with its hosts: a notebook calls one after the other."""

    num_open = 0  # calls of `report_lost_host`, one inside of the other
    is_over = False  # a run has ended, and no other one has begun
    has_failed = False  # the last one, so that the others may wait for this process
    loss = ""  # what was lost while no run needed it, in a sentence


_runs = _Runs()


def initialize() -> None:
    """Joins the cluster that the environment describes, if any; called before JAX is used.

    `JAX_COORDINATOR_ADDRESS` (host:port), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` describe a
    cluster by hand. Otherwise JAX looks for one of several tasks: a step of SLURM, Open MPI, GKE, a
    TPU slice. `JAX_COORDINATOR_PORT` sets the port there. `JAX_DISTRIBUTED` is `auto` where there
    must be a cluster, and `off` where this process is alone whatever the environment says.

    Raises:
      UserError: only some of the three variables are set, or one has a wrong value; a host is
        missing, differs in its versions, or has ended since an earlier run of this process.
    """
    global _watch
    if jax.distributed.is_initialized():
        farewell = _watch.farewell if _watch else ""
        if _runs.loss or farewell:
            reason = _runs.loss or f"{hosts.LOST}: {farewell}"
            raise UserError(f"{reason.partition(';')[0]}; restart the kernels of all hosts")
        return
    mode = os.environ.get("JAX_DISTRIBUTED", "")
    if mode not in ("", "auto", "off"):
        raise UserError(f"JAX_DISTRIBUTED is {mode}; use auto or off, or unset it")
    cluster = None if mode == "off" else _read_cluster() or _find_cluster(mode == "auto")
    if mode == "auto" and cluster is None:
        raise UserError(
            "JAX_DISTRIBUTED is auto, and JAX finds neither SLURM, Open MPI, GKE nor a TPU slice;"
            f" set {', '.join(CLUSTER_VARIABLES)}"
        )
    if cluster is None or cluster.num_processes == 1:
        return
    # Its handler of SIGTERM would replace the one that lets training save.
    if "jax_enable_preemption_service" in jax.config.values:  # since JAX 0.8
        jax.config.update("jax_enable_preemption_service", False)
    address, num_processes, process_id = cluster
    _watch = hosts.meet(address, num_processes, process_id, _read_start_timeout())
    _watch.start(lambda reason: _end(hosts.lost_sentence(reason)))
    try:
        with _end_without_host():
            # It finds the devices of a task of SLURM or Open MPI by itself.
            jax.distributed.initialize(address, num_processes, process_id)
        atexit.register(_leave_at_exit)
    except RuntimeError as error:
        if "called before" in str(error):
            raise UserError(
                "JAX was used before its hosts were connected; start a new process or kernel"
            ) from None
        raise UserError(_describe_loss()) from error


class _Cluster(NamedTuple):
    """The processes of a run: where they meet, how many they are, and which one this is."""

    address: str
    num_processes: int
    process_id: int


def _read_cluster() -> _Cluster | None:
    """Returns the cluster that the three variables describe, or None if none of them is set."""
    values = [os.environ.get(name, "") for name in CLUSTER_VARIABLES]
    if not any(values[1:]):
        return None  # an address alone may belong to a cluster that JAX finds
    for name, value, is_number in zip(CLUSTER_VARIABLES, values, (False, True, True), strict=True):
        if not value or (is_number and not value.isdecimal()):
            raise UserError(
                f"{name} is {value or 'not set'}; a run on several hosts needs"
                f" {', '.join(CLUSTER_VARIABLES)}"
            )
    address, num_processes, process_id = values[0], int(values[1]), int(values[2])
    hosts.split_address(address)
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"JAX_PROCESS_ID is {process_id} and JAX_NUM_PROCESSES is {num_processes}; use 0 to"
            f" {max(num_processes - 1, 0)}"
        )
    return _Cluster(address, num_processes, process_id)


def _find_cluster(is_required: bool) -> _Cluster | None:
    """Returns the cluster that JAX recognises, or None if there is none.

    Raises:
      UserError: the cluster does not say how many processes there are, and `is_required`, or where
        the first is; JAX_COORDINATOR_PORT is no port, or an address is set without a cluster.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = _count_processes(is_required)
    if count is None and address:
        raise UserError(
            f"JAX_NUM_PROCESSES is not set; a run on several hosts needs"
            f" {', '.join(CLUSTER_VARIABLES)}"
        )
    if count is None:
        return None
    if count == 1:
        return _Cluster(address or "", 1, 0)
    timeout = _read_start_timeout()
    try:
        cluster = _Cluster(*_ask_cluster(address, None, timeout))
    except Exception as error:
        # The name of a host that has not started yet is not known, and starting again may help.
        is_missing = re.search("recognize|Retry failed", str(error))
        raise UserError(
            f"{hosts.LOST + ': ' if is_missing else ''}JAX cannot find host 0 of {count}"
            f" ({_first_line(error)}); start the same command on all hosts, or set"
            " JAX_DISTRIBUTED=off if this process is alone"
        ) from None
    if not address and (port := os.environ.get("JAX_COORDINATOR_PORT")):  # since JAX 0.8
        cluster = cluster._replace(address=f"{cluster.address.rpartition(':')[0]}:{port}")
        if not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(f"JAX_COORDINATOR_PORT is {port}; must be a number from 1 to 65535")
    return cluster


def _count_processes(is_required: bool) -> int | None:
    """Returns the number of processes of the cluster that JAX recognises, or None.

    It is asked for first: a process that is alone needs no address, which takes a service or fails.
    """
    variables = os.environ
    if "SLURM_JOB_ID" in variables and "OMPI_MCA_orte_hnp_uri" not in variables:
        # The script of a job and the shell of salloc are one process, and have the number of tasks
        # of the job in their variables: srun starts these, in a step that has its own.
        tasks = variables.get("SLURM_STEP_NUM_TASKS")
        if tasks in (None, "1"):
            return None if tasks is None else 1
    names = variables.get("TPU_PROCESS_ADDRESSES", variables.get("TPU_WORKER_HOSTNAMES"))
    if names and "," not in names and "MEGASCALE_NUM_SLICES" not in variables:
        return 1  # a machine of its own, whose name may be known to nobody
    try:
        with warnings.catch_warnings():
            if not is_required:
                warnings.simplefilter("ignore")  # any pod of Kubernetes lacks a package
            return _ask_cluster("", 0, hosts.START_TIMEOUT)[1]
    except KeyError:  # part of a cluster's variables
        return None
    except Exception as error:
        sentence = f"JAX cannot count the processes of the cluster ({_first_line(error)})"
        if is_required:
            raise UserError(f"{sentence}; set {', '.join(CLUSTER_VARIABLES)}") from None
        print(
            f"{sentence}, and this one takes itself to be alone; set JAX_DISTRIBUTED=off if it is,"
            f" else {', '.join(CLUSTER_VARIABLES)}",
            file=sys.stderr,
        )
        return None


def _ask_cluster(address: str | None, index: int | None, timeout: float) -> tuple:
    """Returns address, count and index by the cluster that JAX recognises, unless they are given.

    It waits for the address until `timeout`, in seconds.
    """
    return clusters.ClusterEnv.auto_detect_unset_distributed_params(
        address, None, index, [], None, int(timeout)
    )[:3]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _read_start_timeout() -> float:
    """Returns the seconds until a host counts as missing."""
    text = os.environ.get("PLAN_JAX_START_TIMEOUT", "")
    if text and (not text.isdecimal() or not int(text)):
        raise UserError(f"PLAN_JAX_START_TIMEOUT is {text}; must be a number of seconds")
    return float(text or hosts.START_TIMEOUT)


def _end(sentence: str) -> None:
    """Ends the process with a sentence, unless the main thread ends it in the next seconds."""
    time.sleep(hosts.GRACE)
    if _runs.is_over and not _is_done.is_set():  # a notebook goes on without the others
        _runs.loss = sentence
        threading.Event().wait()  # C++ aborts if it returns
    # The watch and JAX notice the same end. The later one waits here: C++ aborts if it returns.
    _is_ending.acquire()
    if _is_done.is_set():  # another host failed after the last thing that this one had to do
        os._exit(0)
    # Without the locks of the main thread, which may wait for the other host inside of XLA.
    os.write(2, f"\n{sentence}\n".encode())
    os._exit(2)


@contextlib.contextmanager
def _end_without_host() -> Iterator[None]:
    """Lets a process whose connection breaks off end with one sentence, when JAX connects in here.

    By default the thread of C++ that notices it aborts the process with a trace. It calls a
    callback instead if there is one, which JAX does not pass on. The call then fails, since its
    argument has no counterpart in Python, and ends in the handler of uncaught errors of C++.
    """
    connect = _jax.get_distributed_runtime_client

    def end(*_: Any) -> None:
        _end(_describe_loss())

    _jax.get_distributed_runtime_client = functools.partial(connect, missed_heartbeat_callback=end)
    try:
        yield
    finally:
        _jax.get_distributed_runtime_client = connect
    handler = ctypes.CFUNCTYPE(None)(end)
    _handlers.append(handler)
    with contextlib.suppress(OSError, AttributeError):  # another library of C++
        ctypes.CDLL("libstdc++.so.6")["_ZSt13set_terminatePFvvE"](handler)


_handlers: list[Any] = []  # C++ has their address, so they must not be collected


def _describe_loss() -> str:
    """Returns the sentence of a run that has lost a host, which the watch may know by name."""
    return hosts.lost_sentence(_watch.find_reason() if _watch else "")


@contextlib.contextmanager
def report_lost_host() -> Iterator[None]:
    """Turns what JAX says of a host that does not answer any more into a sentence.

    Raises:
      UserError: in place of JAX's error.
    """
    _runs.num_open += 1
    _runs.is_over, has_failed = False, True
    try:
        yield
        has_failed = False
    except (UserError, OSError):
        raise
    except Exception as error:
        # Orbax passes on the text of JAX's error in one of another type.
        is_from_jax = isinstance(error, jax.errors.JaxRuntimeError)
        pattern = _CONNECTION if is_from_jax else _COLLECTIVE
        if jax.process_count() > 1 and pattern.search(str(error)):
            raise UserError(_describe_loss()) from error
        raise
    finally:
        _runs.num_open -= 1
        _runs.is_over, _runs.has_failed = not _runs.num_open, has_failed


def _leave_at_exit() -> None:
    """Lets a kernel whose last run is done end without the others, which may go on."""
    if _watch and _runs.is_over and not _runs.has_failed:
        _watch.leave()
    if _runs.loss:
        os._exit(0)  # JAX would wait for the thread that waits in `_end`


def leave(code: int) -> NoReturn:
    """Ends the process; one of several that has failed does not wait for the others."""
    if _watch and (not code or code > SIGNAL_CODE):  # all hosts end after a signal to one
        _watch.leave()
    if not code:
        sys.stdout.flush()
        _is_done.set()
    if code and jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)  # at its exit JAX waits for all hosts, for a minute
    sys.exit(code)


def host_name(index: int) -> str:
    """Returns how a sentence names a host, as `host 1 (node7, process 123)`."""
    return _watch.names[index] if _watch else f"host {index}"
