"""COVIDx, linear probe of three classes on 1, 10 and 100 %: MGCA's protocol, accuracy.

plan-jax --config eval/covidx_linear --checkpoint runs/plan

You create the manifest from the lists of train and test. Its columns are `image`, `patient_id`,
`split` and `labels`, one of the three classes.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, manifest

CLASSES = ("normal", "pneumonia", "COVID-19")
DATA = manifest("covidx/manifest.csv", findings=CLASSES)


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {"labels": CLASSES, "kind": "multiclass"}
    return benchmark("classification", DATA, limit=10_000, options=options)
