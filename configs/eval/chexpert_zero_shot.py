"""CheXpert, zero-shot by pairs of prompts, X and no X: CheXzero's protocol.

plan-jax --config eval/chexpert_zero_shot --checkpoint runs/plan

The manifest is that of `chexpert_linear.py`.
"""

from ml_collections import ConfigDict

from configs.eval import chexpert_linear
from configs.eval.benchmark import benchmark


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {"scoring": "pair", "validate": True}
    return benchmark(
        "zero_shot", chexpert_linear.DATA, limit=5000, prompts="chexzero", options=options
    )
