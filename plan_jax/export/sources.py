"""Finds the folder that the name of a trained model means: in the package, or on the hub."""

import os
from pathlib import Path

from plan_jax import parallel
from plan_jax.export import hub
from plan_jax.export.folder import find_replaced, is_model_folder
from plan_jax.types import UserError, check_local

# Longer than any id of the hub with a revision, and shorter than what no file system can store.
MAX_HUB_ID = 240
# Models that come with the package.
BOX = Path(__file__).resolve().parent.parent / "models"


def find_model(source: str | Path) -> Path | None:
    """Returns the model folder that a source names, or None if it names a run or a step of one.

    Args:
      source: a folder; else the name of a model of the package, as `phantom-plan`; else a model on
        the hub, `owner/name` or `owner/name@revision`, which is fetched to its cache.

    Raises:
      UserError: it names nothing, a file or a model of another library, or fetching it failed.
    """
    check_local("checkpoint", source)
    name, path = str(source), Path(source)
    # Unlike those of Path, these raise nothing for a name that is too long.
    if os.path.isdir(name):
        return _check_folder(path)
    if os.path.exists(name):
        raise UserError(f"checkpoint {name} is a file; pass the folder of a run or of a model")
    if old := find_replaced(path):
        parallel.print_once(f"model {name} was being replaced; its old version {old} is used")
        return old
    if name in list_box():
        return BOX / name
    # A mistyped folder of runs is not looked up on the hub: `runs/demo` has the form of a hub id.
    is_hub_id = hub.HUB_ID.fullmatch(name) and len(name) <= MAX_HUB_ID
    if is_hub_id and ("@" in name or not os.path.isdir(path.parent)):
        return hub.fetch_model(name)
    if path.parent.name == "checkpoints":  # a step, perhaps of a run that has others
        return None
    raise UserError(
        f"checkpoint {name} does not exist; pass the folder of a run or of a saved model, a name on"
        f" the hub as owner/name, or one of {', '.join(list_box())}"
    )


def list_box() -> list[str]:
    """Returns the names of the models that come with the package."""
    if not BOX.is_dir():
        return []
    return sorted(path.name for path in BOX.iterdir() if is_model_folder(path))


def _check_folder(folder: Path) -> Path | None:
    """Returns a folder that holds a model, or None for one that may belong to a run."""
    if (folder / "checkpoints").is_dir() or (folder / "state").is_dir():
        return None
    if is_model_folder(folder):
        return folder
    if hub.recognise_library(folder):
        raise UserError(hub.describe_foreign(folder, f"checkpoint {folder}"))
    return None
