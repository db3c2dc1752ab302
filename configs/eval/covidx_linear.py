"""COVIDx, linear probe of three classes on 1, 10 and 100 %: MGCA's protocol, accuracy.

plan-jax --config eval/covidx_linear --config.data.source=covidx --checkpoint runs/plan

The source is the folder of films as downloaded from Kaggle, with COVID-Net's train_COVIDx9A.txt and
test_COVIDx9A.txt. These name films that the folder lacks; `--config.data.builder.max_bad` allows
for them. A fifth of the films of train validates, as in MGCA, and half of those share a patient
with the rest; `--config.data.builder.split=official` divides patients.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, public

CLASSES = ("Normal", "Pneumonia", "COVID-19")
DATA = public("covidx", lists="9A", split="mgca_compat")


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {"labels": CLASSES, "kind": "multiclass"}
    return benchmark("classification", DATA, limit=400, options=options)
