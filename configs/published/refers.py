"""REFERS, published by its authors or by BenchX: a ViT-B/16, images only.

plan-jax --config published/refers
plan-jax --config eval/rsna_linear --checkpoint runs/refers

Put the checkpoint at checkpoints/REFERS.pth, or name it with --config.weights.vision; name on the
hub: youngzhou12/REFERS. Reading it needs torch.

Sources: github.com/funnyzhou/REFERS at df7e83e, Pre-train/refers/modules/VisionTransformer.py and
visual_backbones.py (names and layers) and data/transforms.py (224 pixels, ImageNet's mean and
deviation); github.com/yangzhou12/BenchX at b874fa6, preprocess/model_converters (prefixes).
"""

from ml_collections import ConfigDict

from configs.published.checkpoint import published


def get_config() -> ConfigDict:
    """Returns the checkpoint."""
    config = published(vision={"name": "vit_b16"}, size=224, weights="checkpoints/REFERS.pth")
    config.normalisation = "imagenet"  # the names in the authors' file are those of other ViTs too
    return config
