"""NIH ChestX-ray14, linear probe of the 14 findings at 1, 10 and 100 %: ASG's protocol.

python -m plan_jax.main --config configs/eval/nih_linear.py --checkpoint runs/plan

The manifest is yours to make from Data_Entry_2017_v2020.csv: `image`, `patient_id`, `split` (the
official test list has 25,596 images) and `labels`, the findings joined by semicolons, `No Finding`
where there is none: an empty cell means that nothing is known.
"""

from ml_collections import ConfigDict

LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Effusion",
    "Emphysema",
    "Fibrosis",
    "Hernia",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pleural_Thickening",
    "Pneumonia",
    "Pneumothorax",
)


def get_config() -> ConfigDict:
    """Return what differs from the run that is evaluated."""
    config = ConfigDict()
    config.data = ConfigDict({"name": "pairs"})
    config.data.builder = ConfigDict(
        {
            "manifest": "nih/manifest.csv",
            "text_optional": True,
            "size": 256,
            "findings": LABELS,
        }
    )
    config.eval = ConfigDict({"tasks": ("classification",), "split": "test", "limit": 25_596})
    config.eval.classification = ConfigDict({"labels": LABELS})
    return config
