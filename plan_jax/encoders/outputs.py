"""What towers give: `Seen` of images, `TextOutput` of texts."""

from typing import NamedTuple

from jaxtyping import Array, Float


class ImageOutput(NamedTuple):
    """What a tower sees in B images: pooled vectors and the pixels of its feature map.

    `fine` is the map one stage earlier: more pixels, a smaller field of view; or None. `attention`
    is that of ViT's class token to the patches in the last layer, mean over heads; or None.
    `stages` are all maps from the stem on, finest first (of a ViT only its patches), for the heads
    of downstream tasks.
    """

    pooled: Float[Array, "B E"]
    local: Float[Array, "B Y X C"]
    fine: Float[Array, "B V U C"] | None = None
    attention: Float[Array, "B P"] | None = None
    stages: tuple[Float[Array, "B _ _ _"], ...] = ()


class TextOutput(NamedTuple):
    """What the tower reads in B texts: a vector for the whole and one for each word.

    `attention` is how much the whole attends to each word: of [CLS] in the last layer, mean over
    heads and summed over pieces, or, with attention pooling, the weight of the word.
    """

    pooled: Float[Array, "B E"]
    words: Float[Array, "B W E"]
    attention: Float[Array, "B W"]
