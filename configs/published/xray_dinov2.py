"""XrayDINOv2: DINOv2's ViT-B/14, trained on radiographs of 224 pixels, images only.

plan-jax --config published/xray_dinov2
plan-jax --config eval/rsna_linear --checkpoint runs/xray_dinov2

It is fetched from the hub: StanfordAIMI/dinov2-base-xray-224. The preprocessor_config.json beside
the weights tells the scale of the images.
"""

from ml_collections import ConfigDict

from configs.published.checkpoint import published


def get_config() -> ConfigDict:
    """Returns the checkpoint."""
    weights = "StanfordAIMI/dinov2-base-xray-224"
    return published(vision={"name": "vit_b14"}, size=224, weights=weights)
