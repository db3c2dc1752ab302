"""Executes a notebook as Colab, Kaggle or Jupyter does, and keeps its pictures."""

import base64
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
MOUNT = "/content/drive"  # of Colab, which this machine does not have
TIMEOUT_S = 600


class Executed(NamedTuple):
    """An executed notebook.

    Attributes:
      text: all that it printed, without what a progress bar has overwritten.
      html: all HTML that it shows.
      markdown: all Markdown that it shows.
      pictures: the PNG files that it shows.
      errors: what it shows of each error.
      seconds: the duration.
    """

    text: str
    html: str
    markdown: str
    pictures: list[bytes]
    errors: list[str]
    seconds: float


def execute(
    path: Path, folder: Path, parameters: Mapping[str, Any], *, drive: Path | None = None
) -> Executed:
    """Executes a notebook in `folder` with some parameters, in the package of this checkout.

    The installation cell is replaced, and the parameters come in a cell after those of the
    notebook, as papermill puts them.

    Args:
      path: the notebook.
      folder: the working directory, made if it does not exist.
      parameters: values in place of the notebook's own.
      drive: the folder that stands for Google Drive; None is a machine without Colab.
    """
    notebook = nbformat.read(path, as_version=4)
    _replace_installation(notebook, in_colab=drive is not None)
    _inject(notebook, parameters)
    mount = folder / "content_drive"
    for cell in notebook.cells:
        cell.source = cell.source.replace(MOUNT, str(mount))
    return execute_cells(notebook, folder, drive=drive)


def execute_cells(
    notebook: Any, folder: Path, *, drive: Path | None = None, allow_errors: bool = False
) -> Executed:
    """Executes all cells of a notebook in `folder`, in the package of this checkout."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT_S,
        kernel_name="python3",
        resources={"metadata": {"path": folder}},
        allow_errors=allow_errors,
    )
    try:
        client.execute(env=kernel_environment(drive))
    finally:
        nbformat.write(notebook, folder / "executed.ipynb")
    return _collect(notebook, time.monotonic() - start)


def kernel_environment(drive: Path | None = None) -> dict[str, str]:
    """Returns the environment of a kernel that imports the package of this checkout."""
    paths = [str(ROOT), *([str(Path(__file__).parent / "stub")] if drive else [])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        # `%tensorboard` looks for the program there.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        # As the kernels of Colab and Jupyter set it.
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "HF_HUB_OFFLINE": "1",
        "PLAN_JAX_STUB_DRIVE": str(drive or ""),
    }


def _replace_installation(notebook: Any, *, in_colab: bool) -> None:
    (cell,) = (cell for cell in notebook.cells if "install" in cell.metadata.get("tags", []))
    assert "%pip install" in cell.source
    # Colab's kernel has imported this module before the first cell.
    cell.source = "import google.colab" if in_colab else ""


def _inject(notebook: Any, parameters: Mapping[str, Any]) -> None:
    (index,) = (
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])
    )
    names = set(re.findall(r"^(\w+) = ", notebook.cells[index].source, re.M))
    assert parameters.keys() <= names, f"{parameters.keys() - names} are no parameters"
    source = "".join(f"{name} = {value!r}\n" for name, value in parameters.items())
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(index + 1, cell)


def _collect(notebook: Any, seconds: float) -> Executed:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    errors = ["\n".join(x.traceback) for x in outputs if x.output_type == "error"]
    shown = [output.data for output in outputs if "data" in output]
    return Executed(
        text=re.sub(r"[^\n\r]*\r(?!\n)", "", text),
        html="\n".join(data["text/html"] for data in shown if "text/html" in data),
        markdown="\n".join(data["text/markdown"] for data in shown if "text/markdown" in data),
        pictures=[base64.b64decode(data["image/png"]) for data in shown if "image/png" in data],
        errors=errors,
        seconds=seconds,
    )
