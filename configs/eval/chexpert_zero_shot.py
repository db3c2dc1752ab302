"""CheXpert's five competition labels, zero-shot by prompts X and no X: CheXzero's protocol.

plan-jax --config eval/chexpert_zero_shot --config.data.source=chexpert --checkpoint runs/plan

The source is a folder with the test set that radiologists labelled (test/ and test_labels.csv of
CheXlocalize, or groundtruth.csv) and with valid.csv and valid/, which thresholds are chosen on.
train.csv is not read by this task. Like CheXzero, it takes the film view1 of each of the 500
studies, which for a few is lateral. Without the test set, the 200 studies of valid.csv are test.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, public

LABELS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
DATA = public("chexpert", views="all", first_view=True)


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {"scoring": "pair", "labels": LABELS, "validate": True}
    return benchmark("zero_shot", DATA, limit=500, prompts="chexzero", options=options)
