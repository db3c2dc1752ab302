"""Builds the configs of this folder: a published checkpoint, which is not trained any further.

Running one converts the checkpoint to a run of plan_jax, without any evaluation. The run is then
evaluated on any benchmark by `--config eval/NAME --checkpoint RUN`.
"""

from ml_collections import ConfigDict

from configs import base

CLINICAL_BERT = "emilyalsentzer/Bio_ClinicalBERT"
RESNET50 = {"name": "resnet50"}
# The text tower of a model that is judged by its image tower alone. It is never used.
NO_TEXT = {"name": "bert_tiny"}


def published(
    *,
    vision: dict[str, object],
    size: int,
    weights: str,
    text: dict[str, object] | None = None,
    text_weights: str = "",
    heads: tuple[str, str, str, str] = ("linear",) * 4,
    embed_dim: int = 64,
    head_hidden_dim: int = 128,
    method: str = "convirt",
    tokenizer: str = "phantom",
    max_tokens: int = 48,
) -> ConfigDict:
    """Returns the config of a checkpoint.

    Args:
      vision: the image tower.
      size: side of the images that the model sees, in pixels.
      weights: where the checkpoint is, see docs/weights.md.
      text: the text tower, None if the checkpoint has none that ours can read.
      text_weights: where the text tower is, if not in the same file.
      heads: the kinds of the heads: image_global, image_local, text_global, text_local.
      embed_dim: width of the shared space.
      head_hidden_dim: width inside the heads.
      method: the method whose scores the model's authors use.
      tokenizer: that of the text tower.
      max_tokens: word pieces of a text with [CLS] and [SEP].
    """
    config = base.get_config()
    config.steps = 0
    config.method = method
    config.batch = 2
    # Phantoms, because a run needs some data. A benchmark replaces them.
    config.data.size = size
    config.data.builder = ConfigDict({"size": size, "train": 4, "val": 2, "test": 2})
    config.data.tokenizer = tokenizer
    config.data.max_tokens = max_tokens
    config.data.max_words = max_tokens - 2
    config.vision = ConfigDict(vision)
    config.text = ConfigDict(text or NO_TEXT)
    names = ("image_global", "image_local", "text_global", "text_local")
    config.heads = ConfigDict(dict(zip(names, heads, strict=True)))
    config.embed_dim = embed_dim
    config.head_hidden_dim = head_hidden_dim
    config.normalisation = "weights"  # the scale that the image tower was trained on
    config.channels = 3
    config.weights.vision = weights
    if text:
        config.weights.text = text_weights or weights
        config.weights.heads = "towers"
    config.optim.freeze = ("vision", "text")  # no moments of the optimiser in the checkpoint
    config.checkpoint.best = ""
    config.eval.tasks = ()
    return config
