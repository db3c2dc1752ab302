"""Lung masks of real radiographs (Cohen et al.'s collection): segmentation with a frozen tower.

python -m plan_jax.main --config configs/eval/covid_cxr_lungs.py --checkpoint runs/demo \
  --config.data.builder.manifest=DIR/manifest.csv

Images arXiv 2006.11988, licences by row; masks V7 Labs, CC BY 4.0. Its split `val` is judged, and
a fifth of the training patients validates.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return what differs from the run that is evaluated."""
    config = ConfigDict()
    config.data = ConfigDict({"name": "pairs"})
    config.data.builder = ConfigDict(
        {
            "manifest": "covid_cxr/manifest.csv",
            "text_optional": True,
            "size": 256,
            "columns": ConfigDict({"anatomy": "lung_mask"}),
            "filters": ConfigDict({"lung_mask": {"not": ("",)}}),
        }
    )
    config.eval = ConfigDict(
        {"tasks": ("segmentation",), "split": "val", "limit": 1000, "random": True}
    )
    config.eval.segmentation = ConfigDict(
        {"targets": ("lungs",), "unet_widths": (64, 32, 16, 8), "learning_rate": 2e-3, "epochs": 30}
    )
    return config
