"""Towers and heads: shapes, masks, and what a word may learn from other sentences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from plan_jax.encoders import bert as bert_module
from plan_jax.encoders import dual_encoder
from plan_jax.encoders.dual_encoder import DualEncoder, ProjectionHead
from plan_jax.types import TextBatch

KEY = jax.random.key(0)
HEADS = {"image_global": "norm", "image_local": "mlp", "text_global": "norm", "text_local": "norm"}


def make_encoder(**changes):
    settings = {
        "vision": {"name": "resnet_tiny", "position": True, "pool": "mean_max"},
        "text": {"name": "bert_tiny", "block_diagonal": True, "pool": "attention"},
        "heads": HEADS,
        "vocab_size": 30,
        "embed_dim": 8,
        "head_hidden_dim": 16,
        "normalisation": "image",
        "channels": 1,
        "fine_map": True,
    }
    return DualEncoder(**settings | changes)


def draw_texts(pairs=3, seed=0):
    """Two sentences of 3 and 2 words, the second word of two pieces; then padding."""
    tokens = jax.random.randint(jax.random.key(seed), (pairs, 9), 5, 30).at[:, 7:].set(0)
    index = jnp.tile(jnp.array([-1, 0, 1, 1, 2, 3, 4, -1, -1]), (pairs, 1))
    ids = jnp.tile(jnp.array([7, 8, 9, 7, 6, 0]), (pairs, 1))
    sentence = jnp.tile(jnp.array([0, 0, 0, 1, 1, -1]), (pairs, 1))
    return tokens, index, ids, sentence


def draw_images(pairs=3, size=32):
    return jax.random.randint(KEY, (pairs, size, size, 1), 0, 255).astype(jnp.uint8)


@pytest.mark.parametrize(
    ("name", "grid", "fine", "width"),
    [("resnet_tiny", (4, 4), (8, 8), 16), ("vit_tiny", (4, 4), None, 16)],
)
def test_towers_give_a_map_and_a_vector(name, grid, fine, width):
    tower = dual_encoder.make_image_tower(name, None, jnp.float32)
    x = jnp.zeros((2, 32, 32, 1))
    output, _ = tower.init_with_output(KEY, x)
    assert output.pooled.shape == (2, width) and output.local.shape == (2, *grid, width)
    assert (output.fine is None) if fine is None else output.fine.shape[1:3] == fine


@pytest.mark.parametrize("name", ["resnet_tiny", "vit_tiny"])
def test_parameters_read_from_a_file_may_be_numpy_arrays(name):
    model = make_encoder(vision={"name": name}, fine_map=False)
    tokens, index, ids, sentence = draw_texts()
    texts = TextBatch(tokens, index, ids, sentence)
    for method, inputs in (("encode_image", draw_images()), ("encode_text", texts)):
        variables = model.init(KEY, inputs, method=method)
        expected = model.apply(variables, inputs, method=method)
        actual = model.apply(jax.tree.map(np.asarray, variables), inputs, method=method)
        np.testing.assert_allclose(actual.pooled, expected.pooled, rtol=1e-6, atol=1e-6)


def test_paper_sizes_have_the_published_numbers_of_parameters():
    """Those of ResNet-50 and ViT-B/16 without classifier, of BERT-base without pooler."""

    def count(module, *inputs):
        shapes = jax.eval_shape(module.init, KEY, *inputs)["params"]
        return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))

    x = jnp.zeros((1, 224, 224, 3))
    assert count(dual_encoder.make_image_tower("resnet50", None, jnp.float32), x) == 23_508_032
    assert count(dual_encoder.make_image_tower("vit_b16", None, jnp.float32), x) == 85_798_656
    bert = dual_encoder.make_text_tower("bert_base", 30522, jnp.float32)
    tokens, index, _, sentence = draw_texts(1)
    assert count(bert, tokens, index, sentence) == 108_891_648


def test_a_word_does_not_depend_on_other_sentences():
    tower = dual_encoder.make_text_tower(
        "bert_tiny", 30, jnp.float32, block_diagonal=True, pool="attention"
    )
    tokens, index, _, sentence = draw_texts()
    variables = tower.init(KEY, tokens, index, sentence)
    changed = tokens.at[:, 5:7].set(11)  # the second sentence
    text_features = [tower.apply(variables, t, index, sentence).words for t in (tokens, changed)]
    np.testing.assert_allclose(text_features[0][:, :3], text_features[1][:, :3], atol=1e-6)
    assert np.abs(text_features[0][:, 3:5] - text_features[1][:, 3:5]).max() > 1e-3
    free = dual_encoder.make_text_tower("bert_tiny", 30, jnp.float32)
    text_features = [
        free.apply(free.init(KEY, tokens, index, sentence), t, index, sentence).words
        for t in (tokens, changed)
    ]
    assert np.abs(text_features[0][:, :3] - text_features[1][:, :3]).max() > 1e-4


@pytest.mark.parametrize("pool", ["cls", "attention"])
def test_padding_changes_no_real_output(pool):
    tower = dual_encoder.make_text_tower("bert_tiny", 30, jnp.float32, pool=pool)
    tokens, index, _, sentence = draw_texts()
    variables = tower.init(KEY, tokens, index, sentence)
    long = jnp.pad(tokens, ((0, 0), (0, 4))), jnp.pad(index, ((0, 0), (0, 4)), constant_values=-1)
    wide = jnp.pad(sentence, ((0, 0), (0, 3)), constant_values=-1)
    expected, actual = (
        tower.apply(variables, tokens, index, sentence),
        tower.apply(variables, *long, wide),
    )
    np.testing.assert_allclose(actual.pooled, expected.pooled, atol=1e-5)
    np.testing.assert_allclose(actual.words[:, :5], expected.words[:, :5], atol=1e-5)


def test_pieces_are_summed_into_words():
    pieces = jax.random.normal(KEY, (2, 5, 3))
    index = jnp.array([[-1, 0, 1, 1, -1], [0, 0, 0, 1, 2]])
    actual = bert_module.sum_pieces(pieces, index, 3)
    for b in range(2):
        for w in range(3):
            expected = sum((pieces[b, n] for n in range(5) if index[b, n] == w), jnp.zeros(3))
            np.testing.assert_allclose(actual[b, w], expected, atol=1e-6)


def test_masked_words_do_not_enter_batch_statistics():
    head = ProjectionHead("mlp", 8, 4, None, jnp.float32)
    x, mask = jax.random.normal(KEY, (3, 5, 6)), jnp.arange(5) < jnp.array([[5], [2], [3]])
    variables = head.init(KEY, x, True, mask)
    stats = [
        head.apply(variables, some, True, mask, mutable=["batch_stats"])[1]
        for some in (x, jnp.where(mask[..., None], x, 50.0))
    ]
    for a, b in zip(*map(jax.tree.leaves, stats), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_scanned_blocks_of_a_resnet_change_neither_values_nor_statistics():
    """A stage of three blocks, two of them equal, and one of four with dilations."""
    options = {"widths": (4, 8), "depths": (3, 4), "local_stage": 0, "dilated": 1, "position": True}
    plain = dual_encoder.make_image_tower("resnet_tiny", None, jnp.float32, **options)
    other = dual_encoder.make_image_tower(
        "resnet_tiny", None, jnp.float32, **options, scan=True, remat=True
    )
    x = jax.random.normal(KEY, (3, 32, 32, 1))
    variables = plain.init(KEY, x)
    shapes = jax.eval_shape(other.init, KEY, x)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)
    # Running statistics that differ between blocks.
    stats, structure = jax.tree.flatten(variables["batch_stats"])
    stats = [leaf + 0.1 * index for index, leaf in enumerate(stats)]
    variables["batch_stats"] = jax.tree.unflatten(structure, stats)

    def gradient(tower, train):
        def total(params):
            output, updated = tower.apply(
                {**variables, "params": params}, x, train, mutable=["batch_stats"]
            )
            return (output.pooled**3).sum() + (output.local**2).sum(), (output.pooled, updated)

        return jax.jit(jax.value_and_grad(total, has_aux=True))(variables["params"])

    for train in (True, False):
        expected, found = gradient(plain, train), gradient(other, train)
        assert jax.tree.structure(expected) == jax.tree.structure(found)
        for a, b in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(a).max()))
    # In evaluation no collection need be mutable.
    for a, b in zip(plain.apply(variables, x)[:2], other.apply(variables, x)[:2], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_both_towers_meet_in_one_space():
    model = make_encoder()
    tokens, index, ids, sentence = draw_texts()
    image_features, _ = model.init_with_output(KEY, draw_images(), method="encode_image")
    assert image_features.local.shape == (3, 16, 8) and image_features.fine.shape == (3, 64, 8)
    assert (image_features.grid, image_features.fine_grid) == ((4, 4), (8, 8))
    text_features, _ = model.init_with_output(
        KEY, TextBatch(tokens, index, ids, sentence), method="encode_text"
    )
    assert text_features.local.shape == (3, 6, 8) and text_features.pooled.shape == (3, 8)
    assert (np.asarray(text_features.local)[:, 5] == 0).all() and not text_features.mask[:, 5].any()


def test_a_shared_head_maps_pixels_like_the_whole():
    """The pixels' mean through a linear shared head is the image's own embedding."""
    heads = {
        "image_global": "linear",
        "image_local": "shared",
        "text_global": "linear",
        "text_local": "shared",
    }
    model = make_encoder(heads=heads, vision={"name": "resnet_tiny"}, fine_map=False)
    image_features, _ = model.init_with_output(KEY, draw_images(), method="encode_image")
    np.testing.assert_allclose(image_features.local.mean(1), image_features.pooled, atol=1e-5)


@pytest.mark.parametrize("kind", dual_encoder.HEAD_KINDS)
def test_heads_are_the_layers_of_their_papers(kind):
    head = dual_encoder.ProjectionHead(kind, 6, 4, None, jnp.float32)
    x = jax.random.normal(KEY, (3, 5))
    rng = np.random.default_rng(0)
    trees = jax.tree.map(
        lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), head.init(KEY, x, False)
    )
    params, stats = trees["params"], trees.get("batch_stats", {})

    def dense(y, name):
        return y @ params[name]["kernel"] + params[name].get("bias", 0.0)

    def normalise(y, name):
        y = (y - stats[name]["mean"]) / np.sqrt(stats[name]["var"] + 1e-5)
        affine = params.get(name, {})
        return y * affine.get("scale", 1.0) + affine.get("bias", 0.0)

    y = np.asarray(x)
    if kind == "mlp_ln":
        y = dense(y, "fc1")
        y = y * (1 + erf(y / np.sqrt(2))) / 2
        y = (y - y.mean(1, keepdims=True)) / y.std(1, keepdims=True)
        y = y * params["norm1"]["scale"] + params["norm1"]["bias"]
    elif kind == "mlp_relu":
        y = np.maximum(dense(y, "fc1"), 0)
    elif kind in ("mlp", "mlp_bn"):
        y = np.maximum(normalise(dense(y, "fc1"), "norm1"), 0)
    y = dense(y, "fc2")
    y = normalise(y, "norm2") if kind in ("norm", "mlp") else y
    np.testing.assert_allclose(head.apply(trees, x, False), y, rtol=1e-4, atol=1e-5)


def test_a_global_vector_may_be_the_mean_of_pixels_and_texts_may_have_no_head():
    heads = {
        "image_global": "mean",
        "image_local": "mlp_bn",
        "text_global": "none",
        "text_local": "none",
    }
    model = make_encoder(heads=heads, embed_dim=16, fine_map=False)
    image_features, _ = model.init_with_output(KEY, draw_images(), method="encode_image")
    np.testing.assert_allclose(image_features.local.mean(1), image_features.pooled, atol=1e-5)
    tokens, index, ids, sentence = draw_texts()
    text = TextBatch(tokens, index, ids, sentence)
    text_features, variables = model.init_with_output(KEY, text, method="encode_text")
    assert set(variables["params"]) == {"text_tower"}
    np.testing.assert_array_equal(text_features.local, text_features.raw * (ids > 0)[..., None])


def test_the_pooler_of_bert():
    tower = dual_encoder.make_text_tower("bert_tiny", 30, jnp.float32, pool="pooler")
    tokens, index, _, sentence = draw_texts()
    output, variables = tower.init_with_output(KEY, tokens, index, sentence)
    plain = dual_encoder.make_text_tower("bert_tiny", 30, jnp.float32, pool="cls")
    params = dict(variables["params"])
    layer = params.pop("pooler")
    first = plain.apply({"params": params}, tokens, index, sentence).pooled
    np.testing.assert_allclose(output.pooled, np.tanh(first @ layer["kernel"]), atol=1e-5)


def test_grey_values_are_standardised_by_image():
    model = make_encoder()
    variables = model.init(KEY, draw_images(), method="encode_image")
    dim = (draw_images() // 2 + 20).astype(jnp.uint8)
    a, b = (model.apply(variables, x, method="encode_image") for x in (draw_images(), dim))
    np.testing.assert_allclose(a.pooled, b.pooled, atol=0.15)


def test_bfloat16_is_near_float32_and_keeps_float32_parameters():
    full, half = make_encoder(), make_encoder(dtype=jnp.bfloat16)
    variables = half.init(KEY, draw_images(), method="encode_image")
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    expected = full.apply(variables, draw_images(), method="encode_image")
    actual = half.apply(variables, draw_images(), method="encode_image")
    assert actual.local.dtype == jnp.float32
    np.testing.assert_allclose(actual.pooled, expected.pooled, atol=0.1)


@pytest.mark.parametrize(
    ("normalisation", "low", "high"),
    [
        ("fixed", [-1, -1, -1], [1, 1, 1]),
        ("unit", [0, 0, 0], [1, 1, 1]),
        ("medclip", [-2.097591] * 3, [1.480215] * 3),
        ("mrm", [-2.032666] * 3, [2.050633] * 3),
        ("rad_dino", [-2.054588] * 3, [1.816880] * 3),
        # ImageNet's mean and deviation of red, green and blue.
        ("imagenet", [-2.117904, -2.035714, -1.804444], [2.248908, 2.428571, 2.64]),
    ],
)
def test_grey_values_are_scaled_as_published(normalisation, low, high):
    encoder = make_encoder(normalisation=normalisation, channels=3)
    image = jnp.asarray([[[[0], [255]]]], jnp.uint8)
    x = encoder.apply({}, image, method="_normalise")
    np.testing.assert_allclose(x[0, 0], [low, high], atol=1e-5)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_attention_after_a_word_is_that_of_the_piece_after_each_of_its_pieces(pool):
    """As the code of MGCA pairs them: pieces p to q with p + 1 to q + 1, the last with [SEP]."""
    tower = dual_encoder.make_text_tower("bert_tiny", 30, jnp.float32, pool=pool)
    tokens, index, _, sentence = draw_texts()
    variables = tower.init(KEY, tokens, index, sentence)
    variables = jax.tree.map(lambda x: x + 0.5 * jax.random.normal(KEY, x.shape), variables)
    output = tower.apply(variables, tokens, index, sentence)
    # Every position a word of its own: the attention of each piece.
    positions = jnp.tile(jnp.arange(9), (3, 1))
    pieces = np.asarray(tower.apply(variables, tokens, positions, positions).attention)
    assert np.abs(pieces[:, 2] - pieces[:, 4]).min() > 1e-3 and (pieces[:, 7:] == 0).all()
    # Words 0 to 4 are the pieces 1, 2 and 3, 4, 5, 6.
    own = np.stack([pieces[:, 1], pieces[:, 2] + pieces[:, 3], *pieces[:, 4:7].T], 1)
    after = np.stack([pieces[:, 2], pieces[:, 3] + pieces[:, 4], *pieces[:, 5:8].T], 1)
    np.testing.assert_allclose(output.attention[:, :5], own, atol=1e-6)
    np.testing.assert_allclose(output.next_attention[:, :5], after, atol=1e-6)
    assert (output.next_attention[:, 5:] == 0).all()


def test_pooled_weights_of_words_have_no_piece_after_them():
    tower = dual_encoder.make_text_tower("bert_tiny", 30, jnp.float32, pool="attention")
    tokens, index, _, sentence = draw_texts()
    variables = tower.init(KEY, tokens, index, sentence)
    assert tower.apply(variables, tokens, index, sentence).next_attention is None


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_of_a_text_depends_on_its_place_in_the_whole_batch_alone(scan):
    options = {"depth": 3, "dropout": 0.3, "scan": scan}
    tower = dual_encoder.make_text_tower("bert_tiny", 30, jnp.float32, **options)
    tokens, index, _, sentence = (jnp.tile(x[:1], (4, 1)) for x in draw_texts())
    variables = tower.init(KEY, tokens, index, sentence)

    def encode(rows):
        inputs = tokens[rows], index[rows], sentence[rows], True, rows
        return tower.apply(variables, *inputs, rngs={"dropout": KEY}).words

    whole, part = encode(jnp.arange(4)), encode(jnp.array([2, 1]))
    assert min(np.abs(whole[n] - whole[m]).max() for n in range(4) for m in range(n)) > 0.01
    np.testing.assert_allclose(part, whole[jnp.array([2, 1])], atol=1e-6)
