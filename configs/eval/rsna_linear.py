"""RSNA pneumonia, linear probe on 1, 10 and 100 % of the labels: MGCA's protocol.

plan-jax --config eval/rsna_linear --checkpoint runs/plan

You create the manifest. Its columns are `image`, `patient_id`, `split` (MGCA: 18,678 / 4,003 /
4,003) and `pneumonia`, which is 1 or 0.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, manifest

DATA = manifest("rsna/manifest.csv", label_columns=("pneumonia",))


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {"labels": ("pneumonia",)}
    return benchmark("classification", DATA, limit=4003, options=options)
