"""Prepared datasets at an address, as gs://bucket/data: fetched once, uploaded when prepared."""

import re
import sys
from pathlib import Path

import jax

from plan_jax.storage import DamagedError, Place, download_folder, list_files, upload_folder
from plan_jax.storage.transfer import CHECKSUMS
from plan_jax.types import UserError

# The file that marks a prepared dataset: TFDS renames the folder when everything is written.
INFO_FILE = "dataset_info.json"


def fetch_records(place: Place, root: Path, key: str, version: str) -> None:
    """Fetches the complete folders of a configuration that `root` lacks, or has otherwise.

    Args:
      place: the data folder at the address.
      root: its copy on this machine.
      key: name and configuration of the dataset, as `phantom/0123456789ab`.
      version: that of the builder.

    Raises:
      UserError: records are damaged, or cannot be read or written.
    """
    pattern = re.compile(rf"({re.escape(key)}(?:-\d+)?/{re.escape(version)})/(.+)")
    folders: dict[str, dict[str, int]] = {}
    for name, size in place.list(key.partition("/")[0]).items():
        if match := pattern.fullmatch(name):
            folders.setdefault(match[1], {})[match[2]] = size
    for name, sizes in folders.items():
        if INFO_FILE not in sizes:  # of an upload that was killed
            continue
        sizes.pop(CHECKSUMS, None)
        local = {file: path.stat().st_size for file, path in list_files(root / name).items()}
        if local == sizes:
            continue
        print(f"fetching {place.address}/{name}", file=sys.stderr, flush=True)
        try:
            download_folder(place, name, root / name)
        except DamagedError as error:
            raise UserError(
                f"the prepared records {place.address}/{name} are damaged ({error}); delete that"
                " folder, and the next run prepares it again"
            ) from None


def upload_records(place: Place, root: Path, folder: Path) -> None:
    """Uploads a prepared dataset unless it is at the address; of several hosts the first one does.

    Raises:
      UserError: it cannot be written.
    """
    name = folder.relative_to(root).as_posix()
    # Asked in this order, since the question for the index starts the accelerator.
    if jax.distributed.is_initialized() and jax.process_index():
        return
    if place.read(f"{name}/{INFO_FILE}") is None:
        print(f"copying {folder} to {place.address}/{name}", file=sys.stderr, flush=True)
        upload_folder(folder, place, name, INFO_FILE)
