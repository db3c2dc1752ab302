"""Lung masks of real radiographs (Cohen et al.'s collection): segmentation with a frozen tower.

plan-jax --config eval/covid_cxr_lungs --checkpoint runs/demo \
  --config.data.builder.manifest=DIR/manifest.csv

Images: arXiv 2006.11988, licences by row. Masks: V7 Labs, CC BY 4.0. The split `val` is evaluated,
so a fifth of the training patients validates.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, manifest


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    data = manifest(
        "covid_cxr/manifest.csv",
        columns={"anatomy": "lung_mask"},
        filters={"lung_mask": {"not": ("",)}},  # rows with a mask
    )
    options = {
        "targets": ("lungs",),
        "unet_widths": (64, 32, 16, 8),
        "learning_rate": 2e-3,
        "epochs": 30,
    }
    return benchmark(
        "segmentation", data, split="val", limit=1000, random_baseline=True, options=options
    )
