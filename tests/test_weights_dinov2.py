"""Weights of DINOv2, RAD-DINO and I-JEPA: names, positions, config.json, scale of the images."""

import json

import numpy as np
import pytest
from flax import traverse_util
from published import assert_identical, fill_randomly, publish, tower_template
from safetensors.numpy import save_file
from test_resize import interpolate_line

from plan_jax.encoders.dual_encoder import MEAN_AND_STD
from plan_jax.types import UserError
from plan_jax.weights import find_normalisation, load_tower
from plan_jax.weights.layouts import NORMALISATION_OF_MEAN_AND_STD, recognise_layout

# Those of preprocessor_config.json on the hub.
RAD_DINO = {"image_mean": [0.5307] * 3, "image_std": [0.2583] * 3, "do_normalize": True}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CONFIG = {
    "model_type": "dinov2",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "num_attention_heads": 2,
    "patch_size": 14,
    "use_swiglu_ffn": False,
    "layerscale_value": 1.0,
}
MASK = {
    "vit": {"mask_token": np.ones((1, 16), np.float32)},
    "vit_dinov2": {"embeddings.mask_token": np.ones((1, 16), np.float32)},
}
TINY14 = {"patch": 14, "layer_scale": 1.0}


def make_template(kind, size=56, **options):
    """Returns the shapes of a small tower of patch 14, as `kind` of names."""
    return tower_template(kind, size=size, **(TINY14 if kind == "vit" else {}), **options)


def write_folder(folder, state, config=CONFIG, processor=None):
    """Writes a folder as on the hub; returns its path."""
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


def load(source, template, **options):
    """Returns the trees of an image tower, and the sentences logged but for the normalisation."""
    notes = []
    trees = load_tower("vision", source, template, log=notes.append, **options)
    return trees, [note.split(": ", 1)[1] for note in notes if "do not tell" not in note]


def error_of(call):
    """Returns the message of the UserError that a call raises, which is one sentence."""
    with pytest.raises(UserError) as info:
        call()
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("prefix", ["", "dinov2."])
def test_names_of_transformers(prefix, registers, tmp_path):
    template = make_template("vit_dinov2", registers=registers)
    trees = fill_randomly(template)
    state = publish("vit_dinov2", trees, prefix)
    state |= {prefix + key: value for key, value in MASK["vit_dinov2"].items()}
    if prefix:
        state["classifier.weight"] = np.ones((2, 32), np.float32)
    assert recognise_layout(state, "vision").origin == "DINOv2"
    loaded, notes = load(write_folder(tmp_path, state), template)
    assert_identical(loaded, trees)
    assert not notes


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("swiglu", [False, True])
def test_names_of_dinov2_itself(swiglu, registers, tmp_path):
    template = make_template("vit", registers=registers, swiglu=swiglu)
    trees = fill_randomly(template)
    state = publish("vit", trees) | MASK["vit"]
    if swiglu:
        for old, new in (("fc1", "w12"), ("fc2", "w3")):
            state = {k.replace(f"mlp.{old}", f"mlp.{new}"): v for k, v in state.items()}
    save_file(state, tmp_path / "w.safetensors")
    assert recognise_layout(state, "vision").origin == "DINOv2"
    assert_identical(load(str(tmp_path / "w.safetensors"), template)[0], trees)


def test_timm_adds_the_position_of_the_class_token_to_it(tmp_path):
    template = make_template("vit", registers=2)
    trees = fill_randomly(template)
    state = publish("vit", trees)
    state["reg_token"] = state.pop("register_tokens")
    state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    state["pos_embed"] = state["pos_embed"][:, 1:]
    save_file(state, tmp_path / "w.safetensors")
    loaded, _ = load(str(tmp_path / "w.safetensors"), template)
    params, expected = loaded["params"], trees["params"]
    assert not params["position"][:, 0].any()
    np.testing.assert_array_equal(params["position"][:, 1:], expected["position"][:, 1:])
    np.testing.assert_array_equal(
        params["token"] + params["position"][:, :1], expected["token"] + expected["position"][:, :1]
    )
    np.testing.assert_array_equal(params["registers"], expected["registers"])


def test_towers_without_class_token_have_positions_of_patches_only(tmp_path):
    template = tower_template("vit", size=56, patch=14, class_token=False)
    trees = fill_randomly(template)
    state = publish("vit", trees, "module.")
    save_file(state, tmp_path / "w.safetensors")
    source = str(tmp_path / "w.safetensors")
    assert_identical(load(source, template)[0], trees)
    larger = tower_template("vit", size=84, patch=14, class_token=False)
    loaded, notes = load(source, larger)
    assert notes == ["positions are resized bicubically from 4 x 4 patches to 6 x 6"]
    assert loaded["params"]["position"].shape == (1, 36, 16)
    with pytest.raises(UserError, match="missing: params/token .* set vision.class_token"):
        load(source, tower_template("vit", size=56, patch=14))
    with pytest.raises(UserError, match="missing: params/registers .* set vision.registers"):
        load(source, tower_template("vit", size=56, patch=14, class_token=False, registers=4))


@pytest.mark.parametrize(
    ("kind", "origin", "registers", "antialias", "offset"),
    [
        ("vit_dinov2", "DINOv2", 0, False, 0.0),
        ("vit_dinov2", "DINOv2", 2, True, 0.0),
        ("vit", "DINOv2", 0, False, 0.1),
        ("vit", "DINOv2", 2, True, 0.0),
        ("vit", "timm", 0, True, 0.0),
        ("vit", "plan_jax", 0, False, 0.0),
        ("vit", "plan_jax", 2, True, 0.0),
    ],
)
def test_positions_are_resized_as_by_their_origin(
    kind, origin, registers, antialias, offset, tmp_path
):
    """Each has its own rule, and they differ by more than rounding."""
    trees = fill_randomly(make_template(kind, registers=registers))
    if origin == "plan_jax":
        state = traverse_util.flatten_dict(trees, sep="/")
    else:
        state = publish(kind, trees) | (MASK[kind] if origin == "DINOv2" else {})
    save_file(state, tmp_path / "w.safetensors")
    template = make_template(kind, size=42, registers=registers)
    loaded, (note,) = load(str(tmp_path / "w.safetensors"), template)
    assert ("antialiasing" in note) == antialias and "from 4 x 4 patches to 3 x 3" in note
    old = trees["params"]["position"][0]
    grid = old[1:].reshape(4, 4, 16)
    for axis in (0, 1):
        grid = np.apply_along_axis(interpolate_line, axis, grid, 3, antialias, offset)
    expected = np.concatenate([old[:1], grid.reshape(9, 16)])
    np.testing.assert_allclose(loaded["params"]["position"][0], expected, atol=1e-5)
    loaded["params"]["position"] = trees["params"]["position"]
    assert_identical(loaded, trees)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 4}, "num_attention_heads 4 where the vision tower has 2"),
        ({"patch_size": 16}, "patch_size 16 where the vision tower has 14"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05 where the vision tower has 1e-06"),
        ({"hidden_act": "relu"}, "hidden_act relu where the vision tower has gelu"),
        ({"use_swiglu_ffn": True}, "use_swiglu_ffn True where the vision tower has False"),
    ],
)
def test_a_config_that_computes_something_else_is_refused(change, message, tmp_path):
    template = make_template("vit_dinov2")
    state = publish("vit_dinov2", fill_randomly(template))
    source = write_folder(tmp_path, state, CONFIG | change)
    assert message in error_of(lambda: load(source, template, num_heads=2))
    source = write_folder(tmp_path, state, CONFIG | {"patch_size": [14, 14]})
    load(source, template, num_heads=2)


def test_the_normalisation_of_rad_dino_stands_beside_its_weights(tmp_path):
    """Its arrays are those of DINOv2, which was trained on other images."""
    template = make_template("vit_dinov2")
    state = publish("vit_dinov2", fill_randomly(template))
    source = write_folder(tmp_path, state)
    notes = []
    load_tower("vision", source, template, log=notes.append, normalisation="fixed")
    assert "imagenet and RAD-DINO on rad_dino" in notes[0] and notes[0].endswith("is fixed")
    assert "no preprocessor_config.json tells" in error_of(lambda: find_normalisation(source))
    for processor, right, wrong in (
        (RAD_DINO, "rad_dino", "imagenet"),
        (IMAGENET, "imagenet", "rad_dino"),
        (IMAGENET | {"do_normalize": False}, "unit", "imagenet"),
    ):
        source = write_folder(tmp_path, state, processor=processor)
        assert find_normalisation(source) == right
        notes.clear()
        load_tower("vision", source, template, log=notes.append, normalisation=right)
        assert not notes
        message = error_of(lambda: load(source, template, normalisation=wrong))  # noqa: B023
        assert f"trained on images of normalisation {right}" in message
        assert f"config.normalisation is {wrong}; set it to {right}" in message
        load(source, template, normalisation=wrong, any_normalisation=True)
    source = write_folder(tmp_path, state, processor={"image_mean": [0.1] * 3})
    assert "no preprocessor_config.json tells" in error_of(lambda: find_normalisation(source))


def test_means_and_deviations_of_files_are_those_of_our_normalisations():
    for (mean, std), name in NORMALISATION_OF_MEAN_AND_STD.items():
        expected = np.broadcast_to(np.asarray(MEAN_AND_STD[name][0]), 3)
        np.testing.assert_array_equal(mean, expected)
        np.testing.assert_array_equal(std, np.broadcast_to(np.asarray(MEAN_AND_STD[name][1]), 3))
