"""Towers and heads: shapes, masks, and what a word may know of other sentences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plan_jax.encoders import bert as bert_module
from plan_jax.encoders import dual_encoder
from plan_jax.encoders.dual_encoder import DualEncoder, ProjectionHead
from plan_jax.layers.batch_norm import BatchNorm
from plan_jax.types import TextBatch

KEY = jax.random.key(0)
HEADS = {"image_global": "norm", "image_local": "mlp", "text_global": "norm", "text_local": "norm"}


def dual(**changes):
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


def words(pairs=3, seed=0):
    """Two sentences of 3 and 2 words, the second word of two pieces; then padding."""
    tokens = jax.random.randint(jax.random.key(seed), (pairs, 9), 5, 30).at[:, 7:].set(0)
    index = jnp.tile(jnp.array([-1, 0, 1, 1, 2, 3, 4, -1, -1]), (pairs, 1))
    ids = jnp.tile(jnp.array([7, 8, 9, 7, 6, 0]), (pairs, 1))
    sentence = jnp.tile(jnp.array([0, 0, 0, 1, 1, -1]), (pairs, 1))
    return tokens, index, ids, sentence


def images(pairs=3, size=32):
    return jax.random.randint(KEY, (pairs, size, size, 1), 0, 255).astype(jnp.uint8)


@pytest.mark.parametrize(
    ("name", "grid", "fine", "width"),
    [("resnet_tiny", (4, 4), (8, 8), 16), ("vit_tiny", (4, 4), None, 16)],
)
def test_towers_give_a_map_and_a_vector(name, grid, fine, width):
    tower = dual_encoder.make_image_tower(name, None, jnp.float32)
    x = jnp.zeros((2, 32, 32, 1))
    seen, _ = tower.init_with_output(KEY, x)
    assert seen.pooled.shape == (2, width) and seen.local.shape == (2, *grid, width)
    assert (seen.fine is None) if fine is None else seen.fine.shape[1:3] == fine


def test_paper_sizes_have_the_published_numbers_of_parameters():
    """Those of ResNet-50 and ViT-B/16 without classifier, of BERT-base without pooler."""

    def count(module, *inputs):
        shapes = jax.eval_shape(module.init, KEY, *inputs)["params"]
        return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))

    x = jnp.zeros((1, 224, 224, 3))
    assert count(dual_encoder.make_image_tower("resnet50", None, jnp.float32), x) == 23_508_032
    assert count(dual_encoder.make_image_tower("vit_b16", None, jnp.float32), x) == 85_798_656
    bert = dual_encoder.make_text_tower("bert_base", 30522, jnp.float32)
    tokens, index, _, sentence = words(1)
    assert count(bert, tokens, index, sentence) == 108_891_648


def test_a_word_knows_nothing_of_other_sentences():
    tower = dual_encoder.make_text_tower(
        "bert_tiny", 30, jnp.float32, block_diagonal=True, pool="attention"
    )
    tokens, index, _, sentence = words()
    variables = tower.init(KEY, tokens, index, sentence)
    other = tokens.at[:, 5:7].set(11)  # the second sentence
    read = [tower.apply(variables, t, index, sentence).words for t in (tokens, other)]
    np.testing.assert_allclose(read[0][:, :3], read[1][:, :3], atol=1e-6)
    assert np.abs(read[0][:, 3:5] - read[1][:, 3:5]).max() > 1e-3
    free = dual_encoder.make_text_tower("bert_tiny", 30, jnp.float32)
    read = [
        free.apply(free.init(KEY, tokens, index, sentence), t, index, sentence).words
        for t in (tokens, other)
    ]
    assert np.abs(read[0][:, :3] - read[1][:, :3]).max() > 1e-4


@pytest.mark.parametrize("pool", ["cls", "attention"])
def test_padding_changes_nothing_that_is_read(pool):
    tower = dual_encoder.make_text_tower("bert_tiny", 30, jnp.float32, pool=pool)
    tokens, index, _, sentence = words()
    variables = tower.init(KEY, tokens, index, sentence)
    long = jnp.pad(tokens, ((0, 0), (0, 4))), jnp.pad(index, ((0, 0), (0, 4)), constant_values=-1)
    wide = jnp.pad(sentence, ((0, 0), (0, 3)), constant_values=-1)
    want, got = tower.apply(variables, tokens, index, sentence), tower.apply(variables, *long, wide)
    np.testing.assert_allclose(got.pooled, want.pooled, atol=1e-5)
    np.testing.assert_allclose(got.words[:, :5], want.words[:, :5], atol=1e-5)


def test_pieces_are_summed_into_words():
    pieces = jax.random.normal(KEY, (2, 5, 3))
    index = jnp.array([[-1, 0, 1, 1, -1], [0, 0, 0, 1, 2]])
    got = bert_module.sum_pieces(pieces, index, 3)
    for b in range(2):
        for w in range(3):
            want = sum((pieces[b, n] for n in range(5) if index[b, n] == w), jnp.zeros(3))
            np.testing.assert_allclose(got[b, w], want, atol=1e-6)


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


def test_batch_statistics_are_those_of_the_literal_formula():
    x, mask = jax.random.normal(KEY, (4, 5, 2)), jax.random.bernoulli(KEY, 0.6, (4, 5))
    norm = BatchNorm(None)
    y, stats = norm.apply(norm.init(KEY, x, True), x, True, mask, mutable=["batch_stats"])
    kept = np.asarray(x)[np.asarray(mask)]
    want = (x - kept.mean(0)) / np.sqrt(kept.var(0) + 1e-5)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["batch_stats"]["mean"], 0.1 * kept.mean(0), rtol=1e-4)
    running = 0.9 + 0.1 * kept.var(0, ddof=1)
    np.testing.assert_allclose(stats["batch_stats"]["var"], running, rtol=1e-4)


def test_both_towers_meet_in_one_space():
    model = dual()
    tokens, index, ids, sentence = words()
    seen, _ = model.init_with_output(KEY, images(), method="encode_image")
    assert seen.local.shape == (3, 16, 8) and seen.fine.shape == (3, 64, 8)
    assert (seen.grid, seen.fine_grid) == ((4, 4), (8, 8))
    read, _ = model.init_with_output(
        KEY, TextBatch(tokens, index, ids, sentence), method="encode_text"
    )
    assert read.local.shape == (3, 6, 8) and read.pooled.shape == (3, 8)
    assert (np.asarray(read.local)[:, 5] == 0).all() and not read.mask[:, 5].any()


def test_a_shared_head_maps_pixels_like_the_whole():
    """The pixels' mean through a linear shared head is the image's own embedding."""
    heads = {
        "image_global": "linear",
        "image_local": "shared",
        "text_global": "linear",
        "text_local": "shared",
    }
    model = dual(heads=heads, vision={"name": "resnet_tiny"}, fine_map=False)
    seen, _ = model.init_with_output(KEY, images(), method="encode_image")
    np.testing.assert_allclose(seen.local.mean(1), seen.pooled, atol=1e-5)


def test_grey_values_are_standardised_by_image():
    model = dual()
    variables = model.init(KEY, images(), method="encode_image")
    dim = (images() // 2 + 20).astype(jnp.uint8)
    a, b = (model.apply(variables, x, method="encode_image") for x in (images(), dim))
    np.testing.assert_allclose(a.pooled, b.pooled, atol=0.15)


def test_bfloat16_is_near_float32_and_keeps_float32_parameters():
    full, half = dual(), dual(dtype=jnp.bfloat16)
    variables = half.init(KEY, images(), method="encode_image")
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    want = full.apply(variables, images(), method="encode_image")
    got = half.apply(variables, images(), method="encode_image")
    assert got.local.dtype == jnp.float32
    np.testing.assert_allclose(got.pooled, want.pooled, atol=0.1)
