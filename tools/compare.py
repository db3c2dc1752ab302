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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs.compare import METHODS, STEPS, VARIANTS  # noqa: E402
from plan_jax.command.arguments import local_path  # noqa: E402
from plan_jax.logger import write_atomically  # noqa: E402
from plan_jax.page import render_comparison  # noqa: E402
from plan_jax.page.comparison import compare  # noqa: E402
from plan_jax.tasks import CATALOGUE  # noqa: E402

MAX_SEEDS = 99


def train(folder: Path, variant: str, overrides: Sequence[str], core: int | None = None) -> str:
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
        *overrides,
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


def read_runs(folder: Path, variants: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Returns the metrics of all finished runs of each variant that has some, by its label."""
    runs = {
        VARIANTS[variant]: [
            json.loads(path.read_text())
            for path in sorted(folder.glob(f"{variant}-*/metrics.json"))
        ]
        for variant in variants
    }
    return {label: metrics for label, metrics in runs.items() if metrics}


def main() -> None:
    """Trains what is missing, then writes the page and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--runs", type=local_path, default="runs/compare", help="folder of the runs"
    )
    parser.add_argument(
        "--data", type=local_path, default="data", help="folder of prepared datasets"
    )
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
        overrides = [f"--config.seed={seed}", f"--config.data.dir={Path(flags.data).absolute()}"]
        outcome = train(workdir, variant, overrides, core)
        print(f"{variant}, seed {seed}: {outcome}", file=sys.stderr, flush=True)
        if core is not None:
            free_cores.append(core)

    # Seeds in the outer loop: all variants have a first result before any has a second one.
    jobs = [(seed, variant) for seed in range(flags.seeds) for variant in variants]
    with concurrent.futures.ThreadPoolExecutor(flags.jobs) as pool:
        list(pool.map(run_job, jobs))

    runs = read_runs(folder, variants)
    comparison = compare(runs, CATALOGUE, "variant")
    pages = [f"{variant}-{seed}/report.html" for variant in variants for seed in range(MAX_SEEDS)]
    description = f"{STEPS} steps a run; mean ± standard deviation over seeds."
    links = [path for path in pages if (folder / path).exists()]
    page = render_comparison("Comparison of methods", description, *comparison, links)
    write_atomically(folder / "report.html", page)
    print(f"{STEPS} steps a run; as a page: {folder / 'report.html'}\n")
    print(comparison, end="")


if __name__ == "__main__":
    main()
