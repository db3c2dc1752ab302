"""Image towers under torch's names, without torch: names, axes, the files and refusals."""

import json

import numpy as np
import pytest
from published import assert_identical, fill_randomly, publish, tower_template
from safetensors.numpy import load

from plan_jax.encoders.resnet import RESNETS
from plan_jax.encoders.vit import VITS
from plan_jax.types import UserError
from plan_jax.weights import load_tower
from plan_jax.weights.torch_tower import (
    describe_resnet,
    describe_vit,
    encode_tower,
    name_arrays,
    torch_name,
)

RESNET18 = RESNETS["resnet18"] | {"name": "resnet18"}


def encode(trees, sizes, **options):
    """Returns the arrays and the config of a tower."""
    defaults = {"channels": 1, "image_size": 32, "mean_and_std": None}
    files = encode_tower(trees, sizes, **defaults | options)
    return load(files["model.safetensors"]), json.loads(files["config.json"])


@pytest.mark.parametrize("kind", ["resnet", "bottleneck", "vit"])
def test_names_and_axes_are_the_originals(kind):
    trees = fill_randomly(tower_template(kind))
    arrays = name_arrays(trees, "vit" if kind == "vit" else "resnet")
    expected = publish(kind, trees)
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)
        assert arrays[name].dtype == array.dtype and arrays[name].flags.c_contiguous


def test_a_tower_returns_bit_for_bit(tmp_path):
    trees = fill_randomly(tower_template("vit", channels=1, depth=12))
    sizes = VITS["vit_tiny"] | {"name": "vit_tiny", "depth": 12}
    for name, content in encode_tower(
        trees, sizes, channels=1, image_size=32, mean_and_std=(0.0, 1.0)
    ).items():
        (tmp_path / name).write_bytes(content)
    assert_identical(load_tower("vision", str(tmp_path), trees, log=pytest.fail), trees)


def test_the_config_says_how_to_build_and_what_to_feed():
    trees = fill_randomly(tower_template("vit", channels=1))
    arrays, config = encode(trees, VITS["vit_tiny"] | {"name": "vit_tiny", "depth": 2})
    assert arrays["pos_embed"].shape == (1, 17, 16)
    assert config["architecture"] == "vit_tiny_patch16_224" and config["num_classes"] == 0
    assert config["model_args"] == {
        "img_size": 32,
        "in_chans": 1,
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
    }
    assert config["pretrained_cfg"]["input_size"] == [1, 32, 32]
    assert config["pretrained_cfg"]["mean"] == [0.0] and config["pretrained_cfg"]["std"] == [1.0]
    assert "for each image" in config["plan_jax"]["normalise"]
    assert config["plan_jax"]["torchvision_arguments"] is None


@pytest.mark.parametrize("channels", [1, 3])
def test_a_normalisation_has_a_number_for_each_channel(channels):
    trees = fill_randomly(tower_template("vit", channels=channels))
    options = {"channels": channels, "mean_and_std": (0.5, 0.25)}
    _, config = encode(trees, VITS["vit_tiny"] | {"name": "vit_tiny", "depth": 2}, **options)
    assert config["pretrained_cfg"]["mean"] == [0.5] * channels
    assert config["pretrained_cfg"]["std"] == [0.25] * channels
    assert config["plan_jax"]["normalise"] == "(x - mean) / std"


def test_options_of_a_resnet_become_those_of_the_libraries():
    tower = describe_resnet(RESNETS["resnet50"] | {"name": "r", "dilated": 2}, 3)
    assert tower.architecture == "resnet50"
    assert tower.arguments == {"in_chans": 3, "output_stride": 8}
    assert tower.torchvision_arguments == {"replace_stride_with_dilation": [False, True, True]}
    tower = describe_resnet(RESNET18 | {"widths": [64, 128, 256, 512], "pool": "mean_max"}, 1)
    assert tower.arguments == {"in_chans": 1, "global_pool": "catavgmax"}
    assert describe_vit(VITS["vit_b16"], 3, 224).architecture == "vit_base_patch16_224"


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        (RESNETS["resnet_small"] | {"position": True}, "stem patch4"),
        (RESNETS["resnet_small"] | {"position": True}, "a position embedding"),
        (RESNET18 | {"widths": (8, 16, 32, 64)}, r"widths \(8, 16, 32, 64\)"),
        (RESNET18 | {"depths": (1, 1, 1, 1)}, r"depths \(1, 1, 1, 1\)"),
        (RESNET18 | {"dilated": 1}, "1 dilated stages"),
        (RESNETS["resnet50"] | {"dilated": 3}, "3 dilated stages"),
    ],
)
def test_a_tower_that_torch_does_not_have_is_refused_in_a_sentence(sizes, reason):
    with pytest.raises(UserError, match=reason) as error:
        describe_resnet(sizes | {"name": "mine"}, 1)
    assert str(error.value).startswith("image tower mine has ") and "\n" not in str(error.value)


def test_positions_of_another_grid_are_refused():
    trees = fill_randomly(tower_template("vit", channels=1))
    sizes = VITS["vit_tiny"] | {"name": "vit_tiny", "depth": 2}
    with pytest.raises(UserError, match="positions of 16 patches .* 40 pixels have 25.*size to 32"):
        encode(trees, sizes, image_size=40)


def test_an_array_without_a_name_in_torch_is_refused():
    with pytest.raises(UserError, match="params/position"):
        torch_name("params/position", "resnet")
