"""MGCA with a ViT-B/16, published by its authors or by BenchX: both towers and four heads.

plan-jax --config published/mgca_vit
plan-jax --config eval/rsna_zero_shot --checkpoint runs/mgca_vit

Put the checkpoint at checkpoints/MGCA-vit.ckpt, or name it with --config.weights.vision and
--config.weights.text. Sources and deviations are those of `mgca_resnet50.py`; name on the hub:
youngzhou12/MGCA-vit.
"""

from ml_collections import ConfigDict

from configs.published.mgca_resnet50 import get_mgca


def get_config() -> ConfigDict:
    """Returns the checkpoint."""
    return get_mgca({"name": "vit_b16"}, "checkpoints/MGCA-vit.ckpt")
