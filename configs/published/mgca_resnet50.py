"""MGCA with a ResNet-50, published by its authors or by BenchX: both towers and four heads.

plan-jax --config published/mgca_resnet50
plan-jax --config eval/rsna_zero_shot --checkpoint runs/mgca_resnet50

Put the checkpoint at checkpoints/MGCA-resnet50.ckpt, or name it with --config.weights.vision and
--config.weights.text. Reading it needs torch.

Sources: github.com/HKU-MedAI/MGCA at 680fe4a, mgca/models/backbones/encoder.py (images resized to
299 in the tower, heads 2048 to 128), bert_config.json (6 layers) and datasets/transforms.py (224 of
256 pixels, mean and deviation 0.5); names on the hub: youngzhou12/MGCA-resnet50.

Deviation: the whole image is scaled to 224 pixels, instead of 224 of 256 from its centre.
Deviation: punctuation stays in texts, which the code removes.
"""

from ml_collections import ConfigDict

from configs.published.checkpoint import CLINICAL_BERT, RESNET50, published


def get_config() -> ConfigDict:
    """Returns the checkpoint."""
    return get_mgca({**RESNET50, "resize": 299}, "checkpoints/MGCA-resnet50.ckpt")


def get_mgca(vision: dict[str, object], weights: str) -> ConfigDict:
    """Returns a checkpoint of MGCA with some image tower."""
    return published(
        vision=vision,
        size=224,
        weights=weights,
        text={"name": "bert_base_6"},
        heads=("mlp",) * 4,
        embed_dim=128,
        head_hidden_dim=2048,
        method="mgca",
        tokenizer=CLINICAL_BERT,
        max_tokens=112,
    )
