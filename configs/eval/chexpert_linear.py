"""CheXpert's five competition labels, linear probe at 1, 10 and 100 %: MGCA's protocol.

python -m plan_jax.main --config configs/eval/chexpert_linear.py --checkpoint runs/plan

The manifest is yours to make from train.csv and valid.csv, frontal images only: `image`,
`patient_id`, `split` (5,000 of train validate; the 202 of the official valid.csv are the test) and
the label columns as they are; an empty cell is 0, an uncertain one becomes what MGCA makes of it.
"""

from ml_collections import ConfigDict

LABELS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")


def get_config() -> ConfigDict:
    """Return what differs from the run that is evaluated."""
    config = ConfigDict()
    config.data = ConfigDict({"name": "pairs"})
    config.data.builder = ConfigDict(
        {
            "manifest": "chexpert/manifest.csv",
            "text_optional": True,
            "size": 256,
            "label_columns": LABELS,
            "label_blank": 0,
        }
    )
    config.eval = ConfigDict({"tasks": ("classification",), "split": "test", "limit": 5000})
    config.eval.classification = ConfigDict({"labels": LABELS, "uncertain": "mgca"})
    return config
