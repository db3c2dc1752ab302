"""GLoRIA with a ResNet-50, published by its authors or by BenchX: both towers and the image heads.

plan-jax --config published/gloria
plan-jax --config eval/chexpert_5x200 --checkpoint runs/gloria

Put the checkpoint at checkpoints/GLoRIA.ckpt, or name it with --config.weights.vision and
--config.weights.text. The file holds its settings as Python objects, so save its state dict alone
first; the run says how.

Sources: github.com/marshuang80/gloria at 416466a, gloria/models/vision_model.py (images resized to
299 in the tower, a linear layer, and a convolution without bias), text_model.py (sum of the last 4
layers, mean of all slots, no head), gloria_model.py (similarities at test) and
configs/chexpert_pretrain_config.yaml (224 of 256 pixels, mean and deviation 0.5, 97 pieces); name
on the hub: youngzhou12/GLoRIA.

Its authors score by the similarity `both`, so compare `both/accuracy` with their numbers.
A mean over all slots is a mean over the pieces times a positive number, which no cosine sees.
Deviation: the whole image is scaled to 224 pixels, instead of 224 of 256 from its centre.
Deviation: the code counts the characters of a prompt as its words, and so scores [SEP] and padding
too; here the words are scored.
Deviation: punctuation stays in texts, which the code removes.
"""

from ml_collections import ConfigDict

from configs.published.checkpoint import CLINICAL_BERT, RESNET50, published


def get_config() -> ConfigDict:
    """Returns the checkpoint."""
    config = published(
        vision={**RESNET50, "resize": 299},
        size=224,
        weights="checkpoints/GLoRIA.ckpt",
        text={"name": "bert_base", "pool": "mean", "sum_last_layers": 4},
        heads=("linear", "linear", "none", "none"),
        embed_dim=768,
        method="gloria",
        tokenizer=CLINICAL_BERT,
        max_tokens=97,
    )
    config.hyper = ConfigDict({"retrieval_score": "max"})
    return config
