"""CheXpert 5x200: zero-shot classification of five classes by GLoRIA's way.

python -m plan_jax.main --config configs/eval/chexpert_5x200.py --checkpoint runs/plan

The manifest is yours to make from train.csv, 1,000 rows: `image`, `patient_id`, `split` (test) and
the five label columns, an empty cell being 0: 200 frontal images of each class that have exactly
one of the five labels. GLoRIA's own list was never published.
"""

from ml_collections import ConfigDict

LABELS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")


def get_config() -> ConfigDict:
    """Return what differs from the run that is evaluated."""
    config = ConfigDict()
    config.data = ConfigDict({"name": "pairs"})
    config.data.builder = ConfigDict(
        {
            "manifest": "chexpert_5x200/manifest.csv",
            "text_optional": True,
            "size": 256,
            "label_columns": LABELS,
            "label_blank": 0,
        }
    )
    config.eval = ConfigDict(
        {"tasks": ("zero_shot",), "split": "test", "limit": 1000, "prompts": "gloria"}
    )
    config.eval.zero_shot = ConfigDict({"scoring": "max", "kind": "multiclass"})
    return config
