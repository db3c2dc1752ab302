"""Trains each method in float32 and in bfloat16 for a few steps; prints losses and metrics.

    python tools/compare_dtypes.py --steps 200

Each method is trained on the demo's phantoms and towers (configs/compare.py): in bfloat16 and in
float32 from one seed, and in float32 from another seed, whose difference is that of chance. The
runs follow each other. Finished ones are kept: re-run the same command to resume.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs.compare import METHODS  # noqa: E402
from plan_jax.command.arguments import local_path  # noqa: E402
from plan_jax.logger import read_rows  # noqa: E402
from plan_jax.metrics import headlines, is_number  # noqa: E402
from plan_jax.page.comparison import format_significant, to_markdown  # noqa: E402
from plan_jax.tasks import CATALOGUE  # noqa: E402
from tools.compare import train  # noqa: E402

DIGITS = 3
NUM_LAST_ROWS = 5  # of the log; the loss of a single batch varies


class Kind(NamedTuple):
    """The type that the encoders of a run compute in, and its seed."""

    dtype: str
    seed: int

    @property
    def label(self) -> str:
        """Returns the head of a column."""
        return f"{self.dtype}, seed {self.seed}"


# Float32 first: only the last column depends on what the encoders compute in bfloat16.
KINDS = (Kind("float32", 0), Kind("float32", 1), Kind("bfloat16", 0))


def read_losses(folder: Path) -> dict[str, float]:
    """Returns the means of the loss and its parts over the last rows of a run's log."""
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
    last = rows[-NUM_LAST_ROWS:]
    names = [name for name in last[-1] if name.startswith("loss")] if last else []
    return {name: sum(row[name] for row in last) / len(last) for name in names}


def tabulate(values: Mapping[str, Mapping[Kind, Mapping[str, float]]], name: str) -> str:
    """Returns a Markdown table: a row for each method and value, a column for each kind of run.

    Args:
      values: label of a method -> kind of a run -> name of a value -> the value.
      name: head of the column of names.
    """
    rows = []
    for method, runs in values.items():
        names = list(dict.fromkeys(key for run in runs.values() for key in run))
        for row, key in enumerate(names):
            numbers = [runs.get(kind, {}).get(key) for kind in KINDS]
            cells = ["" if x is None else format_significant(x, DIGITS) for x in numbers]
            rows.append([method if row == 0 else "", key, *cells])
    return to_markdown(["method", name, *(kind.label for kind in KINDS)], rows)


def read_tables(folder: Path, methods: Sequence[str]) -> tuple[str, str]:
    """Returns the tables of losses and of headline metrics of the finished runs in a folder."""
    losses: dict[str, dict[Kind, dict[str, float]]] = {}
    metrics: dict[str, dict[Kind, dict[str, float]]] = {}
    for method in methods:
        for kind in KINDS:
            workdir = run_folder(folder, method, kind)
            if not (workdir / "metrics.json").exists():
                continue
            content: dict[str, Any] = json.loads((workdir / "metrics.json").read_text())
            finite = {key: value for key, value in content.items() if is_number(value)}
            label = METHODS[method]
            losses.setdefault(label, {})[kind] = read_losses(workdir)
            metrics.setdefault(label, {})[kind] = {
                f"{entry.task}: {entry.metric.label}": entry.value
                for entry in headlines(CATALOGUE, finite)
            }
    return tabulate(losses, "loss"), tabulate(metrics, "metric")


def run_folder(folder: Path, method: str, kind: Kind) -> Path:
    """Returns the folder of a run."""
    return folder / f"{method}-{kind.dtype}-{kind.seed}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is missing, then prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=local_path, default="runs/dtypes", help="folder of the runs")
    parser.add_argument(
        "--data", type=local_path, default="data", help="folder of prepared datasets"
    )
    parser.add_argument("--steps", type=int, default=200, help="steps of a run")
    parser.add_argument("--methods", default=",".join(METHODS), help="names in configs/compare.py")
    parser.add_argument("--set", action="append", default=[], help="another override, as batch=8")
    flags = parser.parse_args(arguments)
    folder, methods = Path(flags.runs).absolute(), flags.methods.split(",")
    overrides = [
        f"--config.steps={flags.steps}",
        f"--config.data.dir={Path(flags.data).absolute()}",
        f"--config.parallel.cache={folder / 'programs'}",
        *(f"--config.{override}" for override in flags.set),
    ]
    for kind in KINDS:
        for method in methods:
            of_kind = [f"--config.seed={kind.seed}", f"--config.dtype={kind.dtype}"]
            outcome = train(run_folder(folder, method, kind), method, [*of_kind, *overrides])
            print(f"{method}, {kind.label}: {outcome}", file=sys.stderr, flush=True)
    losses, metrics = read_tables(folder, methods)
    print(f"Means over the last {NUM_LAST_ROWS} logged steps of {flags.steps}:\n\n{losses}")
    print(f"The trained models:\n\n{metrics}", end="")


if __name__ == "__main__":
    main()
