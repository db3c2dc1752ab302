"""Evaluations whose numbers do not depend on devices and hosts, for comparisons of them."""

import numpy as np
import optax
from fake_models import FINDINGS, make_model, make_records
from fitted_heads import attach_scalar_head, fit_scalar_head, labelled_images
from task_runs import run_task

from plan_jax.data.report_parser import rewriting
from plan_jax.heads.examples import share_batches
from plan_jax.tasks import grounding, retrieval, zero_shot

PROMPTS = {name: ([f"{name}", f"a {name}"], [f"no {name}"]) for name in FINDINGS}


def evaluate_maps(count=37):
    """Returns features and predictions of some images, and the sums of batches of them."""
    attached = attach_scalar_head("finetune")
    images, _ = labelled_images(count)
    examples = attach_scalar_head().examples(images)
    outputs = attached.predict(attached.params, attached.stats, {"image": images})
    sums = share_batches(lambda rows: {"sum": images[rows].sum((1, 2, 3))}, count, 10)
    return {
        "features": examples["features"],
        "outputs": outputs,
        "sums": np.concatenate([part["sum"] for part in sums]),
    }


def evaluate_fits(folder=None):
    """Returns the results of fits: a head, and a tower with BatchNorm, in batches of two sizes."""
    results = {}
    for mode, batch in (("frozen", 7), ("finetune", 12)):
        result = fit_scalar_head(
            attach_scalar_head(mode),
            epochs=2,
            folder=folder,
            batch=batch,
            stored=mode == "finetune",
            # Adam would amplify the rounding error of a bias before BatchNorm, whose gradient is 0.
            optimiser=optax.sgd,
        )
        results[mode] = {
            "losses": [[epoch["loss"], epoch["score"]] for epoch in result.history],
            "params": result.params,
            "stats": result.stats,
        }
    return results


def evaluate_fake_model():
    """Returns the metrics of a model without parameters, which has random maps and scores."""
    records = make_records(40)
    maps = np.random.default_rng(1).random((997, 8, 8)).astype(np.float32)

    def heat_map(image, text, rounds):
        return maps[sum(map(ord, text)) * 31 % 997] + maps[(sum(image) + (rounds or 0)) % 997]

    def score(image, text):
        return float(maps[sum(map(ord, text)) % 997, 0, 0] * maps[sum(image) % 997, 1, 1])

    model = make_model(heat_map, score, rounds=1)
    splits = {"test": records, "prior_records": records[:10], "prompts": PROMPTS}
    context = {"seed": 3, "find_variants": find_variants}
    options = {
        grounding: grounding.Options(bootstrap_samples=20, crop=0.9),
        retrieval: retrieval.Options(bootstrap_samples=20, classes=FINDINGS, per_class=9),
        zero_shot: zero_shot.Options(bootstrap_samples=20),
    }
    results = {}
    for task, values in options.items():
        metrics, rows = run_task(task, model, splits, values, findings=FINDINGS, **context)
        results[task.__name__] = metrics | {"rows": float(len(rows))}
    return results


def find_variants(report, kind):
    """Returns the false variants of a report."""
    return rewriting.find_variants(report, kind, findings=FINDINGS)
