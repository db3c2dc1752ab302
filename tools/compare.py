"""Trains the variants of configs/compare.py over several seeds; prints one table, and as a page.

    python tools/compare.py --jobs 2 --seeds 3
    python tools/compare.py --jobs 2 --seeds 1 --variants plan,plan_2,plan_no_gates
    python tools/compare.py --jobs 2 --seeds 5 --tune --hard

`--tune` first tunes every method by as many trials, one change at a time, each kept if it raises
the score on validation phantoms. The seed of the trials is that of no final run, and test phantoms
are not read. `--hard` trains and evaluates on hard phantoms. Both have folders of their own in that
of the runs.

Finished runs and trials are kept: re-run the same command to resume. The columns are the headline
metrics of the catalogue that the runs have, and how far PLAN is above each variant: mean ± standard
deviation over seeds, and the 95 % interval of a paired bootstrap over images and seeds.
"""

import argparse
import concurrent.futures
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs import phantom  # noqa: E402
from configs.compare import (  # noqa: E402
    HARD_HYPER,
    LEARNING_RATE_FACTOR,
    METHODS,
    STEPS,
    TUNED,
    VARIANTS,
    get_config,
)
from plan_jax import command  # noqa: E402
from plan_jax.command.arguments import local_path  # noqa: E402
from plan_jax.config import fill_defaults, flatten  # noqa: E402
from plan_jax.logger import encode_json, write_atomically  # noqa: E402
from plan_jax.metrics.intervals import bootstrap_difference_over_seeds, compute_metric  # noqa: E402
from plan_jax.page import render_comparison  # noqa: E402
from plan_jax.page.comparison import Comparison, compare, format_seeds, to_markdown  # noqa: E402
from plan_jax.page.examples import ScoreTable, load_examples  # noqa: E402
from plan_jax.tasks import CATALOGUE  # noqa: E402
from plan_jax.types import UserError  # noqa: E402

MAX_SEEDS = 99
TUNING_SEED = 100  # of no final run
SCORE = (
    "half the signed CNR, in units of that of the finding's mean mask, and half the R@5, mean of"
    " both directions, on validation phantoms"
)
SCORED = (
    "grounding/cnr_signed",
    "grounding/mean_finding/cnr_signed",
    "retrieval/i2t_r5",
    "retrieval/t2i_r5",
)
REFERENCE = "plan"
COMPARED = {"grounding/cnr_signed": "CNR", "grounding/pointing": "pointing"}

Values = dict[str, float]  # of fields of the config, by dotted name


class Trial(NamedTuple):
    """A trial of tuning: what it changes, and its score."""

    values: Values
    score: float


def train(folder: Path, variant: str, overrides: Sequence[str], core: int | None = None) -> str:
    """Trains and evaluates one variant in its own process; returns how that ended."""
    if (folder / "metrics.json").exists():
        return "finished earlier"
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [
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
        arguments = ["taskset", "-c", str(core), *arguments]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.run(arguments, cwd=ROOT, env=environment, stdout=log, stderr=log)
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


def list_settings(method: str) -> dict[str, tuple[float, ...]]:
    """Returns what is tuned of a method: the default, then the other values, by field.

    Raises:
      UserError: it has no constants to tune.
    """
    if method not in TUNED:
        raise UserError(
            f"variant {method} has no constants in TUNED of configs/compare.py; leave it or --tune"
            " out"
        )
    fields = dict(flatten(fill_defaults(get_config(method).to_dict())))
    rate = fields["optim.learning_rate"]
    constants = {f"hyper.{name}": others for name, others in TUNED[method].items()}
    return {"optim.learning_rate": (rate, rate * LEARNING_RATE_FACTOR)} | {
        field: (fields[field], *others) for field, others in constants.items()
    }


def search(
    settings: Mapping[str, Sequence[float]], evaluate: Callable[[Values], float]
) -> tuple[Values, list[Trial]]:
    """Returns the best values and all trials: of the defaults, then of one change at a time.

    Every value but a default is one trial, whatever the scores are.
    """
    best = Trial({}, evaluate({}))
    trials = [best]
    for field, (_, *others) in settings.items():
        for value in others:
            values = best.values | {field: value}
            trials.append(Trial(values, evaluate(values)))
            best = max(best, trials[-1], key=lambda trial: trial.score)  # the first of equal ones
    return best.values, trials


def compute_score(metrics: Mapping[str, Any]) -> float:
    """Returns `SCORE`; minus infinity if one of its metrics is not defined."""
    cnr, scale, *recalls = (metrics[key] for key in SCORED)
    if None in (cnr, scale, *recalls):  # JSON has no NaN: what is undefined is null
        return -math.inf
    return float(cnr / scale + np.mean(recalls)) / 2


def score_trial(workdir: Path) -> float:
    """Returns the score of a trial; minus infinity if it diverged.

    Raises:
      UserError: it has not finished.
    """
    if (workdir / "metrics.json").exists():
        return compute_score(json.loads((workdir / "metrics.json").read_text()))
    log = workdir / "log.txt"
    if log.exists() and "not finite from step" in log.read_text():
        return -math.inf
    raise UserError(f"trial {workdir.name} did not finish, see {log}; re-run the same command")


def describe(values: Mapping[str, float]) -> str:
    """Returns values by the last part of their names.

    >>> describe({"optim.learning_rate": 0.001, "hyper.tau": 0.2})
    'learning_rate=0.001,tau=0.2'
    """
    return ",".join(f"{name.rpartition('.')[2]}={value:g}" for name, value in values.items())


def to_overrides(values: Mapping[str, Any]) -> list[str]:
    """Returns values of fields as arguments of the command line."""
    return [f"--config.{name}={value}" for name, value in values.items()]


def hard_values(variant: str) -> dict[str, Any]:
    """Returns the fields of hard phantoms, and of a method that has to read their long reports."""
    data = phantom.get_config("hard").data
    fields = {"builder.difficulty": data.builder.difficulty}
    fields |= {name: data[name] for name in ("max_tokens", "max_words")}
    hyper = HARD_HYPER.get(variant, {})
    return {f"data.{name}": value for name, value in fields.items()} | {
        f"hyper.{name}": value for name, value in hyper.items()
    }


def save_choices(path: Path, results: Mapping[str, tuple[Values, list[Trial]]]) -> None:
    """Writes what was chosen of each method, and its trials, beside those of other methods.

    Raises:
      UserError: another choice was made before, which finished runs may have.
    """
    stored = json.loads(path.read_text()) if path.exists() else {}
    for method, (choice, trials) in results.items():
        if stored.get(method, {}).get("choice", choice) != choice:
            raise UserError(f"{path} has another choice for {method}; pass another --runs")
        stored[method] = {"choice": choice, "trials": [trial._asdict() for trial in trials]}
    write_atomically(path, encode_json(stored, indent=2))


def tabulate_trials(results: Mapping[str, tuple[Values, list[Trial]]]) -> str:
    """Returns a Markdown table: a row for each trial of each method, and which was chosen."""
    rows = []
    for method, (choice, trials) in results.items():
        defaults = {field: values[0] for field, values in list_settings(method).items()}
        for values, score in trials:
            changes = describe(values) or f"default: {describe(defaults)}"
            cells = [METHODS[method], changes, f"{score:.3f}", "chosen" * (values == choice)]
            rows.append(cells)
    return to_markdown(["method", "trial", "score", ""], rows)


def format_difference(
    first: Sequence[Mapping[str, ScoreTable]], second: Sequence[Mapping[str, ScoreTable]], key: str
) -> str:
    """Returns how far a metric of `second` is above that of `first`, with its interval.

    Element s of both has the scores of seed s. Seeds without the same images in both are left out.
    """
    pairs = [
        (one[key], other[key])
        for one, other in zip(first, second, strict=True)
        if key in one and key in other and np.array_equal(one[key].digests, other[key].digests)
    ]
    if not pairs:
        return ""
    statistic = pairs[0][0].statistic
    differences = [
        compute_metric(other.table, statistic) - compute_metric(one.table, statistic)
        for one, other in pairs
    ]
    tables = (np.stack([scores.table for scores in side]) for side in zip(*pairs, strict=True))
    low, high = bootstrap_difference_over_seeds(*tables, statistic)
    return f"{format_seeds(differences)} [{low:.2f}, {high:.2f}]"


def add_differences(comparison: Comparison, folder: Path, variants: Sequence[str]) -> Comparison:
    """Returns the table with how far PLAN is above each variant, where it is one of them."""
    if REFERENCE not in variants:
        return comparison
    scores = {
        VARIANTS[variant]: [
            load_examples(folder / f"{variant}-{seed}").scores for seed in range(MAX_SEEDS)
        ]
        for variant in variants
    }
    reference = VARIANTS[REFERENCE]
    rows = []
    for label, *cells in comparison.rows:
        is_compared = label in scores and label != reference
        rows.append([label, *cells])
        for key in COMPARED:
            cell = format_difference(scores[label], scores[reference], key) if is_compared else ""
            rows[-1].append(cell)
    heads = [f"PLAN minus it: {name}" for name in COMPARED.values()]
    return Comparison([*comparison.columns, *heads], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Tunes and trains what is missing, then writes the page and prints the tables."""
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
    parser.add_argument("--tune", action="store_true", help="tune each method before")
    parser.add_argument("--tune-steps", type=int, default=STEPS // 2, help="steps of a trial")
    parser.add_argument("--hard", action="store_true", help="hard phantoms")
    flags = parser.parse_args(arguments)
    if flags.seeds > MAX_SEEDS:
        raise UserError(f"--seeds {flags.seeds} is too many; pass at most {MAX_SEEDS}")
    variants = flags.variants.split(",")
    settings = {variant: list_settings(variant) for variant in variants if flags.tune}
    # Runs are found by their folders, so runs of other data or constants have others.
    parts = ["hard"] * flags.hard + [f"tuned-{flags.tune_steps}"] * flags.tune
    folder = Path(flags.runs) / "-".join(parts)
    free_cores = list(range(flags.jobs))

    def run(workdir: Path, variant: str, values: Mapping[str, Any]) -> None:
        core = free_cores.pop() if flags.jobs > 1 else None
        values = {"data.dir": Path(flags.data).absolute(), **values}
        if flags.hard:
            values |= hard_values(variant)
        outcome = train(workdir.absolute(), variant, to_overrides(values), core)
        print(f"{workdir.name}: {outcome}", file=sys.stderr, flush=True)
        if core is not None:
            free_cores.append(core)

    def tune(variant: str) -> tuple[Values, list[Trial]]:
        def evaluate(values: Values) -> float:
            workdir = folder / "trials" / f"{variant}-{describe(values) or 'default'}"
            fixed = {"seed": TUNING_SEED, "steps": flags.tune_steps, "eval.split": "val"}
            run(workdir, variant, values | fixed)
            return score_trial(workdir)

        return search(settings[variant], evaluate)

    def run_seed(job: tuple[int, str]) -> None:
        seed, variant = job
        run(folder / f"{variant}-{seed}", variant, {"seed": seed, **choices.get(variant, {})})

    choices: dict[str, Values] = {}
    with concurrent.futures.ThreadPoolExecutor(flags.jobs) as pool:
        if flags.tune:
            results = dict(zip(variants, pool.map(tune, variants), strict=True))
            save_choices(folder / "tuning.json", results)
            choices = {variant: choice for variant, (choice, _) in results.items()}
            print(f"Trials of {flags.tune_steps} steps; the score is {SCORE}.\n")
            print(tabulate_trials(results), flush=True)
        # Seeds in the outer loop: all variants have a first result before any has a second one.
        jobs = [(seed, variant) for seed in range(flags.seeds) for variant in variants]
        list(pool.map(run_seed, jobs))

    runs = read_runs(folder, variants)
    comparison = add_differences(compare(runs, CATALOGUE, "variant"), folder, variants)
    pages = [f"{variant}-{seed}/report.html" for variant in variants for seed in range(MAX_SEEDS)]
    description = (
        f"{STEPS} steps a run; mean ± standard deviation over seeds, [95 % interval of a paired"
        " bootstrap over images and seeds]."
    )
    links = [path for path in pages if (folder / path).exists()]
    page = render_comparison("Comparison of methods", description, *comparison, links)
    write_atomically(folder / "report.html", page)
    print(f"{STEPS} steps a run; as a page: {folder / 'report.html'}\n")
    print(comparison, end="")


if __name__ == "__main__":
    sys.exit(command.run(main))
