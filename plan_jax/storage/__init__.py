"""Folders at an address, as gs://bucket/run, and their copies on this machine.

Everything else in plan_jax reads and writes folders of this machine. A folder at an address has a
local copy, which is fetched before it is used and uploaded when something in it is complete. Only
objects are listed, read, written and deleted, since a bucket has no renames, locks or appends.
"""

from plan_jax.storage.place import Place, cache_folder, cache_root, find_place
from plan_jax.storage.transfer import (
    DamagedError,
    add_files,
    download_folder,
    is_equal,
    list_files,
    upload_files,
    upload_folder,
    wait_for_lock,
)

__all__ = [
    "DamagedError",
    "Place",
    "add_files",
    "cache_folder",
    "cache_root",
    "download_folder",
    "find_place",
    "is_equal",
    "list_files",
    "upload_files",
    "upload_folder",
    "wait_for_lock",
]
