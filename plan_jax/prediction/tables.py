"""Tables of pairs to locate: the columns `image` and `text` of a CSV or JSON Lines file."""

from dataclasses import replace
from pathlib import Path

from plan_jax.data import quoting
from plan_jax.data.pairs import manifest, paths
from plan_jax.data.pairs.cells import get_cell
from plan_jax.prediction.batches import Job
from plan_jax.types import UserError

COLUMNS = ("image", "text")


def read_jobs(table: Path, folder: Path | None = None) -> list[Job]:
    """Returns the jobs of a table, whose rows are numbered from 1.

    Rows of one image form one job, at the place of the first of them.

    Args:
      table: a file that `manifest.read_manifest` reads.
      folder: what paths start from and must not leave; by default the folder of the table.

    Raises:
      UserError: the table cannot be read, or has no such columns.
    """
    rows = manifest.read_manifest(table)
    columns = manifest.match_columns(rows, {}, COLUMNS, COLUMNS)
    root = Path(folder or table.parent).absolute()
    jobs: dict[tuple[str, str, str], Job] = {}
    pairs: dict[tuple[str, str, str], list[tuple[str, int]]] = {}
    for number, row in enumerate(rows, 1):
        text, text_fault = _read_text(get_cell(row, columns["text"]), number)
        path, name, fault = _resolve(root, get_cell(row, columns["image"]), number)
        # An image with two spellings forms two jobs, and each row keeps its own.
        key = path, name, fault or text_fault
        pairs.setdefault(key, []).append((text, number))
        jobs.setdefault(key, Job(path, name, (), (), fault or text_fault))
    return [
        replace(job, texts=[text for text, _ in pairs[key]], rows=[row for _, row in pairs[key]])
        for key, job in jobs.items()
    ]


def _read_text(cell: object, number: int) -> tuple[str, str]:
    """Returns the phrase in a cell, and what is wrong with it, or ""."""
    if cell is None:
        return "", ""  # it has no word, as any other such phrase
    if isinstance(cell, str | int | float):
        return str(cell), ""
    fault = f"the text of row {number} is {quoting.quote(cell)}; write one phrase in each row"
    return "", fault


def _resolve(root: Path, value: object, number: int) -> tuple[str, str, str]:
    """Returns the path in a cell, its name, and what is wrong with it, or ""."""
    try:
        name = paths.read_image_name(value)
        return str(paths.resolve_path(root, name, number)), name, ""
    except UserError as error:
        fault = str(error)
    except ValueError as error:
        fault = f"the image of row {number} {error}; correct that cell"
    return "", "" if value is None else quoting.quote_path(value), fault
