"""A drive: what is written into the mount reaches the folder beyond it when it is flushed."""

import os
import shutil
from pathlib import Path

_STORAGE = Path(os.environ["PLAN_JAX_STUB_DRIVE"])
_mounts: list[Path] = []


def mount(mountpoint: str, force_remount: bool = False) -> None:
    """Copies the drive to `mountpoint`; mounting twice is harmless, as on Colab."""
    _log("mount")
    path = Path(mountpoint)
    if path in _mounts and not force_remount:
        return
    (_STORAGE / "MyDrive").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(_STORAGE / "MyDrive", path / "MyDrive")
    _mounts.append(path)


def flush_and_unmount(timeout_ms: int = 24 * 60 * 60 * 1000) -> None:
    """Copies the mount back and removes it. What was not flushed is lost, as on Colab."""
    _log("flush_and_unmount")
    while _mounts:
        path = _mounts.pop()
        shutil.rmtree(_STORAGE / "MyDrive")
        shutil.copytree(path / "MyDrive", _STORAGE / "MyDrive")
        shutil.rmtree(path)


def _log(call: str) -> None:
    _STORAGE.mkdir(parents=True, exist_ok=True)
    with (_STORAGE / "calls.txt").open("a") as file:
        file.write(f"{call}\n")
