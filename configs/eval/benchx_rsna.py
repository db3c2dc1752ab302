"""RSNA pneumonia, fine-tuning of the whole tower: BenchX's protocol.

plan-jax --config eval/benchx_rsna --config.data.source=rsna --checkpoint runs/plan

The source is that of `rsna_linear.py`. The split is BenchX's (arXiv 2410.21969), in which 2,728 of
the 4,003 test images share an NIH patient with train.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, public

DATA = public("rsna_pneumonia", split="benchx")


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {
        "labels": ("Pneumonia",),
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
    return benchmark("classification", DATA, limit=4003, options=options)
