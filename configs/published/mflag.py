"""M-FLAG, re-trained by BenchX: a ResNet-50, CXR-BERT-general as it was, and global heads.

plan-jax --config published/mflag
plan-jax --config eval/rsna_zero_shot --checkpoint runs/mflag

Put the checkpoint at checkpoints/M-FLAG.pth, or name it with --config.weights.vision and
--config.weights.text; name on the hub: youngzhou12/M-FLAG. Reading it needs torch.

Sources: github.com/yangzhou12/BenchX at b874fa6, unifier/models/vlm_src/MFLAG/utils/
utils_builder.py (both towers and heads), and github.com/cheliu-computation/M-FLAG-MICCAI2023 at
a7fea3c, utils/utils_dataset.py (224 pixels, mean and deviation 0.5).
Deviation: texts have at most 128 pieces, where the code allows 512.
"""

from ml_collections import ConfigDict

from configs.published.checkpoint import RESNET50, published


def get_config() -> ConfigDict:
    """Returns the checkpoint."""
    return published(
        vision={**RESNET50, "local_stage": 3},  # the map that the global head applies to
        size=224,
        weights="checkpoints/M-FLAG.pth",
        text={"name": "bert_base"},
        heads=("mlp", "shared", "mlp", "shared"),
        embed_dim=1024,
        head_hidden_dim=2048,
        tokenizer="microsoft/BiomedVLP-CXR-BERT-general",
        max_tokens=128,
    )
