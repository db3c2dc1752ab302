"""The image tower of a model as a model folder of timm's, for PyTorch."""

from plan_jax.encoders.dual_encoder import MEAN_AND_STD
from plan_jax.encoders.resnet import RESNETS
from plan_jax.encoders.vit import VITS
from plan_jax.types import Model
from plan_jax.weights.torch_tower import encode_tower

FOLDER = "image_tower"


def encode_image_tower(model: Model) -> dict[str, bytes]:
    """Returns the files of a model's image tower for PyTorch, by their names in its folder.

    Raises:
      UserError: neither timm nor torchvision can build the tower.
    """
    config = model.config
    assert model.tower is not None, "only a model without parameters has no tower"
    variables = {
        kind: trees["image_tower"] for kind, trees in model.tower.variables.items() if trees
    }
    files = encode_tower(
        variables,
        {**(RESNETS | VITS)[config.vision["name"]], **config.vision},
        channels=config.channels,
        image_size=model.size,
        mean_and_std=MEAN_AND_STD.get(config.normalisation),  # None: each image by itself
    )
    return {f"{FOLDER}/{name}": content for name, content in files.items()}
