"""RadJEPA: I-JEPA's ViT-B/14 of 224 pixels, images only; an image is the mean of its patches.

plan-jax --config published/radjepa
plan-jax --config eval/rsna_linear --checkpoint runs/radjepa

One file is fetched from the hub: AIDElab-IITBombay/RadJEPA. Reading it needs torch.

Source: arXiv 2601.15891 and the code of I-JEPA, which it was trained with: no class token, no
LayerScale. The scale of the images is I-JEPA's; the file does not tell it.
"""

from ml_collections import ConfigDict

from configs.published.checkpoint import published


def get_config() -> ConfigDict:
    """Returns the checkpoint."""
    config = published(
        vision={"name": "vit_b14", "class_token": False, "layer_scale": 0.0},
        size=224,
        weights="hub:AIDElab-IITBombay/RadJEPA/jepa_encoder.pth.tar",
    )
    config.normalisation = "imagenet"
    return config
