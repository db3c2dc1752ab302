"""MIMIC-CXR 5x200, image-text retrieval by class: precision at 1, 2, 5 and 10, both directions.

plan-jax --config eval/mimic_5x200 --config.data.source=mimic_cxr --checkpoint runs/plan

The rule is that of CheXpert 5x200 on MIMIC-CXR's labels: 200 frontal images of each class in which
one of the five labels is 1, and the other four and the eight others are 0 or blank; a doubt (-1)
leaves an image out, and "No Finding" is not asked. Lists that papers drew from MIMIC-CXR are not
published, so this one is ours: `data.builder.split=5x200` draws it from the official training
split, and leaves the rest of its patients out of training. Train under this rule too; a model that
was trained on the official split has seen most of these images.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, public

CLASSES = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
ABSENT = (
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    data = public("mimic_cxr", split="5x200")
    options = {"classes": CLASSES, "absent": ABSENT, "cuts": (1, 2, 5, 10)}
    return benchmark("retrieval", data, limit=1000, options=options)
