"""NIH ChestX-ray14, linear probe of the 14 findings on 1, 10 and 100 %: ASG's protocol.

plan-jax --config eval/nih_linear --checkpoint runs/plan

You create the manifest from Data_Entry_2017_v2020.csv. Its columns are `image`, `patient_id`,
`split` (the official test list has 25,596 images) and `labels`, the findings joined by semicolons.
It is `No Finding` where there is none: an empty cell means that nothing is known.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, manifest

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
    """Returns the benchmark."""
    data = manifest("nih/manifest.csv", findings=LABELS)
    return benchmark("classification", data, limit=25_596, options={"labels": LABELS})
