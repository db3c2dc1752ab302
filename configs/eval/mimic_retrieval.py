"""MIMIC-CXR, image-text retrieval: recall of the own report, precision by class both ways.

plan-jax --config eval/mimic_retrieval --config.data.source=mimic_cxr --checkpoint runs/plan

The official test split of MIMIC-CXR: frontal images, impression and findings as the report. The
classes are the eight of CheXpert 8x200, by the labels of CheXpert's labeller, where a blank is 0.
Of the first `eval.limit` images, at most 200 of each class that have exactly one of the labels are
drawn with the run's seed.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, public

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
    data = public("mimic_cxr", label_blank=0)
    options = {"classes": LABELS, "cuts": (1, 5, 10, 50, 100)}
    return benchmark("retrieval", data, limit=5000, options=options)
