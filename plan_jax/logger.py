"""What a run says and writes down: progress bar, `metrics.jsonl`, TensorBoard, final metrics.

Every file is appended to line by line or replaced by a rename, so that nothing is lost or
half-written when the process is killed. Only the main process writes.
"""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from plan_jax.types import UserError


class Logger:
    """The log of one run in `folder`; a context manager. With `writes` False it stays silent."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any], step: int = 0, *, writes: bool = True
    ) -> None:
        """Begin, or continue after `step`: rows of later steps, from before a kill, are dropped."""
        self.folder, self.writes, self.started = folder, writes, time.monotonic()
        self.history: list[dict[str, float]] = []
        self.facts: dict[str, float] = {}  # what is known once, for the final metrics
        self.steps, self.batch = config["steps"], config["batch"]
        self.first = step
        self.bar = None
        if not writes:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace(folder / "config.json", json.dumps(config, indent=2, default=list))
        except OSError as error:
            raise UserError(
                f"workdir {folder} cannot be written ({error.strerror}); choose another"
            ) from None
        self.rows = folder / "metrics.jsonl"
        self.history = [row for row in read_rows(self.rows) if row["step"] <= step]
        replace(self.rows, "".join(json.dumps(row) + "\n" for row in self.history))
        from tensorboardX import SummaryWriter  # imported here: evaluation has no need of it

        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> "Logger":
        """Open the progress bar."""
        if self.writes:
            self.bar = tqdm(
                total=self.steps,
                initial=self.first,
                unit="step",
                dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 20.0,
                file=sys.stderr,
            )
        return self

    def __exit__(self, *_: object) -> None:
        """Close everything."""
        if self.bar is not None:
            self.bar.close()
            self.board.close()

    def tick(self) -> None:
        """Count one step on the bar."""
        if self.bar is not None:
            self.bar.update()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row, and show loss and images per second on the bar."""
        if not self.writes:
            return
        row = {"step": step} | {name: float(value) for name, value in values.items()}
        self.history.append(row)
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step":
                self.board.add_scalar(name, value, step)
        if self.bar is not None and "loss" in row:
            shown = f"loss {row['loss']:.3f}"
            if "images_per_s" in row:
                shown += f", {row['images_per_s']:.0f} images/s"
            self.bar.set_postfix_str(shown)

    def say(self, sentence: str) -> None:
        """Print a sentence without breaking the bar."""
        if self.writes:
            tqdm.write(sentence, file=sys.stderr)

    def wall(self) -> float:
        """Give the seconds since the run, or its resumption, began."""
        return time.monotonic() - self.started


def read_rows(path: Path) -> list[dict[str, float]]:
    """Read the rows of a `metrics.jsonl`; a last line cut off by a kill is left out."""
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
