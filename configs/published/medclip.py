"""MedCLIP with a ResNet-50, published by its authors or by BenchX: images only.

plan-jax --config published/medclip
plan-jax --config eval/rsna_linear --checkpoint runs/medclip

Put the checkpoint at checkpoints/MedCLIP-resnet50.bin, or name it with --config.weights.vision.
Reading it needs torch.

Sources: github.com/RyanWangZf/MedCLIP at 9c3396f, medclip/modeling_medclip.py (torchvision's
ResNet, whose last layer is the head), dataset.py (padded to a square, 224 pixels) and constants.py
(mean and deviation). Its text tower averages layers 1, 2 and the last, which ours does not, so it
is not read, and texts cannot be compared. MedCLIP with a Swin transformer is refused.
"""

from ml_collections import ConfigDict

from configs.published.checkpoint import RESNET50, published


def get_config() -> ConfigDict:
    """Returns the checkpoint."""
    return published(vision=RESNET50, size=224, weights="checkpoints/MedCLIP-resnet50.bin")
