"""Files from and to the browser: a download is kept in `downloads` of the drive."""

import os
import shutil
from pathlib import Path


def download(filename: str) -> None:
    """Copies a file to where the test finds it; raises FileNotFoundError as Colab does."""
    folder = Path(os.environ["PLAN_JAX_STUB_DRIVE"], "downloads")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(filename, folder)


def upload() -> dict[str, bytes]:
    """Fails: nobody can choose a file in a test."""
    raise AssertionError("a notebook asks for an upload")
