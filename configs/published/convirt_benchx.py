"""ConVIRT, re-trained by BenchX: both towers and global heads.

plan-jax --config published/convirt_benchx
plan-jax --config eval/rsna_zero_shot --checkpoint runs/convirt_benchx

Put the checkpoint at checkpoints/ConVIRT.pth, or name it with --config.weights.vision and
--config.weights.text; name on the hub: youngzhou12/ConVIRT. Reading it needs torch.

Sources: github.com/yangzhou12/BenchX at b874fa6, unifier/models/vilmedic/ConVIRT.py (BERT's pooler,
heads of two layers), configs/_base_/models/convirt.yml (width 768) and unifier/datasets/
transforms.py (224 pixels, ImageNet's mean and deviation).

BenchX does not say which text tower it trained. ViLMedic's default is a RoBERTa, which loading
refuses; the image tower alone is then `--config.weights.text= --config.weights.heads=`.
"""

from ml_collections import ConfigDict

from configs.published.checkpoint import CLINICAL_BERT, RESNET50, published


def get_config() -> ConfigDict:
    """Returns the checkpoint."""
    return published(
        vision={**RESNET50, "local_stage": 3},  # the map that the global head applies to
        size=224,
        weights="checkpoints/ConVIRT.pth",
        text={"name": "bert_base", "pool": "pooler"},
        heads=("mlp_relu", "shared", "mlp_relu", "shared"),
        embed_dim=768,
        head_hidden_dim=768,
        tokenizer=CLINICAL_BERT,
        max_tokens=128,
    )
