"""CheXpert 5x200, zero-shot classification of five classes: GLoRIA's protocol.

python -m plan_jax.main --config configs/eval/chexpert_5x200.py --checkpoint runs/plan

You create the manifest from train.csv, 1,000 rows. Its columns are `image`, `patient_id`, `split`
(test) and the five label columns, where an empty cell is 0: 200 frontal images of each class that
have exactly one of the five labels. GLoRIA's own list was never published.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, manifest

LABELS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
DATA = manifest("chexpert_5x200/manifest.csv", label_columns=LABELS, label_blank=0)


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {"scoring": "max", "kind": "multiclass"}
    return benchmark("zero_shot", DATA, limit=1000, prompts="gloria", options=options)
