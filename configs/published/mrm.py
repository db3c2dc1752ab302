"""MRM, published by its authors or by BenchX: a ViT-B/16, images only.

plan-jax --config published/mrm
plan-jax --config eval/rsna_linear --checkpoint runs/mrm

Put the checkpoint at checkpoints/MRM.pth, or name it with --config.weights.vision; name on the hub:
youngzhou12/MRM. Reading it needs torch.

Sources: github.com/RL4M/MRM-pytorch at 3730ba4, model_mrm.py (the ViT has no prefix) and
main_pretrain.py (mean 0.4978 and deviation 0.2449).
Deviation: the vector of an image is the class token; fine-tuning in the code uses the mean of the
patches, with a new norm.
"""

from ml_collections import ConfigDict

from configs.published.checkpoint import published


def get_config() -> ConfigDict:
    """Returns the checkpoint."""
    return published(vision={"name": "vit_b16"}, size=224, weights="checkpoints/MRM.pth")
