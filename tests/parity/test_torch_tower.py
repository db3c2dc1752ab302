"""Image towers under torch's names: in torchvision and timm, and back, with equal features."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from published import assert_identical
from safetensors.torch import load_file

from plan_jax.encoders.dual_encoder import make_image_tower
from plan_jax.encoders.resnet import RESNETS
from plan_jax.encoders.vit import VITS
from plan_jax.layers.resize import resize_align_corners
from plan_jax.weights import load_tower
from plan_jax.weights.torch_tower import encode_tower

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TOLERANCE = 1e-4  # relative to the largest entry


def draw_tower(name, size, channels, **options):
    """Returns a tower, its variables and its sizes; its vectors are not exact zeros and ones."""
    tower = make_image_tower(name, None, jnp.float32, **options)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(tower.init, jax.random.key(0), draw_images(channels, size))

    def draw(leaf):
        if leaf.ndim == 1:
            return rng.uniform(0.5, 1, leaf.shape).astype(np.float32)
        scale = (2 / np.prod(leaf.shape[:-1])) ** 0.5
        return rng.normal(0, scale, leaf.shape).astype(np.float32)

    variables = {"batch_stats": {}} | jax.tree.map(draw, dict(shapes))
    return tower, variables, (RESNETS | VITS)[name] | options | {"name": name}


def draw_images(channels, size):
    """Returns two random normalised images as Float32[2 size size channels]."""
    return np.random.default_rng(1).normal(size=(2, size, size, channels)).astype(np.float32)


def write_tower(folder, variables, sizes, size, channels, mean_and_std=(0.5, 0.5)):
    """Writes the files of a tower, checks that they are read back, and returns the config."""
    options = {"channels": channels, "image_size": size, "mean_and_std": mean_and_std}
    folder.mkdir()
    for name, content in encode_tower(variables, sizes, **options).items():
        (folder / name).write_bytes(content)
    loaded = load_tower("vision", str(folder), variables, log=pytest.fail)
    if sizes.get("registers"):  # timm adds the first position to the class token
        image = draw_images(channels, size)
        tower = make_image_tower(axis=None, dtype=jnp.float32, **sizes)
        expected, actual = (jax.jit(tower.apply)(x, image) for x in (variables, loaded))
        np.testing.assert_array_equal(actual.local, expected.local)
    else:
        assert_identical(loaded, variables)
    return json.loads((folder / "config.json").read_text())


def to_torch(image):
    return torch.from_numpy(np.moveaxis(image, -1, 1).copy())


def assert_near(actual, expected):
    """Compares a torch tensor, a map with channels first, with an array with channels last."""
    actual, expected = actual.detach().numpy(), np.asarray(expected)
    actual = np.moveaxis(actual, 1, -1) if actual.ndim == 4 else actual
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() < TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize(
    ("name", "channels", "options"),
    [
        ("resnet18", 3, {}),
        ("resnet18", 1, {"resize": 72}),
        ("resnet34", 1, {"pool": "mean_max"}),
        ("resnet50", 3, {}),
        ("resnet50", 1, {"dilated": 2}),
    ],
)
def test_a_resnet_gives_equal_features_in_timm_and_torchvision(tmp_path, name, channels, options):
    tower, variables, sizes = draw_tower(name, 48, channels, **options)
    image = draw_images(channels, 48)
    expected = jax.jit(tower.apply)(variables, image)
    config = write_tower(tmp_path / "tower", variables, sizes, 48, channels)
    side = options.get("resize", 48)
    assert config["pretrained_cfg"]["input_size"] == [channels, side, side]
    assert bool(config["plan_jax"]["resize"]) == ("resize" in options)
    x = to_torch(image)
    if "resize" in options:
        size = (side, side)
        x = torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=True)
        assert_near(x, resize_align_corners(jnp.asarray(image), size))

    model = timm.create_model(f"local-dir:{tmp_path}/tower", pretrained=True).eval()
    assert_near(model.forward_features(x), expected.stages[-1])
    assert_near(model(x), expected.pooled)

    arguments = config["plan_jax"]["torchvision_arguments"]
    model = torchvision.models.get_model(config["architecture"], **arguments)
    if channels != 3:
        model.conv1 = torch.nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    model.avgpool = model.fc = torch.nn.Identity()
    model.load_state_dict(load_file(tmp_path / "tower/model.safetensors"))
    # Without pooling, torchvision returns the flattened map, channels first.
    last = np.moveaxis(np.asarray(expected.stages[-1]), -1, 1).reshape(2, -1)
    assert_near(model.eval()(x), last)


@pytest.mark.parametrize(
    ("name", "size", "channels", "options"),
    [
        ("vit_b16", 48, 3, {"depth": 2}),
        ("vit_ti16", 224, 1, {}),
        ("vit_s16", 64, 3, {"scan": True, "depth": 3}),
        ("vit_small", 40, 1, {}),
        ("vit_tiny14", 56, 3, {}),
        ("vit_tiny14", 56, 1, {"registers": 4}),
        ("vit_tiny14", 42, 3, {"swiglu": True}),
        ("vit_tiny14", 42, 3, {"class_token": False, "layer_scale": 0.0}),
        ("vit_g14", 28, 3, {"depth": 1}),
    ],
)
def test_a_vit_gives_equal_features_in_timm(tmp_path, name, size, channels, options):
    tower, variables, sizes = draw_tower(name, size, channels, **options)
    image = draw_images(channels, size)
    expected = jax.jit(tower.apply)(variables, image)
    write_tower(tmp_path / "tower", variables, sizes, size, channels)
    model = timm.create_model(f"local-dir:{tmp_path}/tower", pretrained=True).eval()
    tokens = model.forward_features(to_torch(image))
    patches = np.asarray(expected.local).reshape(2, -1, sizes["width"])
    assert_near(tokens[:, -patches.shape[1] :], patches)
    assert_near(model(to_torch(image)), expected.pooled)


@pytest.mark.parametrize(("name", "size"), [("resnet18", 48), ("vit_ti16", 48)])
def test_a_classifier_can_be_added_and_trained(tmp_path, name, size):
    options = {"depth": 1} if name.startswith("vit") else {}
    _, variables, sizes = draw_tower(name, size, 1, **options)
    write_tower(tmp_path / "tower", variables, sizes, size, 1)
    model = timm.create_model(f"local-dir:{tmp_path}/tower", pretrained=True, num_classes=5)
    logits = model(to_torch(draw_images(1, size)))
    assert logits.shape == (2, 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits.square().sum().backward()
    torch.optim.SGD(model.parameters(), 1e-3).step()
    trained = model.state_dict()
    first = model.pretrained_cfg["first_conv"]
    assert not torch.equal(trained[f"{first}.weight"], before[f"{first}.weight"])
    counters = [v for k, v in trained.items() if k.endswith("num_batches_tracked")]
    assert all(counter == 1 for counter in counters) and bool(counters) == ("resnet" in name)


@pytest.mark.parametrize("mean_and_std", [(0.0, 1.0), IMAGENET])
def test_timms_transform_normalises_as_the_tower_was_trained(tmp_path, mean_and_std):
    _, variables, sizes = draw_tower("resnet18", 32, 3)
    write_tower(tmp_path / "tower", variables, sizes, 32, 3, mean_and_std)
    model = timm.create_model(f"local-dir:{tmp_path}/tower", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    grey = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    x = transform(Image.fromarray(grey).convert("RGB")).numpy()
    mean, std = map(np.float32, mean_and_std)
    expected = (np.repeat(grey[..., None], 3, -1) / np.float32(255) - mean) / std
    np.testing.assert_allclose(np.moveaxis(x, 0, -1), expected, atol=1e-6)
