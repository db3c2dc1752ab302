"""Encoders: image towers, the text tower, and the dual encoder with its projection heads."""

from typing import NamedTuple

from jaxtyping import Array, Float


class ImageOutput(NamedTuple):
    """Output of an image tower for B images, before any projection.

    `pooled` are vectors of whole images and `local` the pixels of the feature map. `fine` is the
    map one stage earlier, with more pixels and a smaller receptive field, or None. `attention` is
    the attention of a ViT's class token to the patches in the last layer, averaged over heads, or
    None. `stages` are all maps from the stem on, finest first; a ViT has one, its patches. The
    heads of downstream tasks use them.
    """

    pooled: Float[Array, "B E"]
    local: Float[Array, "B Y X C"]
    fine: Float[Array, "B V U C"] | None = None
    attention: Float[Array, "B P"] | None = None
    stages: tuple[Float[Array, "B _ _ _"], ...] = ()


class TextOutput(NamedTuple):
    """Output of the text tower for B texts, before any projection.

    `pooled` are vectors of whole texts and `words` are vectors of their words. `attention` is the
    attention of [CLS] to each word in the last layer, averaged over heads and summed over the
    pieces of a word. With attention pooling it is the pooling weight of the word.
    `next_attention` sums the attention to the piece after each piece of a word, [SEP] after the
    last one, as the code of MGCA pairs them. With attention pooling it is None.
    """

    pooled: Float[Array, "B E"]
    words: Float[Array, "B W E"]
    attention: Float[Array, "B W"]
    next_attention: Float[Array, "B W"] | None = None
