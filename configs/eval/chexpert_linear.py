"""CheXpert's five competition labels, linear probe on 1, 10 and 100 %: MGCA's protocol.

plan-jax --config eval/chexpert_linear --checkpoint runs/plan

You create the manifest from train.csv and valid.csv, frontal images only. Its columns are `image`,
`patient_id`, `split` (5,000 of train validate; the 202 of the official valid.csv are the test) and
the label columns as published. An empty cell is 0. An uncertain one becomes what MGCA makes of it.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, manifest

LABELS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
DATA = manifest("chexpert/manifest.csv", label_columns=LABELS, label_blank=0)


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {"labels": LABELS, "uncertain": "mgca"}
    return benchmark("classification", DATA, limit=5000, options=options)
