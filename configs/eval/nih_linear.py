"""NIH ChestX-ray14, linear probe of the 14 findings on 1, 10 and 100 %: ASG's protocol.

plan-jax --config eval/nih_linear --config.data.source=nih --checkpoint runs/plan

The source is the folder as downloaded. The official test list has 25,596 images; the rest is train,
of which a tenth of the patients are val.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, public

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
    return benchmark(
        "classification", public("nih_cxr14"), limit=25_596, options={"labels": LABELS}
    )
