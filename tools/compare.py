"""Trains the variants of configs/compare.py over several seeds; prints one table, and as a page.

    python tools/compare.py --jobs 2 --seeds 3
    python tools/compare.py --jobs 2 --seeds 1 --variants plan,plan_2,plan_no_gates

Finished runs are kept: re-run the same command to resume. The columns are the headline metrics of
the catalogue that the runs have.
"""

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs.compare import METHODS, STEPS, VARIANTS  # noqa: E402
from plan_jax.logger import write_atomically  # noqa: E402
from plan_jax.metrics import headlines, is_number  # noqa: E402
from plan_jax.page import render_comparison  # noqa: E402
from plan_jax.tasks import CATALOGUE  # noqa: E402

RUN_METRICS = {"images_per_s": "images/s"}  # of a run, not of a task: not in the catalogue
MAX_SEEDS = 99

Metrics = Mapping[str, Any]


def train(folder: Path, variant: str, seed: int, data: str, core: int | None) -> str:
    """Trains and evaluates one variant in its own process; returns how that ended."""
    if (folder / "metrics.json").exists():
        return "finished earlier"
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "plan_jax.main",
        "--config",
        f"configs/compare.py:{variant}",
        f"--config.seed={seed}",
        f"--config.data.dir={data}",
        "--workdir",
        str(folder),
    ]
    environment = dict(os.environ)
    if core is not None:
        # Several runs at a time are fastest with one thread each, on a core of its own.
        xla_flags = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{xla_flags} --xla_cpu_multi_thread_eigen=false".strip()
        command = ["taskset", "-c", str(core), *command]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    if process.returncode:
        return f"failed with exit code {process.returncode}, see {folder / 'log.txt'}"
    return "finished"


def format_significant(value: float, digits: int) -> str:
    """Returns a number with this many significant digits, trailing zeros included.

    >>> format_significant(2.0, 3), format_significant(101.7, 3), format_significant(0.054, 2)
    ('2.00', '102', '0.054')
    """
    return f"{value:#.{digits}g}".rstrip(".")


def format_seeds(values: Sequence[float]) -> str:
    """Returns mean and standard deviation over seeds; of one seed the value, of none nothing.

    >>> format_seeds([1.0, 2.0]), format_seeds([1.0]), format_seeds([])
    ('1.50 ± 0.71', '1.00', '')
    """
    if not values:
        return ""
    mean = format_significant(float(np.mean(values)), 3)
    if len(values) == 1:
        return mean
    return f"{mean} ± {format_significant(float(np.std(values, ddof=1)), 2)}"


def read_runs(folder: Path, variants: Sequence[str]) -> dict[str, list[Metrics]]:
    """Returns the metrics of all finished runs of each variant that has some."""
    runs = {
        variant: [
            json.loads(path.read_text())
            for path in sorted(folder.glob(f"{variant}-*/metrics.json"))
        ]
        for variant in variants
    }
    return {variant: metrics for variant, metrics in runs.items() if metrics}


def column_labels(runs: Mapping[str, Sequence[Metrics]]) -> dict[str, str]:
    """Returns the compared metrics: their keys in the catalogue's order, and their labels."""
    merged = {
        key: value
        for metrics_of_seeds in runs.values()
        for metrics in metrics_of_seeds
        for key, value in metrics.items()
    }
    labels = {entry.key: entry.metric.label for entry in headlines(CATALOGUE, merged)}
    return labels | {key: label for key, label in RUN_METRICS.items() if key in merged}


def table_rows(runs: Mapping[str, Sequence[Metrics]], keys: Sequence[str]) -> list[list[str]]:
    """Returns a row of cells for each variant, and below them one for each null baseline.

    Baselines are those of one run: they depend on the data and not on the model.
    """
    rows = []
    for variant, metrics_of_seeds in runs.items():
        cells = [VARIANTS[variant], str(len(metrics_of_seeds))]
        for key in keys:
            values = [metrics.get(key) for metrics in metrics_of_seeds]
            cells.append(format_seeds([value for value in values if is_number(value)]))
        rows.append(cells)
    if not rows:
        return rows
    *_, (last_run, *_) = runs.values()
    baselines = {entry.key: entry.baselines for entry in headlines(CATALOGUE, last_run)}
    for name in dict.fromkeys(name for nulls in baselines.values() for name in nulls):
        values = [baselines.get(key, {}).get(name) for key in keys]
        cells = ["" if value is None else format_significant(value, 3) for value in values]
        rows.append([name, "", *cells])
    return rows


def to_markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns the rows as a Markdown table.

    >>> print(to_markdown(["variant", "CNR"], [["PLAN", "2.1"]]), end="")
    | variant | CNR |
    | --- | --- |
    | PLAN | 2.1 |
    """
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> None:
    """Trains what is missing, then writes the page and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", default="runs/compare", help="folder of the runs")
    parser.add_argument("--data", default="data", help="folder of prepared datasets")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each if > 1")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each variant")
    parser.add_argument("--variants", default=",".join(METHODS), help="names in configs/compare.py")
    flags = parser.parse_args()
    folder, variants = Path(flags.runs), flags.variants.split(",")
    free_cores = list(range(flags.jobs))

    def run_job(job: tuple[int, str]) -> None:
        seed, variant = job
        core = free_cores.pop() if flags.jobs > 1 else None
        workdir = (folder / f"{variant}-{seed}").absolute()
        outcome = train(workdir, variant, seed, str(Path(flags.data).absolute()), core)
        print(f"{variant}, seed {seed}: {outcome}", file=sys.stderr, flush=True)
        if core is not None:
            free_cores.append(core)

    # Seeds in the outer loop: all variants have a first result before any has a second one.
    jobs = [(seed, variant) for seed in range(flags.seeds) for variant in variants]
    with concurrent.futures.ThreadPoolExecutor(flags.jobs) as pool:
        list(pool.map(run_job, jobs))

    runs = read_runs(folder, variants)
    labels = column_labels(runs)
    columns, rows = ["variant", "seeds", *labels.values()], table_rows(runs, list(labels))
    pages = [f"{variant}-{seed}/report.html" for variant in variants for seed in range(MAX_SEEDS)]
    description = f"{STEPS} steps a run; mean ± standard deviation over seeds."
    links = [path for path in pages if (folder / path).exists()]
    page = render_comparison("Comparison of methods", description, columns, rows, links)
    write_atomically(folder / "report.html", page)
    print(f"{STEPS} steps a run; as a page: {folder / 'report.html'}\n")
    print(to_markdown(columns, rows), end="")


if __name__ == "__main__":
    main()
