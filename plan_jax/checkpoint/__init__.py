"""Checkpoints: state, position in the data and config, written by orbax in the background.

`<folder>/<step>/` holds three items: `state` (any pytree of arrays), `data` (the position of each
process's data iterator) and `config` (with the format, the version of plan_jax and a checksum of
every item). A step appears under its number once it is complete. If the disk damages a step later,
even by a single bit, `restore` renames it to `broken-<step>` and falls back to the newest complete
one. A step that only cannot be read at the moment stops the run instead (see `faults`).

Of several hosts the main one alone reads and writes the steps of a run. All hosts have the same
state, so the main one has all of it to save, and sends them what it has restored.
"""

import base64
import contextlib
import importlib.metadata
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers as policies

from plan_jax import parallel
from plan_jax.checkpoint import checksums, folders
from plan_jax.checkpoint.checksums import fingerprint
from plan_jax.checkpoint.copies import copy_repeatedly, copy_steps, restore_steps
from plan_jax.checkpoint.faults import (
    BrokenError,
    Failure,
    find_fault,
    first_line,
    read_json,
    try_reading,
)
from plan_jax.checkpoint.folders import FOLDER, locate
from plan_jax.checkpoint.lock import lock_workdir
from plan_jax.checkpoint.silence import silence_orbax
from plan_jax.logger import report_write_errors
from plan_jax.types import UserError

__all__ = [
    "FOLDER",
    "Checkpoint",
    "add_metrics",
    "close",
    "copy_repeatedly",
    "copy_steps",
    "fingerprint",
    "load_weights",
    "locate",
    "lock_workdir",
    "open_manager",
    "read_config",
    "restore",
    "restore_steps",
    "save",
]

# Raised whenever names of parameters or config fields change. Checkpoints of 0.1 have no number.
FORMAT = 2
WEIGHTS = ("params", "ema_params", "batch_stats", "memory")
# Orbax takes all hosts to write by default, and waits for them.
MAIN_ONLY = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
# How often a reader starts again because the run has replaced the step that it was reading.
MAX_READS = 100


class Checkpoint(NamedTuple):
    """A restored checkpoint; `data` is the state of this process's data iterator."""

    step: int
    state: PyTree
    data: Any
    config: dict


# Writing -----------------------------------------------------------------------------------------


def open_manager(
    folder: str | Path, keep: int = 3, best_metric: str | None = None
) -> ocp.CheckpointManager | None:
    """Opens `folder` for writing; broken steps in it are renamed first.

    Only one process at a time may write into a folder: see `lock_workdir`. The other hosts of a run
    get None, and call the functions below with that.

    Args:
      folder: where the steps are; created if it does not exist.
      keep: the number of newest steps that are kept.
      best_metric: the step with the largest value of this metric is kept too; None keeps the newest
        steps only.

    Raises:
      UserError: `folder` cannot be created or read, or is a file; in every process.
    """
    managers: list[ocp.CheckpointManager] = []
    path = Path(folder).absolute()
    parallel.ask_main(lambda: managers.append(_open_manager(path, keep, best_metric)))
    return managers[0] if managers else None


def _open_manager(folder: Path, keep: int, best_metric: str | None) -> ocp.CheckpointManager:
    folders.check_name(folder)
    silence_orbax()
    rules: list = [policies.LatestN(keep)]
    rank: Callable[[Mapping[str, float]], float] | None = None
    if best_metric is not None:

        def rank(metrics: Mapping[str, float]) -> float:
            value = metrics.get(best_metric)
            return float(value) if value is not None and math.isfinite(value) else -math.inf

        rules.append(
            policies.BestN(get_metric_fn=rank, n=1, keep_checkpoints_without_metrics=False)
        )
    options = ocp.CheckpointManagerOptions(
        best_fn=rank,
        preservation_policy=policies.AnyPreservationPolicy(rules),
        cleanup_tmp_directories=True,  # what a killed save left behind
        create=False,  # orbax does not create a folder for one of several hosts
        multiprocessing_options=MAIN_ONLY,
        # An old step is renamed before it is deleted, so that a kill leaves no half of it.
        todelete_subdir=folders.DELETED,
    )
    with report_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    folders.empty_deleted(folder)
    # Orbax parses the metrics of all steps when it opens the folder, and fails on broken ones.
    steps, faults = _find_faults(folder)
    newest = max((step for step in steps if step not in faults), default=None)
    for step, fault in faults.items():
        folders.set_aside(folder, step, fault, newest)
    with report_write_errors(folder):
        return ocp.CheckpointManager(folder, options=options)


def _find_faults(folder: Path) -> tuple[list[int], dict[int, str]]:
    """Returns the steps in `folder`, and what is wrong with the small files of the broken ones.

    Raises:
      UserError: a step cannot be read.
    """
    steps = folders.list_steps(folder)
    faults = {step: _find_fault(folder / str(step)) for step in steps}
    return steps, {step: fault for step, fault in faults.items() if fault}


def _find_fault(step_folder: Path) -> str:
    try:
        return find_fault(step_folder)
    except OSError as error:
        raise Failure(first_line(error)).to_error(step_folder) from error


def save(
    manager: ocp.CheckpointManager | None,
    step: int,
    state: PyTree,
    data: Any,
    config: Mapping,
    metrics: Mapping[str, float] | None = None,
) -> bool:
    """Starts saving a step, and returns as soon as `state` may be overwritten.

    Every host calls it, since each has its own position in the data.

    Args:
      manager: from `open_manager`.
      step: the number of steps taken.
      state: a pytree of arrays.
      data: what `get_state()` of this process's data iterator returned, a dict or bytes.
      config: a nested dict of what JSON can hold.
      metrics: numbers by which the best step is selected.

    Returns:
      False if this process writes nothing: the step has been saved before, or it is not the main
      one.

    Raises:
      UserError: this save, or the previous one in the background, could not be written.
    """
    positions = {"processes": parallel.gather_strings(_encode_json(data))}
    if manager is None:
        return False
    if jax.process_count() > 1:  # of an array of all hosts, orbax would write this one's part
        state = parallel.to_host(state)
    # Checksums come first: once orbax has its copy, the next step may donate these arrays.
    about = {
        "format": FORMAT,
        "version": _installed_version(),
        "config": json.loads(_encode_json(config)),
        "checksums": checksums.leaf_checksums(state),
        "data_checksum": checksums.json_checksum(positions),
    }
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=ocp.args.JsonSave(positions),
        config=ocp.args.JsonSave(about | {"checksum": checksums.json_checksum(about)}),
    )
    values = None if metrics is None else {name: float(x) for name, x in metrics.items()}
    with _report_write_errors(manager):
        if step in manager.all_steps():
            return False
        manager.wait_until_finished()  # the previous save renames an old step at its end
        folders.empty_deleted(Path(manager.directory))
        # `force`, because when to save is decided by the caller and not by orbax's policy.
        return manager.save(step, args=args, metrics=values, force=True)


def add_metrics(
    manager: ocp.CheckpointManager | None, step: int, metrics: Mapping[str, float]
) -> None:
    """Adds the metrics by which the best step is selected to a saved step that has none.

    The step itself is not touched, so a kill at any moment loses nothing.

    Raises:
      UserError: they could not be written.
    """
    if manager is None:
        return
    folder = Path(manager.directory) / str(step)
    if not (folder / "metrics").exists():
        with _report_write_errors(manager):
            temporary = folder / "metrics.part"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            values = {name: float(value) for name, value in metrics.items()}
            (temporary / "metrics").write_text(json.dumps(values))
            temporary.rename(folder / "metrics")
    manager.reload()


def close(manager: ocp.CheckpointManager | None) -> None:
    """Waits until everything is on disk, and closes the manager.

    Raises:
      UserError: a save in the background could not be written.
    """
    if manager is None:
        return
    with _report_write_errors(manager):
        manager.wait_until_finished()
        manager.check_for_errors()
        manager.close()
        folders.empty_deleted(Path(manager.directory))


# Reading -----------------------------------------------------------------------------------------


def restore(manager: ocp.CheckpointManager | None, template: PyTree) -> Checkpoint | None:
    """Returns the newest complete checkpoint, or None if there is none.

    Broken ones are renamed to `broken-<step>`, and one line on stderr says which, why, and which
    step is used instead. Every host calls it, and gets the state that the main one has read.

    Args:
      manager: from `open_manager`.
      template: a tree of arrays; the restored ones have its structure and its placement on devices,
        with several hosts on all of them.

    Raises:
      UserError: the newest complete checkpoint has another format or other arrays than `template`,
        or belongs to another number of processes, each at its own position in the data; or a step
        cannot be read, without a proof that it is broken.
    """
    is_shared = jax.process_count() > 1
    state = template = parallel.to_host(template) if is_shared else template

    def read() -> tuple[int, list[str], dict] | None:
        nonlocal state
        assert manager is not None
        folder = Path(manager.directory)
        content, step, failures = _read_first(
            lambda step_folder: _read_state(step_folder, template),
            folder,
            folders.list_steps(folder),
        )
        for broken_step, failure in failures.items():
            folders.set_aside(folder, broken_step, failure.reason, step)
        if failures:
            manager.reload()
        if step is None:
            return None
        state, positions, config = content
        return step, positions, config

    answer = parallel.ask_main(read)
    if answer is None:
        return None
    step, positions, config = answer
    if is_shared:
        state = parallel.replicate(parallel.broadcast(state))
    data = json.loads(_select_position(positions, step), object_hook=_decode_bytes)
    return Checkpoint(step, state, data, config)


def read_config(folder: str | Path) -> dict:
    """Returns the config of the newest complete checkpoint, and reads nothing else.

    `folder` is the folder of a run, its `checkpoints`, or one step in there.

    Raises:
      UserError: there is no checkpoint, no complete one, or one of another format.
    """
    return _read_newest(folder, lambda step_folder: _read_about(step_folder)["config"])


def load_weights(folder: str | Path) -> dict[str, Any]:
    """Loads what a model needs: params, ema_params, batch_stats, memory, config and step.

    The first four are nested dicts of numpy arrays, empty where the state had none; `ema_params` is
    the moving average of `params`. The optimiser's state is not read, so nothing need be known of
    it.

    Args:
      folder: the folder of a run or its `checkpoints`, for the newest complete step; or one step.

    Raises:
      UserError: there is no checkpoint, no complete one, or one of another format.
    """
    return _read_newest(folder, _read_weights)


def _read_first(
    read: Callable[[Path], Any], folder: Path, steps: list[int]
) -> tuple[Any, int | None, dict[int, Failure]]:
    """Returns what `read` returns for the newest step that it can read, and that step.

    The third value holds the newer ones, which are broken. The first two are None if all are.

    Raises:
      UserError: a step cannot be read, without a proof that it is broken.
    """
    failures: dict[int, Failure] = {}
    for step in reversed(steps):
        content, failure = try_reading(read, folder / str(step))
        if failure is None:
            return content, step, failures
        if not failure.is_proof:
            raise failure.to_error(folder / str(step))
        failures[step] = failure
    return None, None, failures


def _read_about(step_folder: Path) -> dict[str, Any]:
    """Returns the `config` item of a step: format, version, config and checksums.

    Every reader starts here, so that a checkpoint of 0.1 is refused before its parameters or config
    fields, whose names have changed, are compared with today's.
    """
    about = read_json(step_folder / "config/metadata")
    if not isinstance(about, dict):
        raise BrokenError("config/metadata is not what was saved")
    number, version = about.get("format", 1), about.get("version", "unknown")
    if number != FORMAT:
        raise UserError(
            f"checkpoint {step_folder} was written by plan_jax {version} in format {number}, and"
            f" this version reads format {FORMAT}; train again, or use the version that wrote it"
        )
    # The first checkpoints of this format have no checksum of their JSON.
    expected = about.pop("checksum", None)
    if expected not in (None, checksums.json_checksum(about)):
        raise BrokenError("config is not what was saved")
    return about


def _read_state(step_folder: Path, template: PyTree) -> tuple[PyTree, list[str], dict]:
    """Returns the state, the processes' positions in the data, and the config of a step."""
    about, positions = _read_about(step_folder), read_json(step_folder / "data/metadata")
    if about.get("data_checksum") not in (None, checksums.json_checksum(positions)):
        raise BrokenError("data is not what was saved")
    reader = ocp.StandardCheckpointer(multiprocessing_options=MAIN_ONLY)
    metadata = _read_metadata(reader, step_folder)
    if checksums.named_leaves(metadata).keys() != about["checksums"].keys():
        raise BrokenError("state/_METADATA is not what was saved")
    if difference := checksums.describe_difference(metadata, template):
        raise UserError(
            f"checkpoint {step_folder} holds {difference}; use another workdir, or the config that"
            " it was trained with"
        )
    # Orbax checks structure and shapes, but an altered byte in an array passes without an error.
    state = reader.restore(step_folder / "state", template)
    _verify_checksums(state, about["checksums"])
    return state, positions["processes"], about["config"]


def _read_weights(step_folder: Path) -> dict[str, Any]:
    """Returns the parts of a step that are not the optimiser's, with its config and number."""
    about = _read_about(step_folder)
    reader = ocp.PyTreeCheckpointer()
    tree = _read_metadata(reader, step_folder)
    parts = {name: tree[name] for name in WEIGHTS if tree.get(name)}
    # As numpy arrays: the devices that the checkpoint was written from may not exist here.
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), parts)
    # `partial_restore`, because `parts` lacks the leaves of the optimiser.
    args = ocp.args.PyTreeRestore(item=parts, restore_args=restore_args, partial_restore=True)
    weights = reader.restore(step_folder / "state", args=args)
    _verify_checksums(weights, about["checksums"])
    empty: dict[str, Any] = {name: {} for name in WEIGHTS}
    return {**empty, **weights, "config": about["config"], "step": int(step_folder.name)}


def _read_metadata(reader: ocp.Checkpointer, step_folder: Path) -> PyTree:
    """Returns the tree of a step's state, with descriptions of arrays as leaves."""
    metadata = reader.metadata(step_folder / "state").item_metadata
    if metadata is None:  # orbax has logged why
        raise ValueError("the metadata of its arrays cannot be read")
    return metadata.tree


def _read_newest(folder: str | Path, read: Callable[[Path], Any]) -> Any:
    """Applies `read` to the step that `folder` names, else to the newest step it can read.

    The run may be training meanwhile. It then adds steps and deletes others while they are read, so
    a failure counts only if the same steps are there before and after it.
    """
    for _ in range(MAX_READS):
        parent, named_step = locate(folder)
        steps = folders.list_steps(parent)
        try:
            content, step, failures = _read_first(
                read, parent, steps if named_step is None else [named_step]
            )
        except UserError:
            if folders.list_steps(parent) == steps:
                raise
            continue
        if failures and folders.list_steps(parent) != steps:
            continue
        for number, failure in failures.items():
            # Not renamed: whoever only reads leaves the run as it is.
            parallel.print_once(f"checkpoint {number} in {parent} is broken ({failure.reason})")
        if step is None:
            break
        return content
    else:
        raise UserError(
            f"checkpoint {folder} is replaced by its run before it can be read; wait for the end"
            " of the run, or train with a larger checkpoint.keep"
        )
    raise UserError(
        f"checkpoint {folder} has no complete step; train again, or pass another folder"
    )


def _verify_checksums(tree: PyTree, expected: Mapping[str, int]) -> None:
    """Raises BrokenError unless every array is bit for bit what was saved."""
    for name, checksum in checksums.leaf_checksums(tree).items():
        if checksum != expected.get(name):
            raise BrokenError(f"{name} is not what was saved")


def _select_position(positions: list[str], step: int) -> str:
    """Returns this process's position in the data.

    With another number of processes than at the save, all positions must be equal.
    """
    if len(positions) == jax.process_count():
        return positions[jax.process_index()]
    if len(set(positions)) == 1:
        return positions[0]
    raise UserError(
        f"checkpoint {step} was saved by {len(positions)} processes, each at its own position in"
        f" the data, and there are {jax.process_count()} now; resume with {len(positions)}"
    )


# JSON, versions and errors -----------------------------------------------------------------------


def _encode_json(value: Any) -> str:
    def encode(item: Any) -> Any:
        # Grain's iterators return their state as bytes, which JSON cannot hold.
        if isinstance(item, bytes):
            return {"__bytes__": base64.b64encode(item).decode()}
        return item.tolist() if hasattr(item, "tolist") else dict(item)

    return json.dumps(value, default=encode)


def _decode_bytes(item: dict) -> Any:
    return base64.b64decode(item["__bytes__"]) if item.keys() == {"__bytes__"} else item


def _installed_version() -> str:
    try:
        return importlib.metadata.version("plan_jax")
    except importlib.metadata.PackageNotFoundError:  # run from its folder, not installed
        return "unknown"


@contextlib.contextmanager
def _report_write_errors(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Turns any error of a save into a sentence for the user."""
    try:
        with parallel.report_lost_host():  # orbax asks JAX's service for a preemption
            yield
    except UserError:
        raise
    except Exception as error:  # a full disk surfaces as many kinds
        raise UserError(
            f"checkpoint could not be written to {manager.directory} ({first_line(error)});"
            " free the disk or choose another workdir"
        ) from error
