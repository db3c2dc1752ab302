"""Evaluates a model: checks that the data support the tasks, computes metrics, writes the report.

No task is named here. A task is a module that follows `types.Task`; `plan_jax.tasks.TASKS` lists
them, and `config.eval.tasks` selects some.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from plan_jax import checkpoint, page, parallel
from plan_jax import model as models
from plan_jax.config import Config
from plan_jax.data.dataset import Dataset, open_dataset
from plan_jax.data.eval_data import DatasetEvalData, report_labeller
from plan_jax.data.preparation import open_once
from plan_jax.data.report_parser import rewriting
from plan_jax.logger import encode_json, read_rows, write_atomically
from plan_jax.tasks import CATALOGUE, TASKS, TITLES
from plan_jax.types import (
    EvalData,
    ExampleScores,
    Model,
    Result,
    TaskContext,
    UserError,
    check_local,
    read_annotations,
    read_column,
)

# What a user has to provide for a field of `Record`.
_DESCRIPTIONS = {
    "phrases": "phrases with boxes or masks",
    "labels": "labels",
    "text": "report text",
    "anatomy": "anatomy masks",
    "regions": "region boxes",
}


class UnwrittenResults(UserError):
    """Results that could not be written: the sentence, and the metrics to print at least."""

    def __init__(self, sentence: str, metrics: dict[str, Any]) -> None:
        """Stores the metrics with the sentence."""
        super().__init__(sentence)
        self.metrics = metrics


def open_split(config: Config, split: str) -> Dataset:
    """Returns a split of the config's dataset, which is prepared first if it is not on disk yet."""
    data = config.data
    return open_dataset(
        data.name,
        split,
        data_dir=data.dir,
        cache=data.cache,
        fingerprint=data.fingerprint,
        caption=data.caption,
        **data.builder,
    )


def open_eval_data(config: Config, split: str) -> DatasetEvalData:
    """Returns the evaluation data of a split, checked against every selected task.

    Called before training as well, so that a run does not end in data that cannot be evaluated.

    Raises:
      UserError: if the data lack something that a task needs; it names the task and the field.
    """
    settings, evaluation = config.data, config.eval
    data = DatasetEvalData(
        settings.name,
        split,
        size=settings.size,
        data_dir=settings.dir,
        builder=settings.builder,
        cache=settings.cache,
        fingerprint=settings.fingerprint,
        caption=settings.caption,
        limit=evaluation.limit,
        max_fit_records=evaluation.max_fit_records,
        num_prior_records=evaluation.num_prior_records,
        prompt_set=evaluation.prompts,
        seed=config.seed,
    )
    for task in evaluation.tasks:
        options = config.eval.options[task]
        check_requirements(task, data, options)
        TASKS[task].check(data, options)
    return data


def require_same_data(fingerprint: str) -> None:
    """Checks that all hosts have the same data, each in its own place.

    Raises:
      UserError: two differ; in every host.
    """
    if difference := parallel.find_difference(fingerprint):
        raise UserError(
            "{} has data of fingerprint {}, and {} of {}; give all hosts the same files".format(
                *difference
            )
        )


def check_requirements(task: str, data: EvalData, options: Any) -> None:
    """Raises UserError if no evaluated record has a field of `Record` that a task needs."""
    for field in TASKS[task].requirements(options):
        # One record is enough: a field may be empty where nothing is known or present.
        values: Iterable[Any]
        if field in ("labels", "text"):
            values = read_column(data.test, field)
        else:
            values = (getattr(record, field) for record in read_annotations(data.test))
        if not any(len(value.strip() if field == "text" else value) for value in values):
            caption = data.caption if field == "text" and isinstance(data, DatasetEvalData) else ""
            remedy = "choose another config.data.caption" if caption else "add them to the data"
            raise UserError(
                f"task {task} needs {_DESCRIPTIONS[field]}, and no evaluated record of dataset "
                f"{data.name} has any{f' under caption rule {caption}' if caption else ''}; "
                f"{remedy}, or leave {task} out of config.eval.tasks"
            )


def evaluate_model(
    model: Model,
    config: Config,
    split: str,
    folder: Path | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> Result:
    """Returns the metrics `<task>/...` of all selected tasks on a split, and their examples.

    All devices of `parallel.devices` take part, and all hosts share the records: every host calls
    this, and has the same result. Fitted heads are saved under `folder`, so that an interrupted
    evaluation resumes. With
    `eval.random_baseline`, tasks that fit a head also fit it to a tower of random weights, under
    `<task>/random/...`. `<task>/seconds` is the duration of a task. `check_stop` is called before
    each task and after each epoch of a fit, and ends the evaluation by an exception.

    Raises:
      UserError: see `open_eval_data` and `require_same_data`.
    """
    data = open_eval_data(config, split)
    # Hosts with other records would wait for each other, or join parts of different data.
    require_same_data(data.dataset.fingerprint)
    context = TaskContext(
        seed=config.seed,
        folder=folder and folder / "fits",
        label_report=report_labeller(data.findings),
        find_variants=partial(rewriting.find_variants, findings=tuple(data.findings)),
        check_stop=check_stop,
    )
    metrics: dict[str, float] = {}
    examples: list[Any] = []
    scores: dict[str, ExampleScores] = {}
    with parallel.use_devices(config.parallel.devices):
        for name in config.eval.tasks:
            check_stop()
            task, options = TASKS[name], config.eval.options[name]
            start = time.monotonic()
            result = task.evaluate(model, data, options, context)
            values = dict(result.metrics)
            if task.FITS_HEAD and config.eval.random_baseline:
                # The same options and seed, so that only the weights of the tower differ.
                baseline = task.evaluate(_with_random_tower(model, config), data, options, context)
                values |= {f"random/{key}": value for key, value in baseline.metrics.items()}
            values["seconds"] = time.monotonic() - start
            metrics |= {f"{name}/{key}": float(value) for key, value in values.items()}
            examples += result.rows
            scores |= {f"{name}/{key}": value for key, value in result.scores.items()}
    return Result(metrics, examples, scores)


def _with_random_tower(model: Model, config: Config) -> Model:
    """Returns the model with an image tower of random weights: what a head learns without it."""
    components = models.build_components(config)
    tower = models.random_tower(components, config.data.size, config.seed)
    return dataclasses.replace(model, tower=tower)


def write_results(
    folder: Path, config: Config, result: Result, history: Sequence[Mapping[str, Any]]
) -> Path:
    """Writes metrics, table, scores of single examples and the page into a folder.

    The files are `metrics.json`, `table.md`, `examples.npz` and `report.html`.

    Returns:
      The path of the page.

    Raises:
      UnwrittenResults: one of them cannot be written.
    """
    metrics = dict(result.metrics)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "metrics.json", encode_json(metrics, indent=2, sort_keys=True))
        write_atomically(folder / "table.md", page.markdown(metrics, CATALOGUE, TITLES))
        data = f"{config.data.name}, {config.eval.split}"
        options = {
            task: dataclasses.asdict(config.eval.options[task]) | {"size": config.data.size}
            for task in config.eval.tasks
        }
        page.save_examples(folder, data, result.scores, result.rows, options)
        return page.write_page(
            folder,
            config=config.to_dict(),
            metrics=metrics,
            catalogue=CATALOGUE,
            titles=TITLES,
            history=history,
            rows=result.rows,
        )
    except UserError as error:  # what the system says
        raise UnwrittenResults(str(error), metrics) from error
    except Exception as error:  # the metrics are worth more than any picture
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UnwrittenResults(
            f"{folder / 'report.html'} could not be made ({reason[:200]}); the metrics are in"
            f" {folder / 'metrics.json'}",
            metrics,
        ) from error


@open_once()
def evaluate_checkpoint(config: Config, folder: str | Path, out: Path) -> dict[str, Any]:
    """Evaluates a checkpoint or a saved model by a config's tasks, and writes the results to `out`.

    Raises:
      UserError: if there is no complete checkpoint, or the data lack what a task needs.
    """
    check_local("folder", out)
    weights = models.load_variables(folder)
    params_sha256 = checkpoint.fingerprint(weights["params"])
    require_same_weights(int(weights["step"]), params_sha256)
    # The page shows the training curves of the run, which a saved model does not have.
    history = read_rows(weights["source"] / "metrics.jsonl")
    model = models.make_model(models.build_components(config), config, weights)
    start = time.monotonic()
    result = evaluate_model(model, config, config.eval.split, out)
    metrics: dict[str, Any] = result.metrics | {
        "steps": float(weights["step"]),
        "evaluated_s": time.monotonic() - start,
        "params_sha256": params_sha256,
    }
    try:
        if parallel.is_main():
            write_results(out, config, dataclasses.replace(result, metrics=metrics), history)
    finally:
        parallel.barrier("evaluated")
    return metrics


def require_same_weights(step: int, params_sha256: str) -> None:
    """Checks that all hosts evaluate the same weights: a run may save while they read the newest.

    Raises:
      UserError: two differ; in every host.
    """
    if difference := parallel.find_difference(f"step {step} ({params_sha256[:12]})"):
        raise UserError(
            "{} has read {} of the checkpoint, and {} {}; pass one step as --checkpoint, or wait"
            " for the end of its run".format(*difference)
        )


def compare_runs(runs: Mapping[str, str | Path]) -> page.Comparison:
    """Compares finished runs, or evaluations, by their headline metrics beside the null baselines.

        compare_runs({"ConVIRT": "runs/convirt", "PLAN": "runs/plan"})

    Args:
      runs: the folders that hold `metrics.json`, by their label in the table.

    Raises:
      UserError: a folder has no metrics.
    """
    metrics: dict[str, list[dict[str, Any]]] = {}
    for label, folder in runs.items():
        path = Path(folder) / "metrics.json"
        try:
            metrics[label] = [json.loads(path.read_bytes())]
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not JSON"
            raise UserError(
                f"{path} cannot be read ({reason}); pass the folder of a run that has ended"
            ) from None
    return page.compare(metrics, CATALOGUE)
