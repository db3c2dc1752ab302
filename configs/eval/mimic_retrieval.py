"""MIMIC-CXR, image-text retrieval: recall of the own report, precision by class both ways.

plan-jax --config eval/mimic_retrieval --checkpoint runs/plan

You create the manifest. Its columns are `image`, `patient_id`, `split`, `text` and CheXpert's eight
label columns of the 8x200 set. Of the first `eval.limit` test images, at most 200 of each class
that have exactly one of the labels are drawn with the run's seed.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, manifest

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
    """Returns the benchmark."""
    data = manifest("mimic_cxr/manifest.csv", has_text=True, label_columns=LABELS, label_blank=0)
    options = {"classes": LABELS, "cuts": (1, 5, 10, 50, 100)}
    return benchmark("retrieval", data, limit=5000, options=options)
