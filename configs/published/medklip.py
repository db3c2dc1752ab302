"""MedKLIP, published by its authors or by BenchX: three stages of a ResNet-50, images only.

plan-jax --config published/medklip
plan-jax --config eval/rsna_linear --checkpoint runs/medklip

Put the checkpoint at checkpoints/MedKLIP.pth, or name it with --config.weights.vision; name on the
hub: youngzhou12/MedKLIP. Reading it needs torch.

Sources: github.com/yangzhou12/BenchX at b874fa6, unifier/models/vlm_src/MedKLIP/models/
model_MedKLIP.py (the children of a ResNet without the last three), and
github.com/MediaBrain-SJTU/MedKLIP at 8e60b03, PreTrain_MedKLIP/dataset/dataset.py (224 pixels,
ImageNet's mean and deviation). Its decoder of queries is not read, so texts cannot be compared.
Deviation: BenchX adds a last stage of random weights; here the third stage is the last.
"""

from ml_collections import ConfigDict

from configs.published.checkpoint import RESNET50, published


def get_config() -> ConfigDict:
    """Returns the checkpoint."""
    vision = {**RESNET50, "widths": (64, 128, 256), "depths": (3, 4, 6)}
    return published(vision=vision, size=224, weights="checkpoints/MedKLIP.pth")
