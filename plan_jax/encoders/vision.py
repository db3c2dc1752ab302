"""Image towers by name: each maps images Float[B Y X C] to `Seen`."""

from typing import Any

from flax import linen as nn

from plan_jax.encoders.resnet import RESNETS, ResNet
from plan_jax.encoders.vit import VITS, ViT


def make_image_tower(name: str, axis: str | None, dtype: Any, **changes: Any) -> nn.Module:
    """Make the tower called `name` (a row of RESNETS or VITS), with some of its sizes changed.

    Raises: KeyError for an unknown name, TypeError for an unknown size.
    """
    if name in RESNETS:
        return ResNet(axis=axis, dtype=dtype, **{**RESNETS[name], **changes})
    return ViT(dtype=dtype, **{**VITS[name], **changes})
