"""Measures the peak memory of evaluations as records grow: `tools/benchmark.py evaluation`.

Each evaluation reads phantoms in a process of its own, whose peak includes Python, jax, the model
and compilation. Features that a task keeps on purpose are subtracted: those of a linear probe, and
those of the images and reports that retrieval compares.
"""

import dataclasses
import resource
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

COUNTS = (1000, 20000)
TASKS: dict[str, dict[str, Any]] = {
    "classification": {"fractions": (1.0,), "epochs": 1, "bootstrap_samples": 2},
    "retrieval": {"bootstrap_samples": 2, "num_examples": 1},
    "zero_shot": {"bootstrap_samples": 2},
}
HEADER = (
    "| task | records | peak MiB | features MiB | other MiB | against fewest |\n"
    "|---|---|---|---|---|---|"
)


def make_content(content: Mapping[str, Any], task: str, count: int, largest: int) -> dict:
    """Returns the content of the config of one evaluation.

    The phantoms on disk do not depend on `count`. A linear probe reads half of the records to fit
    and half to test.
    """
    share = count // 2 if task == "classification" else count
    evaluation = {
        **content["eval"],
        "tasks": (task,),
        "limit": share,
        "max_fit_records": share,
        "num_prior_records": 0,
        "random_baseline": False,
        task: TASKS[task],
    }
    sizes = {"train": largest // 2, "val": 100, "test": largest}
    data = {**content["data"], "builder": {**content["data"]["builder"], **sizes}}
    return {**content, "data": data, "eval": evaluation}


def prepare(content: Mapping[str, Any]) -> None:
    """Writes the phantoms, unless they are on disk."""
    from plan_jax import evaluate
    from plan_jax.config import Config

    evaluate.open_split(Config.from_dict(content), "test")


def measure(content: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the peak bytes of this process after an evaluation, and those of kept features."""
    from plan_jax import evaluate
    from plan_jax.config import Config

    config = Config.from_dict(content)
    (task,) = config.eval.tasks
    model = make_random_model(config)
    sizes: list[int] = []
    if task == "retrieval":
        model = dataclasses.replace(
            model,
            encode_image=log_sizes(model.encode_image, sizes),
            encode_text=log_sizes(model.encode_text, sizes),
        )
    evaluate.evaluate_model(model, config, "test")
    if task == "classification":
        data = evaluate.open_eval_data(config, "test")
        width = tower_width(config, model)
        sizes += [4 * width * len(getattr(data, split)) for split in ("train", "val", "test")]
    # Linux counts KiB, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, sum(sizes)


def make_random_model(config: Any) -> Any:
    """Returns the model of a config with random weights."""
    import numpy as np

    from plan_jax import model as models
    from plan_jax.data.tokenizer import tokenize_batch
    from plan_jax.state import init_state
    from plan_jax.types import Batch

    components, data = models.build_components(config), config.data
    text = tokenize_batch(components.tokenizer, ["No."] * 2, data.max_tokens, data.max_words)
    batch = Batch(image=np.zeros((2, data.size, data.size, 1), np.uint8), text=text)
    state, _ = init_state(components, config, batch)
    parts = ("params", "batch_stats", "memory")
    return models.make_model(components, config, {name: getattr(state, name) for name in parts})


def log_sizes(encode: Callable[[Any], Any], sizes: list[int]) -> Callable[[Any], Any]:
    """Returns an encoder that appends the bytes of its features to a list."""
    import jax

    def encode_and_log(inputs: Any) -> Any:
        features = encode(inputs)
        sizes.append(sum(leaf.nbytes for leaf in jax.tree.leaves(features)))
        return features

    return encode_and_log


def tower_width(config: Any, model: Any) -> int:
    """Returns the number of values that a linear probe reads of an image."""
    import jax
    import jax.numpy as jnp

    tower, size = model.tower, config.data.size
    images = jax.ShapeDtypeStruct((1, size, size, 1), jnp.uint8)
    stages = jax.eval_shape(lambda x: tower.apply(tower.variables, x)[0], images)
    return stages.pooled.shape[-1]


def run_apart(function: Callable[..., Any], content: Mapping[str, Any]) -> Any:
    """Returns the result of a function in a new process, which ends with it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, content).result()


def main(content: Mapping[str, Any], counts: tuple[int, ...] = COUNTS) -> None:
    """Prints a table of the peak memory of each task at each number of records."""
    run_apart(prepare, make_content(content, "retrieval", counts[0], counts[-1]))
    print(HEADER)
    for task in TASKS:
        fewest = 0.0
        for count in counts:
            peak, kept = run_apart(measure, make_content(content, task, count, counts[-1]))
            other = (peak - kept) / 2**20
            fewest = fewest or other
            row = f"{peak / 2**20:.0f} | {kept / 2**20:.1f} | {other:.0f} | {other / fewest:.2f}"
            print(f"| {task} | {count} | {row} |", flush=True)
