"""COVIDx, zero-shot among normal, pneumonia and COVID-19: accuracy and macro F1.

plan-jax --config eval/covidx_zero_shot --config.data.source=covidx --checkpoint runs/plan

Source and split are those of `covidx_linear.py`. No repository publishes its prompts; these are
ours.
"""

from ml_collections import ConfigDict

from configs.eval import covidx_linear
from configs.eval.benchmark import benchmark


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {"scoring": "max", "kind": "multiclass"}
    return benchmark("zero_shot", covidx_linear.DATA, limit=400, prompts="covid", options=options)
