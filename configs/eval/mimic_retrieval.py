"""MIMIC-CXR, image-text retrieval: recall of the own report, precision by class both ways.

python -m plan_jax.main --config configs/eval/mimic_retrieval.py --checkpoint runs/plan

The manifest is yours to make: `image`, `patient_id`, `split`, `text` and CheXpert's eight label
columns of the 8x200 set; of the first `eval.limit` test images at most 200 of each class, with
exactly one of the labels, are drawn with the run's seed.
"""

from ml_collections import ConfigDict

LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Edema",
    "Fracture",
    "No Finding",
    "Pleural Effusion",
    "Pneumonia",
    "Pneumothorax",
)


def get_config() -> ConfigDict:
    """Return what differs from the run that is evaluated."""
    config = ConfigDict()
    config.data = ConfigDict({"name": "pairs"})
    config.data.builder = ConfigDict(
        {
            "manifest": "mimic_cxr/manifest.csv",
            "size": 256,
            "label_columns": LABELS,
            "label_blank": 0,
        }
    )
    config.eval = ConfigDict({"tasks": ("retrieval",), "split": "test", "limit": 5000})
    config.eval.retrieval = ConfigDict({"classes": LABELS, "cuts": (1, 5, 10, 50, 100)})
    return config
