"""CheXpert 5x200, zero-shot classification of five classes: GLoRIA's protocol.

plan-jax --config eval/chexpert_5x200 --checkpoint runs/plan

You create the manifest from train.csv, 1,000 rows. Its columns are `image`, `patient_id`, `split`
(test) and the thirteen label columns below, where an empty cell is 0: 200 frontal images of each of
the five classes. A row counts if exactly one of the five is 1 and the other twelve are 0, so an
uncertain label (-1) leaves it out; "No Finding" is not asked. GLoRIA's own list was never
published.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, manifest

CLASSES = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
ABSENT = (
    "Enlarged Cardiomediastinum",
    "Lung Lesion",
    "Lung Opacity",
    "Pneumonia",
    "Pneumothorax",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
DATA = manifest("chexpert_5x200/manifest.csv", label_columns=(*CLASSES, *ABSENT), label_blank=0)


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {"scoring": "max", "kind": "multiclass", "absent": ABSENT}
    return benchmark("zero_shot", DATA, limit=1000, prompts="gloria", options=options)
