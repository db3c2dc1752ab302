"""CheXpert's 14 labels, zero-shot by prompts X and no X: CheXzero's protocol.

plan-jax --config eval/chexpert_14 --config.data.source=chexpert --checkpoint runs/plan

The films are those of `chexpert_zero_shot.py`, the labels all 14. The mean leaves out labels that
no test study has; `findings_skipped` counts them.
"""

from ml_collections import ConfigDict

from configs.eval import chexpert_zero_shot
from configs.eval.benchmark import benchmark


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {"scoring": "pair", "validate": True}
    return benchmark(
        "zero_shot", chexpert_zero_shot.DATA, limit=500, prompts="chexzero", options=options
    )
