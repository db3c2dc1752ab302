"""RSNA pneumonia, zero-shot: AUROC, and F1 and accuracy at a threshold.

plan-jax --config eval/rsna_zero_shot --config.data.source=rsna --checkpoint runs/plan

Source and split are those of `rsna_linear.py`; the threshold is chosen on val. Prompts are
BioViL's: four phrasings for pneumonia and four against, their embeddings averaged.
"""

from ml_collections import ConfigDict

from configs.eval import rsna_linear
from configs.eval.benchmark import benchmark


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {"ensemble": "embeddings", "validate": True}
    return benchmark("zero_shot", rsna_linear.DATA, limit=4003, prompts="biovil", options=options)
