"""Judging a `Model` by the config's tasks: what the data lack first; then numbers, and a page."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from plan_jax import checkpoint, page
from plan_jax import model as assembly
from plan_jax.data import loader, phantom, prompts, report_parser
from plan_jax.data.dataset import Dataset, open_dataset, split_names
from plan_jax.logger import read_rows, write_atomically
from plan_jax.tasks import TASKS, grounding, retrieval, zero_shot
from plan_jax.tasks.catalogue import CATALOGUE, TITLES
from plan_jax.types import Model, Record, Tower, UserError

FITTED = ("classification", "segmentation", "detection", "report_generation")
HELD_OUT = 0.2  # share of the training patients that validate where no split does


class Scored(NamedTuple):
    """Flat metrics (`grounding/cnr_signed`) and the rows that the page shows beside them."""

    metrics: dict[str, float]
    rows: Sequence[Any] = ()


def open_split(config: Mapping[str, Any], split: str) -> Dataset:
    """Open a split of the config's dataset, which is prepared if it is not there yet."""
    data = config["data"]
    return open_dataset(
        data["name"], split, data_dir=data["dir"], cache=data["cache"], **data["builder"]
    )


@dataclasses.dataclass
class EvalData:
    """The records by which a model is judged, read when they are asked for, once."""

    config: Mapping[str, Any]
    split: str

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The split that is judged."""
        return open_split(self.config, self.split)

    @functools.cached_property
    def records(self) -> list[Record]:
        """What is judged: the first `eval.limit` records."""
        return loader.records(
            self.dataset, self.config["eval"]["limit"], self.config["data"]["size"]
        )

    @functools.cached_property
    def train(self) -> list[Record]:
        """What heads are fitted to: the first `eval.train` training records (0: all)."""
        if self.split.partition("[")[0] == "train":
            raise UserError(
                f"eval.split is {self.split}, and heads are fitted to train; use val or test"
            )
        data, count = self.config["data"], self.config["eval"]["train"]
        return loader.records(open_split(self.config, "train"), count or None, data["size"])

    @functools.cached_property
    def validation(self) -> list[Record] | None:
        """The split `val`; None where there is none, or where it is judged."""
        data, held = self.config["data"], self.split.partition("[")[0] == "val"
        known = split_names(data["name"], data_dir=data["dir"], **data["builder"])
        if held or "val" not in known:
            return None
        return loader.records(
            open_split(self.config, "val"), self.config["eval"]["limit"], data["size"]
        )

    @functools.cached_property
    def splits(self) -> dict[str, list[Record]]:
        """What heads are fitted to, `train` and `val`, and the judged records, as `test`.

        Where `val` is missing, or is itself judged, a share of the training patients validates.
        """
        train, val = self.train, self.validation
        if val is None:
            train, val = _held_out(train, self.config["seed"])
        return {"train": train, "val": val, "test": self.records}


def _held_out(
    records: Sequence[Record], seed: int, share: float = HELD_OUT
) -> tuple[list[Record], list[Record]]:
    """Divide records by patient into those to fit and a share to validate, by a seed."""
    names = sorted({record.patient_id for record in records})
    drawn = np.random.default_rng(seed).permutation(names)
    chosen = set(drawn[: max(1, round(share * len(names)))].tolist())
    parts = [[r for r in records if (r.patient_id in chosen) is kept] for kept in (False, True)]
    if not all(parts):
        raise UserError(
            f"{len(names)} patients are too few to fit and to validate; give a split val"
        )
    return parts[0], parts[1]


def options_of(task: str, config: Mapping[str, Any]) -> Any:
    """Make a task's `Options` with those changed that the config's `eval.<task>` names."""
    given = config["eval"].get(task, {})
    plain = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return TASKS[task].Options(**plain)


def open_eval_data(config: Mapping[str, Any], split: str) -> EvalData:
    """Open a split, having checked that it holds what the config's tasks are judged by.

    Raises:
      UserError: naming the field that is missing.
    """
    truth = EvalData(config, split)
    for task in config["eval"]["tasks"]:
        if task in FITTED:
            findings = truth.dataset.findings
            TASKS[task].needs(truth.splits, options_of(task, config), findings)
        else:
            check_truth(task, truth.records, config["data"]["name"])
    return truth


def check_truth(task: str, records: Sequence[Any], dataset: str) -> None:
    """See that the records hold what a task without a head is judged by.

    Raises:
      UserError: naming the field that is missing.
    """
    lacks = {
        "grounding": ("phrases", not any(record.phrases for record in records)),
        "zero_shot": ("labels", not any(len(record.labels) for record in records)),
        "retrieval": ("text", not any(record.text for record in records)),
    }
    field, missing = lacks.get(task, ("", False))
    if missing:
        kept = ", ".join(repr(name) for name in TASKS if name not in (task, *FITTED))
        raise UserError(
            f"task {task} needs {field}, and dataset {dataset} has none; leave it out: "
            f"--config.eval.tasks=({kept})"
        )


def score(
    model: Model, config: Mapping[str, Any], split: str, folder: Path | None = None
) -> Scored:
    """Run the config's tasks on a split; heads that are fitted are kept under `folder`.

    With `eval.random` the tasks that fit a head do so on a tower of random weights too, under
    `<task>/random/`. `<task>/seconds` is what each took.

    Raises:
      UserError: if the dataset lacks what a task needs.
    """
    truth = open_eval_data(config, split)
    metrics: dict[str, float] = {}
    rows: list[Any] = []
    for task in config["eval"]["tasks"]:
        began = time.monotonic()
        run = fitted if task in FITTED else RUNS[task]
        keys = {"task": task, "folder": folder} if task in FITTED else {}
        values, found = run(model, truth, options_of(task, config), **keys)
        if task in FITTED and config["eval"]["random"]:
            system = assembly.build_components(config)
            other = dataclasses.replace(model, tower=_random(system, config))
            beside, _ = fitted(other, truth, options_of(task, config), **keys)
            values |= {f"random/{name}": value for name, value in beside.items()}
        values["seconds"] = time.monotonic() - began
        metrics.update({f"{task}/{name}": float(value) for name, value in values.items()})
        rows += found
    return Scored(metrics, rows)


def _random(system: assembly.Components, config: Mapping[str, Any]) -> Tower:
    return assembly.random_tower(system, config, config["seed"])


Run = Callable[..., tuple[dict[str, float], list[Any]]]


def fitted(
    model: Model, truth: EvalData, options: Any, *, task: str, folder: Path | None
) -> tuple[dict[str, float], list[Any]]:
    """Fit a head to the training split and judge it."""
    extra = {"labeller": labeller(truth.dataset.findings)} if task == "report_generation" else {}
    return TASKS[task].evaluate(
        model,
        truth.splits,
        options=options,
        findings=truth.dataset.findings,
        folder=folder and folder / "fits",
        seed=truth.config["seed"],
        **extra,
    )


def labeller(findings: Sequence[str]) -> Callable[[str], Mapping[str, int]]:
    """Make what reads from a report which of the findings it states, by this project's parser.

    Findings that the parser has no name for are left out; of data without findings all of its own
    are read.
    """
    known = (
        tuple(name for name in findings if report_parser.is_known(name)) or report_parser.FINDINGS
    )
    return lambda text: dict(zip(known, report_parser.tags(text, known).tolist(), strict=True))


def _ground(model: Model, truth: EvalData, options: Any) -> tuple[dict[str, float], list[Any]]:
    config, priors = truth.config, None
    if count := config["eval"]["prior"]:
        known = loader.records(open_split(config, "train"), count, config["data"]["size"])
        priors = grounding.fit_priors(known)
    values, cases = grounding.evaluate(
        model,
        truth.records,
        findings=truth.dataset.findings,
        options=options,
        priors=priors,
        seed=config["seed"],
    )
    return values, grounding.illustrate(model, truth.records, cases, options=options)


def _retrieve(model: Model, truth: EvalData, options: Any) -> tuple[dict[str, float], list[Any]]:
    return retrieval.evaluate(
        model,
        truth.records,
        findings=truth.dataset.findings,
        options=options,
        seed=truth.config["seed"],
    )


def _classify(model: Model, truth: EvalData, options: Any) -> tuple[dict[str, float], list[Any]]:
    validation = truth.validation if options.validate else None
    values = zero_shot.evaluate(
        model,
        truth.records,
        prompts_of(truth),
        findings=truth.dataset.findings,
        validation=validation,
        options=options,
        seed=truth.config["seed"],
    )
    return values, []


RUNS: dict[str, Run] = {"grounding": _ground, "retrieval": _retrieve, "zero_shot": _classify}


def prompts_of(truth: EvalData) -> Mapping[str, tuple[Sequence[str], Sequence[str]]]:
    """Choose prompts: those of `eval.prompts`, the phantoms' own, or the plainest there are."""
    if name := truth.config["eval"]["prompts"]:
        return prompts.SETS[name]()
    if truth.config["data"]["name"] == "phantom":
        return phantom.PROMPTS
    return {f: ([f"there is {f}"], [f"there is no {f}"]) for f in truth.dataset.findings}


def write(
    folder: Path, config: Mapping[str, Any], scored: Scored, history: Sequence[Mapping[str, Any]]
) -> Path:
    """Write `metrics.json`, `table.md` and `report.html` into a folder; return the page."""
    write_atomically(folder / "metrics.json", json.dumps(scored.metrics, indent=2, sort_keys=True))
    write_atomically(folder / "table.md", page.markdown(scored.metrics, CATALOGUE, TITLES))
    return page.write_page(
        folder,
        config=config,
        metrics=scored.metrics,
        catalogue=CATALOGUE,
        titles=TITLES,
        history=history,
        rows=scored.rows,
    )


def evaluate(config: Mapping[str, Any], folder: str | Path, out: Path) -> dict[str, float]:
    """Evaluate a checkpoint by the tasks of a config, and write table and page into `out`.

    Raises:
      UserError: if there is no whole checkpoint, or the data lack what a task needs.
    """
    held = assembly.read(folder)
    model = assembly.make_model(assembly.build_components(config), config, held)
    began = time.monotonic()
    scored = score(model, config, config["eval"]["split"], out)
    metrics = scored.metrics | {
        "steps": float(held["step"]),
        "evaluated_s": time.monotonic() - began,
        "params_sha256": checkpoint.fingerprint(held["params"]),
    }
    out.mkdir(parents=True, exist_ok=True)
    history = read_rows(checkpoint.locate(folder)[0].parent / "metrics.jsonl")
    write(out, config, scored._replace(metrics=metrics), history)
    return metrics
