"""Checkpoints: state, position in the data and config, written by orbax in the background.

`<folder>/<step>/` holds the items `state` (any pytree of arrays), `data` (where each process's data
iterator is) and `config` (beside it the package's version and a checksum of every array). A step
appears when it is whole. Should the disk break one all the same, be it by a single bit, `restore`
sets it aside as `broken-<step>` and walks back to the newest whole one.
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
from plan_jax.checkpoint.folders import FOLDER, attempt, locate, quiet, read_json, short
from plan_jax.types import UserError

__all__ = [
    "FOLDER",
    "Restored",
    "close",
    "fingerprint",
    "locate",
    "open_manager",
    "read_config",
    "restore",
    "restore_params",
    "save",
]
WEIGHTS = ("params", "average", "batch_stats", "memory")


class Restored(NamedTuple):
    """What a checkpoint held: the step, the state, this process's iterator state, the config."""

    step: int
    state: PyTree
    data: Any
    config: dict


def open_manager(
    folder: str | Path, keep: int = 3, best_metric: str | None = None
) -> ocp.CheckpointManager:
    """Open `folder` for writing; it keeps the newest `keep` steps and the best one.

    The best is the step saved with the largest metric `best_metric`; None keeps the newest only.

    Raises:
      UserError: `folder` cannot be made, or is a file.
    """
    folder = Path(folder).absolute()
    kept: list = [policies.LatestN(keep)]
    value = None
    if best_metric is not None:

        def value(metrics: Mapping[str, float]) -> float:
            return folders.finite(metrics.get(best_metric))

        kept.append(
            policies.BestN(get_metric_fn=value, n=1, keep_checkpoints_without_metrics=False)
        )
    options = ocp.CheckpointManagerOptions(
        best_fn=value,
        preservation_policy=policies.AnyPreservationPolicy(kept),
        cleanup_tmp_directories=True,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for step in reversed(folders.steps(folder)):
            if fault := folders.fault(folder / str(step)):
                folders.set_aside(folder, step, fault)
        with quiet():
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
    """Begin to save a step; return when `state` may be overwritten. False if the step is there.

    Args:
      data: what the data iterator's `get_state()` gave, a dict or bytes, of this process.
      config: a nested dict of what JSON can hold.
      metrics: numbers to choose the best step by.

    Raises:
      UserError: this save, or the one before it in the background, could not be written.
    """
    about = {
        "version": _version(),
        "config": json.loads(_to_json(config)),
        "checksums": checksums.by_leaf(state),
    }
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=ocp.args.JsonSave({"processes": parallel.gather_strings(_to_json(data))}),
        config=ocp.args.JsonSave(about),
    )
    numbers = None if metrics is None else {name: float(x) for name, x in metrics.items()}
    with _written(manager), quiet():
        if step in manager.all_steps():
            return False
        return manager.save(step, args=args, metrics=numbers, force=True)


def close(manager: ocp.CheckpointManager) -> None:
    """Wait until everything is on disk, and close.

    Raises:
      UserError: a save in the background could not be written.
    """
    with _written(manager), quiet():
        manager.wait_until_finished()
        manager.check_for_errors()
        manager.close()


def restore(manager: ocp.CheckpointManager, like: PyTree) -> Restored | None:
    """Read the newest whole checkpoint, placed on devices as `like` is; None if there is none.

    A broken one is renamed `broken-<step>`, and one line on stderr says which and why, and which
    one is used instead.

    Raises:
      UserError: the newest whole checkpoint has other arrays than `like`, or belongs to another
        number of processes, each at its own place in the data.
    """
    folder = Path(manager.directory)
    for step in reversed(folders.steps(folder)):
        found, why = attempt(lambda at: _read_all(at, like), folder / str(step))
        if not why:
            state, positions, config = found
            data = json.loads(_mine(positions, step), object_hook=_bytes_back)
            return Restored(step, state, data, config)
        folders.set_aside(folder, step, why)
        manager.reload()
    return None


def read_config(folder: str | Path, step: int | None = None) -> dict:
    """Read the config of the newest whole checkpoint, or of `step`, and nothing else.

    `folder` is a run's folder, its `checkpoints`, or one step in there; so it is for
    `restore_params`.

    Raises:
      UserError: there is no checkpoint, or no whole one.
    """
    folder, step = locate(folder, step)
    return _newest_whole(folder, step, lambda at: read_json(at / "config")["config"])


def restore_params(
    folder: str | Path, step: int | None = None, best: str | None = None
) -> dict[str, Any]:
    """Read what a model needs: params, their moving average, batch_stats, memory, config, step.

    The first four (the second is `average`) come as nested dicts of numpy arrays, empty where the
    state had none; nothing need be known of the optimiser. Without a `step` it is the newest whole
    one, or with `best` the one saved with the largest metric of that name.

    Raises:
      UserError: there is no checkpoint, or no whole one.
    """
    folder, step = locate(folder, step)
    if step is None and best is not None:
        step = folders.best_step(folder, best)
    return _newest_whole(folder, step, _read_weights)


def _read_all(at: Path, like: PyTree) -> tuple[PyTree, list[str], dict]:
    """Read the state, the processes' positions in the data and the config of the folder `at`."""
    about, positions = read_json(at / "config"), read_json(at / "data")["processes"]
    reader = ocp.StandardCheckpointer()
    if differs := checksums.difference(reader.metadata(at / "state").item_metadata.tree, like):
        raise UserError(
            f"checkpoint {at} holds {differs}; use another workdir, or the config it was made with"
        )
    state = reader.restore(at / "state", like)
    _check_sums(state, about["checksums"])
    return state, positions, about["config"]


def _read_weights(at: Path) -> dict[str, Any]:
    """Read the leaves that are not the optimiser's from the step folder `at`."""
    about = read_json(at / "config")
    reader = ocp.PyTreeCheckpointer()
    tree = reader.metadata(at / "state").item_metadata.tree
    wanted = {name: tree[name] for name in WEIGHTS if tree.get(name)}
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
    weights = reader.restore(at / "state", args=args)
    _check_sums(weights, about["checksums"])
    empty: dict[str, Any] = {name: {} for name in WEIGHTS}
    return {**empty, **weights, "config": about["config"], "step": int(at.name)}


def _newest_whole(folder: Path, step: int | None, read: Callable[[Path], Any]) -> Any:
    """Apply `read` to the folder of `step`, or of the newest step that it can read."""
    for at in [step] if step is not None else reversed(folders.steps(folder)):
        found, why = attempt(read, folder / str(at))
        if not why:
            return found
        parallel.print_once(f"checkpoint {at} in {folder} is broken ({why})")
    raise UserError(f"checkpoint {folder} has no whole step; train again, or give another folder")


def _check_sums(tree: PyTree, expected: Mapping[str, int]) -> None:
    """Raise if an array is not bit for bit what was saved."""
    for name, value in checksums.by_leaf(tree).items():
        if value != expected[name]:
            raise ValueError(f"{name} is not what was saved")


def _mine(positions: list[str], step: int) -> str:
    """Choose this process's iterator state; with other processes than before, they must agree."""
    if len(positions) == jax.process_count():
        return positions[jax.process_index()]
    if len(set(positions)) == 1:
        return positions[0]
    raise UserError(
        f"checkpoint {step} was saved by {len(positions)} processes, each at its own place in the"
        f" data, and there are {jax.process_count()} now; resume with {len(positions)}"
    )


def _to_json(value: Any) -> str:
    def other(item: Any) -> Any:
        if isinstance(item, bytes):
            return {"__bytes__": base64.b64encode(item).decode()}
        return item.tolist() if hasattr(item, "tolist") else dict(item)

    return json.dumps(value, default=other)


def _bytes_back(item: dict) -> Any:
    return base64.b64decode(item["__bytes__"]) if item.keys() == {"__bytes__"} else item


def _version() -> str:
    try:
        return importlib.metadata.version("plan_jax")
    except importlib.metadata.PackageNotFoundError:  # run from its folder, not installed
        return "unknown"


@contextlib.contextmanager
def _written(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Turn whatever keeps a checkpoint from the disk into a sentence for the user."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"checkpoint could not be written to {manager.directory} ({short(error)});"
            " free the disk or choose another workdir"
        ) from error
