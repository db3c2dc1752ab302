"""RSNA pneumonia, linear probe on 1, 10 and 100 % of the labels: MGCA's protocol.

plan-jax --config eval/rsna_linear --config.data.source=rsna --checkpoint runs/plan

The source is the folder as downloaded from Kaggle. The split is MGCA's, 18,678 / 4,003 / 4,003
images, in which 2,749 of the test images share an NIH patient with train. With RSNA's file of NIH
names in the folder, `--config.data.builder.split=hash` divides patients.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, public

DATA = public("rsna_pneumonia", split="mgca_compat")


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {"labels": ("Pneumonia",)}
    return benchmark("classification", DATA, limit=4003, options=options)
