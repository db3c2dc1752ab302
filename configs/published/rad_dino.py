"""RAD-DINO: DINOv2's ViT-B/14 of 518 pixels, images only.

plan-jax --config published/rad_dino
plan-jax --config eval/rsna_linear --checkpoint runs/rad_dino

It is fetched from the hub: microsoft/rad-dino.

Source: the model's preprocessor_config.json (518 pixels, mean 0.5307 and deviation 0.2583).
Deviation: the whole image is scaled to 518 pixels, instead of the centre of its shorter side.
"""

from ml_collections import ConfigDict

from configs.published.checkpoint import published


def get_config() -> ConfigDict:
    """Returns the checkpoint."""
    return published(vision={"name": "vit_b14"}, size=518, weights="microsoft/rad-dino")
