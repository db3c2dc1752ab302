"""ViTs of patch 14 against DINOv2 of transformers and timm: values, gradients, positions, files."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_towers
import timm
import torch
from safetensors.torch import save_file
from test_towers import (
    assert_near,  # noqa: F401
    channels_last,
    draw_images,
    draw_normal,
    save_module,
    to_torch,
)
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from plan_jax.encoders.dual_encoder import make_image_tower
from plan_jax.weights import load_tower

SIZES = {"vit_b14": (768, 12), "vit_tiny14": (16, 2)}


def make_original(width, heads, depth, image_size, registers=0, **options):
    """Returns transformers' model with random parameters, none of them 0 or 1."""
    options |= {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": depth,
        "image_size": image_size,
        "patch_size": 14,
        "attn_implementation": "eager",
    }
    torch.manual_seed(0)
    if registers:
        config = Dinov2WithRegistersConfig(num_register_tokens=registers, **options)
        model = Dinov2WithRegistersModel(config)
    else:
        model = Dinov2Model(Dinov2Config(**options))
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter) / math.sqrt(max(1, width / 16)))
    return model.eval()


def load(module, path, size, **options):
    """Returns the variables of a tower for images of `size`, from a file, and what was logged."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    template = {"params": shapes["params"], "batch_stats": {}}
    notes = []
    return load_tower("vision", str(path), template, log=notes.append, **options), notes


def run_tower(module, variables, image, weights):
    """Returns the gradient of the image and the output; `weights` [B N E] are of the tokens."""

    @jax.jit
    def run(variables, image):
        def weighted_sum(x):
            output = module.apply(variables, x)
            tokens = output.local.reshape(len(x), -1, output.local.shape[-1])
            if module.class_token:
                tokens = jnp.concatenate([output.pooled[:, None], tokens], 1)
            return (tokens * weights).sum(), (tokens, output)

        return jax.grad(weighted_sum, has_aux=True)(image)

    return run(variables, jnp.asarray(image))


def run_original(model, image, weights, registers):
    """Returns the tokens without registers, the image's gradient, and the last attention."""
    x = to_torch(image)
    output = model(x, output_attentions=True)
    tokens = output.last_hidden_state
    tokens = torch.cat([tokens[:, :1], tokens[:, 1 + registers :]], 1)
    (tokens * torch.from_numpy(weights)).sum().backward()
    attention = output.attentions[-1][:, :, 0, 1 + registers :].mean(1)
    return tokens, channels_last(x.grad), attention


@pytest.mark.parametrize(
    ("name", "depth", "registers", "swiglu", "trained", "size"),
    [
        ("vit_b14", 2, 0, False, 518, 518),
        ("vit_b14", 3, 4, False, 224, 224),
        ("vit_b14", 2, 0, False, 518, 224),
        ("vit_b14", 2, 4, False, 518, 224),
        ("vit_tiny14", 2, 0, True, 56, 56),
        ("vit_tiny14", 2, 3, True, 56, 140),
    ],
)
def test_dinov2(name, depth, registers, swiglu, trained, size, assert_near, tmp_path):  # noqa: F811
    """A tower for images of `size`, from a file of one that was `trained` on another size."""
    width, heads = SIZES[name]
    options = {"use_swiglu_ffn": swiglu}
    model = make_original(width, heads, depth, trained, registers, **options)
    model.save_pretrained(tmp_path)
    image = draw_images(1, size)
    weights = draw_normal(1, 1 + (size // 14) ** 2, width)
    tokens, expected_gradient, attention = run_original(model, image, weights, registers)

    options = {"depth": depth, "registers": registers, "swiglu": swiglu}
    module = make_image_tower(name, None, jnp.float32, scan=depth > 2, **options)
    variables, notes = load(module, tmp_path, size, num_heads=heads, normalisation="imagenet")
    assert any("positions are resized" in note for note in notes) == (trained != size)
    gradient, (actual, output) = run_tower(module, variables, image, weights)
    assert_near("tokens", actual, tokens)
    assert_near("attention", output.attention, attention)
    assert_near("gradient", gradient, expected_gradient)
    if trained != size:
        # The same from the positions of the file, interpolated while the tower runs.
        variables, notes = load(module, tmp_path, trained, normalisation="imagenet")
        assert not any("positions are resized" in note for note in notes)
        gradient, (actual, _) = run_tower(module, variables, image, weights)
        assert_near("tokens", actual, tokens)
        assert_near("gradient", gradient, expected_gradient)


def test_gradients_of_all_parameters_are_those_of_transformers(assert_near, tmp_path):  # noqa: F811
    model = make_original(16, 2, 2, 56, registers=2)
    model.save_pretrained(tmp_path)
    image, weights = draw_images(2, 56), draw_normal(2, 17, 16)
    run_original(model, image, weights, 2)
    module = make_image_tower("vit_tiny14", None, jnp.float32, registers=2)
    variables, _ = load(module, tmp_path, 56)

    def weighted_sum(params):
        output = module.apply({"params": params}, jnp.asarray(image))
        tokens = jnp.concatenate([output.pooled[:, None], output.local.reshape(2, 16, 16)], 1)
        return (tokens * weights).sum()

    gradient = jax.jit(jax.grad(weighted_sum))(variables["params"])
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    model.save_pretrained(tmp_path / "gradient")
    expected, _ = load(module, tmp_path / "gradient", 56)
    expected = dict(jax.tree_util.tree_leaves_with_path(expected["params"]))
    scale = max(np.abs(leaf).max() for leaf in expected.values())
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        # Biases of keys have a gradient of 0 in exact arithmetic.
        error = np.abs(leaf - expected[path]).max() / max(np.abs(expected[path]).max(), scale / 1e3)
        assert error < test_towers.TOLERANCE, (path, error)


@pytest.mark.parametrize(("registers", "trained", "size"), [(0, 56, 56), (4, 56, 56), (4, 98, 56)])
def test_timm(registers, trained, size, assert_near, tmp_path):  # noqa: F811
    """timm's smallest DINOv2, with 2 layers; registers have no position and the class token's 0."""
    name = f"vit_small_patch14_{'reg4_' if registers else ''}dinov2"
    model = timm.create_model(name, pretrained=False, num_classes=0, depth=2, img_size=trained)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    path = save_module(model.eval(), tmp_path / "timm.safetensors")
    model.set_input_size(img_size=size)
    image = draw_images(1, size)
    weights = draw_normal(1, 1 + (size // 14) ** 2, 384)
    x = to_torch(image)
    tokens = model.forward_features(x)
    tokens = torch.cat([tokens[:, :1], tokens[:, 1 + registers :]], 1)
    (tokens * torch.from_numpy(weights)).sum().backward()
    module = make_image_tower("vit_s14", None, jnp.float32, depth=2, registers=registers)
    variables, _ = load(module, path, size)
    gradient, (actual, _) = run_tower(module, variables, image, weights)
    assert_near("tokens", actual, tokens)
    assert_near("gradient", gradient, channels_last(x.grad))


def test_a_tower_without_class_token_is_that_of_i_jepa(assert_near, tmp_path):  # noqa: F811
    """A training checkpoint with the encoder of several devices, and other parts."""
    model = timm.create_model(
        "vit_small_patch16_224",
        num_classes=0,
        patch_size=14,
        depth=2,
        img_size=56,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
    )
    model.eval().pos_embed.data.normal_()
    encoder = {f"module.{name}": value for name, value in model.state_dict().items()}
    path = tmp_path / "jepa.pth.tar"
    torch.save({"epoch": 3, "opt": {"state": {}}, "encoder": encoder}, path)
    image, weights = draw_images(1, 56), draw_normal(1, 16, 384)
    x = to_torch(image)
    tokens = model.forward_features(x)
    (tokens * torch.from_numpy(weights)).sum().backward()
    options = {"depth": 2, "layer_scale": 0.0, "class_token": False}
    module = make_image_tower("vit_s14", None, jnp.float32, **options)
    variables, notes = load(module, path, 56)
    assert not notes
    gradient, (actual, output) = run_tower(module, variables, image, weights)
    assert_near("tokens", actual, tokens)
    assert_near("pooled", output.pooled, model.forward_head(tokens))
    assert_near("gradient", gradient, channels_last(x.grad))


def rename_as_in_dinov2(model):
    """Returns the state dict of transformers' model under the names of DINOv2's own code."""
    state, renamed = model.state_dict(), {}
    for key, value in state.items():
        key = key.replace("embeddings.patch_embeddings.projection", "patch_embed.proj")
        key = key.replace("embeddings.position_embeddings", "pos_embed")
        key = key.replace("embeddings.", "").replace("encoder.layer.", "blocks.")
        key = key.replace("layernorm.", "norm.").replace("attention.o_proj", "attn.proj")
        key = key.replace("layer_scale", "ls").replace("lambda1", "gamma")
        if ".k_proj." in key or ".v_proj." in key:
            continue
        if ".q_proj." in key:
            parts = [state[key_of] for key_of in projection_names(key, state)]
            key, value = key.replace("attention.q_proj", "attn.qkv"), torch.cat(parts)
        renamed[key] = value
    return renamed


def projection_names(key, state):
    """Returns the names of the projections to queries, keys and values next to `key`."""
    suffix = key.replace("blocks.", "encoder.layer.")
    return [suffix.replace("q_proj", f"{part}_proj") for part in "qkv"]


def interpolate_as_in_dinov2(position, side, offset, antialias):
    """Returns positions [1 N E] for side x side patches, as DINOv2's code computes them."""
    old = math.isqrt(position.shape[1] - 1)
    grid = position[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    scale = (side + offset) / old
    options = {"scale_factor": (scale, scale)} if offset else {"size": (side, side)}
    grid = torch.nn.functional.interpolate(grid, mode="bicubic", antialias=antialias, **options)
    return torch.cat([position[:, :1], grid.permute(0, 2, 3, 1).reshape(1, side**2, -1)], 1)


@pytest.mark.parametrize("registers", [0, 2])
def test_files_of_dinov2_itself(registers, assert_near, tmp_path):  # noqa: F811
    """Its names; positions of another grid are interpolated by its rules."""
    model = make_original(16, 2, 2, 518, registers)
    state = rename_as_in_dinov2(model)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "w.safetensors")
    model.embeddings.position_embeddings.data = interpolate_as_in_dinov2(
        model.embeddings.position_embeddings.data,
        16,
        0.0 if registers else 0.1,
        bool(registers),
    )
    image, weights = draw_images(1, 224), draw_normal(1, 257, 16)
    tokens, _, _ = run_original(model, image, weights, registers)
    module = make_image_tower("vit_tiny14", None, jnp.float32, registers=registers)
    variables, notes = load(module, tmp_path / "w.safetensors", 224, normalisation="rad_dino")
    assert "do not tell which they are; config.normalisation is rad_dino" in notes[0]
    _, (actual, _) = run_tower(module, variables, image, weights)
    assert_near("tokens", actual, tokens)


def test_the_file_of_transformers_has_the_names_of_the_published_ones(tmp_path):
    """save_pretrained writes the names of the files on the hub, not those of its own modules."""
    make_original(16, 2, 1, 56).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "dinov2"
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "np") as file:
        keys = set(file.keys())
    assert "encoder.layer.0.attention.attention.query.weight" in keys
    assert "embeddings.mask_token" in keys and "layernorm.weight" in keys
