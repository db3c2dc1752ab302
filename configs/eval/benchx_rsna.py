"""RSNA pneumonia, fine-tuning of the whole tower: BenchX's protocol.

plan-jax --config eval/benchx_rsna --checkpoint runs/plan

The manifest is that of `rsna_linear.py`, with BenchX's split (arXiv 2410.21969).
"""

from ml_collections import ConfigDict

from configs.eval import rsna_linear
from configs.eval.benchmark import benchmark


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {
        "labels": ("pneumonia",),
        "mode": "finetune",
        "learning_rate": 1e-4,
        "weight_decay": 1e-5,
        "schedule": "cosine",
        "warmup_steps": 50,
        "decay_steps": 3000,
        "clip_norm": 1.0,
        "batch": 64,
        "epochs": 200,
    }
    return benchmark("classification", rsna_linear.DATA, limit=4003, options=options)
