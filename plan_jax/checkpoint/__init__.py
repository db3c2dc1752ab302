"""Checkpoints: state, position in the data and config, written by orbax in the background.

`<folder>/<step>/` holds three items: `state` (any pytree of arrays), `data` (the position of each
process's data iterator) and `config` (with the format, the version of plan_jax and a checksum of
every array). A step appears under its number once it is complete. If the disk damages a step later,
even by a single bit, `restore` renames it to `broken-<step>` and falls back to the newest complete
one.
"""

import base64
import contextlib
import importlib.metadata
import json
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
from plan_jax.checkpoint.folders import (
    FOLDER,
    first_line,
    locate,
    read_json,
    silence_orbax,
    try_reading,
)
from plan_jax.types import UserError

__all__ = [
    "FOLDER",
    "Checkpoint",
    "close",
    "fingerprint",
    "load_weights",
    "locate",
    "open_manager",
    "read_config",
    "restore",
    "save",
]

# Raised whenever names of parameters or config fields change. Checkpoints of 0.1 have no number.
FORMAT = 2
WEIGHTS = ("params", "ema_params", "batch_stats", "memory")


class Checkpoint(NamedTuple):
    """A restored checkpoint; `data` is the state of this process's data iterator."""

    step: int
    state: PyTree
    data: Any
    config: dict


# Writing -----------------------------------------------------------------------------------------


def open_manager(
    folder: str | Path, keep: int = 3, best_metric: str | None = None
) -> ocp.CheckpointManager:
    """Opens `folder` for writing; broken steps in it are renamed first.

    Args:
      folder: where the steps are; created if it does not exist.
      keep: the number of newest steps that are kept.
      best_metric: the step with the largest value of this metric is kept too; None keeps the newest
        steps only.

    Raises:
      UserError: `folder` cannot be created, or is a file.
    """
    folder = Path(folder).absolute()
    preserved: list = [policies.LatestN(keep)]
    rank: Callable[[Mapping[str, float]], float] | None = None
    if best_metric is not None:

        def rank(metrics: Mapping[str, float]) -> float:
            return folders.rankable(metrics.get(best_metric))

        preserved.append(
            policies.BestN(get_metric_fn=rank, n=1, keep_checkpoints_without_metrics=False)
        )
    options = ocp.CheckpointManagerOptions(
        best_fn=rank,
        preservation_policy=policies.AnyPreservationPolicy(preserved),
        cleanup_tmp_directories=True,  # what a killed save left behind
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Orbax parses the metrics of all steps when it opens the folder, and fails on broken ones.
        for step in reversed(folders.list_steps(folder)):
            if fault := folders.find_fault(folder / str(step)):
                folders.set_aside(folder, step, fault)
        with silence_orbax():
            return ocp.CheckpointManager(folder, options=options)
    except OSError as error:
        raise UserError(
            f"checkpoint folder {folder} cannot be used ({error.strerror or error});"
            " choose another workdir"
        ) from error


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: PyTree,
    data: Any,
    config: Mapping,
    metrics: Mapping[str, float] | None = None,
) -> bool:
    """Starts saving a step, and returns as soon as `state` may be overwritten.

    Args:
      manager: from `open_manager`.
      step: the number of steps taken.
      state: a pytree of arrays.
      data: what `get_state()` of this process's data iterator returned, a dict or bytes.
      config: a nested dict of what JSON can hold.
      metrics: numbers by which the best step is selected.

    Returns:
      False if the step has been saved before, and nothing is written.

    Raises:
      UserError: this save, or the previous one in the background, could not be written.
    """
    # Checksums come first: once orbax has its copy, the next step may donate these arrays.
    about = {
        "format": FORMAT,
        "version": _installed_version(),
        "config": json.loads(_encode_json(config)),
        "checksums": checksums.leaf_checksums(state),
    }
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        # Only the main process writes this item, so it gathers the positions of all.
        data=ocp.args.JsonSave({"processes": parallel.gather_strings(_encode_json(data))}),
        config=ocp.args.JsonSave(about),
    )
    values = None if metrics is None else {name: float(x) for name, x in metrics.items()}
    with _report_write_errors(manager), silence_orbax():
        if step in manager.all_steps():
            return False
        # `force`, because when to save is decided by the caller and not by orbax's policy.
        return manager.save(step, args=args, metrics=values, force=True)


def close(manager: ocp.CheckpointManager) -> None:
    """Waits until everything is on disk, and closes the manager.

    Raises:
      UserError: a save in the background could not be written.
    """
    with _report_write_errors(manager), silence_orbax():
        manager.wait_until_finished()
        manager.check_for_errors()
        manager.close()


# Reading -----------------------------------------------------------------------------------------


def restore(manager: ocp.CheckpointManager, template: PyTree) -> Checkpoint | None:
    """Returns the newest complete checkpoint, or None if there is none.

    A broken one is renamed to `broken-<step>`, and one line on stderr says which, why, and which
    step is used instead.

    Args:
      manager: from `open_manager`.
      template: a tree of arrays; the restored ones have its structure and its placement on devices.

    Raises:
      UserError: the newest complete checkpoint has another format or other arrays than `template`,
        or belongs to another number of processes, each at its own position in the data.
    """
    folder = Path(manager.directory)
    for step in reversed(folders.list_steps(folder)):
        content, reason = try_reading(
            lambda step_folder: _read_state(step_folder, template), folder / str(step)
        )
        if not reason:
            state, positions, config = content
            data = json.loads(_select_position(positions, step), object_hook=_decode_bytes)
            return Checkpoint(step, state, data, config)
        folders.set_aside(folder, step, reason)
        manager.reload()
    return None


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


def _read_about(step_folder: Path) -> dict[str, Any]:
    """Returns the `config` item of a step: format, version, config and checksums.

    Every reader starts here, so that a checkpoint of 0.1 is refused before its parameters or config
    fields, whose names have changed, are compared with today's.
    """
    about = read_json(step_folder / "config")
    number, version = about.get("format", 1), about.get("version", "unknown")
    if number != FORMAT:
        raise UserError(
            f"checkpoint {step_folder} was written by plan_jax {version} in format {number}, and"
            f" this version reads format {FORMAT}; train again, or use the version that wrote it"
        )
    return about


def _read_state(step_folder: Path, template: PyTree) -> tuple[PyTree, list[str], dict]:
    """Returns the state, the processes' positions in the data, and the config of a step."""
    about, positions = _read_about(step_folder), read_json(step_folder / "data")["processes"]
    reader = ocp.StandardCheckpointer()
    metadata = reader.metadata(step_folder / "state").item_metadata.tree
    if difference := checksums.describe_difference(metadata, template):
        raise UserError(
            f"checkpoint {step_folder} holds {difference}; use another workdir, or the config that"
            " it was trained with"
        )
    # Orbax checks structure and shapes, but an altered byte in an array passes without an error.
    state = reader.restore(step_folder / "state", template)
    _verify_checksums(state, about["checksums"])
    return state, positions, about["config"]


def _read_weights(step_folder: Path) -> dict[str, Any]:
    """Returns the parts of a step that are not the optimiser's, with its config and number."""
    about = _read_about(step_folder)
    reader = ocp.PyTreeCheckpointer()
    tree = reader.metadata(step_folder / "state").item_metadata.tree
    parts = {name: tree[name] for name in WEIGHTS if tree.get(name)}
    # As numpy arrays: the devices that the checkpoint was written from may not exist here.
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), parts)
    # `partial_restore`, because `parts` lacks the leaves of the optimiser.
    args = ocp.args.PyTreeRestore(item=parts, restore_args=restore_args, partial_restore=True)
    weights = reader.restore(step_folder / "state", args=args)
    _verify_checksums(weights, about["checksums"])
    empty: dict[str, Any] = {name: {} for name in WEIGHTS}
    return {**empty, **weights, "config": about["config"], "step": int(step_folder.name)}


def _read_newest(folder: str | Path, read: Callable[[Path], Any]) -> Any:
    """Applies `read` to the step that `folder` names, else to the newest step it can read."""
    parent, step = locate(folder)
    for number in [step] if step is not None else reversed(folders.list_steps(parent)):
        content, reason = try_reading(read, parent / str(number))
        if not reason:
            return content
        # Not renamed: whoever only reads leaves the run as it is.
        parallel.print_once(f"checkpoint {number} in {parent} is broken ({reason})")
    raise UserError(
        f"checkpoint {folder} has no complete step; train again, or pass another folder"
    )


def _verify_checksums(tree: PyTree, expected: Mapping[str, int]) -> None:
    """Raises ValueError unless every array is bit for bit what was saved."""
    for name, checksum in checksums.leaf_checksums(tree).items():
        if checksum != expected[name]:
            raise ValueError(f"{name} is not what was saved")


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
        yield
    except Exception as error:  # a full disk surfaces as many kinds
        raise UserError(
            f"checkpoint could not be written to {manager.directory} ({first_line(error)});"
            " free the disk or choose another workdir"
        ) from error
