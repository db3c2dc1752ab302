"""Train variants of configs/compare.py over several seeds; one table, in Markdown and as a page.

    python tools/compare.py --jobs 2 --seeds 3
    python tools/compare.py --jobs 2 --seeds 1 --variants plan,plan_2,plan_no_gates

A run that is finished is not run again, so the same command continues after an interruption.
"""

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs.compare import METHODS, STEPS, VARIANTS  # noqa: E402
from plan_jax.logger import write_atomically  # noqa: E402
from plan_jax.page import render_comparison  # noqa: E402

COLUMNS = {
    "CNR": "grounding/cnr_signed",
    "pointing": "grounding/pointing",
    "mIoU z": "grounding/miou_z",
    "bare CNR": "grounding/bare/cnr_signed",
    "bare pointing": "grounding/bare/pointing",
    "R@5 i2t": "retrieval/i2t_r5",
    "R@5 t2i": "retrieval/t2i_r5",
    "AUROC": "zero_shot/auroc_macro",
    "images/s": "images_per_s",
}
NULLS = {
    "random map": "random",
    "centre": "centre",
    "mean lung": "prior",
    "mean mask of the finding": "mean_finding",
    "mean mask of the phrase": "mean_phrase",
}


def train(folder: Path, variant: str, seed: int, data: str, core: int | None) -> str:
    """Run one variant with one seed in a process of its own; return how it ended."""
    if (folder / "metrics.json").exists():
        return "was there"
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
    env = dict(os.environ)
    if core is not None:
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
        command = ["taskset", "-c", str(core), *command]
    with (folder / "log.txt").open("w") as log:
        code = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=log).returncode
    return "done" if code == 0 else f"failed with {code}, see {folder / 'log.txt'}"


def shown(value: float, digits: int) -> str:
    """Write a number with so many significant digits, zeros at its end included.

    >>> shown(2.0, 3), shown(101.7, 3), shown(0.054, 2)
    ('2.00', '102', '0.054')
    """
    return f"{value:#.{digits}g}".rstrip(".")


def row(name: str, found: list[dict[str, float]], prefix: str = "") -> list[str]:
    """Make one line of the table: mean and standard deviation over seeds."""
    cells = [name, str(len(found)) if not prefix else ""]
    for key in COLUMNS.values():
        if prefix and key.startswith("grounding/"):
            task, *rest = key.split("/")
            bare = ["bare"] if rest[0] == "bare" else []
            key = "/".join([task, *bare, prefix, rest[-1]])
        elif prefix:
            key = ""
        values = [metrics[key] for metrics in found if key in metrics]
        if not values:
            cells.append("")
        elif prefix or len(values) == 1:
            cells.append(shown(values[0], 3))
        else:
            cells.append(f"{shown(np.mean(values), 3)} ± {shown(np.std(values, ddof=1), 2)}")
    return cells


def rows_of(runs: Path, variants: list[str]) -> list[list[str]]:
    """Gather the metrics of all finished runs into rows, the null maps below."""
    rows, found = [], []
    for variant in variants:
        files = sorted(runs.glob(f"{variant}-*/metrics.json"))
        found = [json.loads(file.read_text()) for file in files] or found
        if files:
            rows.append(row(VARIANTS[variant], found))
    return rows + [row(name, found[:1], prefix) for name, prefix in NULLS.items() if found]


def markdown(rows: list[list[str]]) -> str:
    """Write the rows as a Markdown table."""
    head = [["variant", "seeds", *COLUMNS], ["---"] * (len(COLUMNS) + 2)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in head + rows)


def page(rows: list[list[str]], runs: Path, variants: list[str]) -> str:
    """Returns the rows as a page, with a link to the page of every run."""
    pages = [f"{variant}-{seed}/report.html" for variant in variants for seed in range(99)]
    return render_comparison(
        "Comparison of methods",
        f"{STEPS} steps a run; mean ± standard deviation over seeds.",
        ["variant", "seeds", *COLUMNS],
        rows,
        [path for path in pages if (runs / path).exists()],
    )


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", default="runs/compare", help="folder of the runs")
    parser.add_argument("--data", default="data", help="folder of prepared datasets")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each if > 1")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", default=",".join(METHODS))
    given = parser.parse_args()
    variants = given.variants.split(",")
    cores = list(range(given.jobs))

    def work(job: tuple[int, str]) -> None:
        seed, variant = job
        core = cores.pop() if given.jobs > 1 else None
        folder = (Path(given.runs) / f"{variant}-{seed}").absolute()
        end = train(folder, variant, seed, str(Path(given.data).absolute()), core)
        print(f"{variant}, seed {seed}: {end}", file=sys.stderr, flush=True)
        if core is not None:
            cores.append(core)

    jobs = [(seed, variant) for seed in range(given.seeds) for variant in variants]
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(work, jobs))
    runs = Path(given.runs)
    rows = rows_of(runs, variants)
    write_atomically(runs / "report.html", page(rows, runs, variants))
    print(f"{STEPS} steps a run; as a page: {runs / 'report.html'}\n\n{markdown(rows)}", end="")


if __name__ == "__main__":
    main()
