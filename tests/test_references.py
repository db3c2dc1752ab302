"""ConVIRT's and GLoRIA's equations against literal loops on ragged texts."""

import features
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import info_nce

from plan_jax.methods import convirt, gloria

KEY = jax.random.key(0)


def cosine(x, y):
    """Returns the cosine of two vectors."""
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def compute_loss(method, hyper, images, texts):
    """Returns the loss of a method without parameters."""
    return method.loss({}, {}, images, texts, {}, key=KEY, step=jnp.array(0), hyper=hyper)[0]


@pytest.mark.parametrize("pairs", [2, 6])
def test_convirt_is_the_literal_formula(pairs):
    images, texts = features.draw_features(pairs=pairs)
    x, y = np.asarray(images.pooled, np.float64), np.asarray(texts.pooled, np.float64)
    table = np.array([[cosine(a, b) for b in y] for a in x]) / 0.1
    expected = 0.75 * info_nce(table) + 0.25 * info_nce(table.T)
    np.testing.assert_allclose(
        compute_loss(convirt, convirt.Hyper(), images, texts), expected, rtol=1e-5
    )


def test_a_heat_map_of_convirt_is_the_cosine_with_the_whole_phrase():
    images, texts = features.draw_features()
    maps, weight = convirt.heatmap({}, {}, images, texts, convirt.Hyper())
    expected = cosine(np.asarray(images.local[2, 4]), np.asarray(texts.pooled[2]))
    mask = np.asarray(texts.mask[2])
    np.testing.assert_allclose(np.asarray(maps)[2, mask, 4], expected, rtol=1e-4)
    np.testing.assert_array_equal(weight, texts.mask)


def literal_gloria(pixels, words, hyper, kind="sum"):
    """Computes the score of one pair, word by word; all `words` are real."""
    if hyper.normalise_attention:
        pixels = pixels / np.linalg.norm(pixels, axis=-1, keepdims=True)
        directions = words / np.linalg.norm(words, axis=-1, keepdims=True)
    else:
        directions = words
    logits = directions @ pixels.T
    word_attention = np.exp(logits) / np.exp(logits).sum(0)
    word_scores = []
    for n in range(len(words)):
        attention = np.exp(hyper.attention_sharpness * word_attention[n])
        attention = attention / attention.sum()
        region = sum(a * p for a, p in zip(attention, pixels, strict=True))
        word_scores.append(hyper.word_sharpness * cosine(words[n], region))
    return max(word_scores) if kind == "max" else np.log(np.exp(word_scores).sum())


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("pairs", [2, 5])
def test_gloria_is_the_literal_formula(pairs, normalise):
    images, texts = features.draw_features(pairs=pairs)
    hyper = gloria.Hyper(normalise_attention=normalise, tile_size=2)
    z, u, mask = (np.asarray(x) for x in (images.local, texts.local, texts.mask))
    local = np.array(
        [[literal_gloria(z[i], u[j][mask[j]], hyper) for j in range(pairs)] for i in range(pairs)]
    )
    tables = gloria.similarity({}, {}, images, texts, hyper)
    np.testing.assert_allclose(tables["local"], local, rtol=1e-4)
    cosines = np.asarray(tables["global"], np.float64)
    expected = sum(info_nce(10.0 * t) for t in (local, local.T, cosines, cosines.T))
    np.testing.assert_allclose(compute_loss(gloria, hyper, images, texts), expected, rtol=1e-4)
    maxima = gloria.similarity({}, {}, images, texts, gloria.Hyper(retrieval_score="max"))["local"]
    assert (np.asarray(maxima) <= np.asarray(tables["local"]) + 1e-5).all() or normalise


def test_gloria_can_retrieve_by_the_maximum_over_words():
    images, texts = features.draw_features()
    hyper = gloria.Hyper(retrieval_score="max", tile_size=2)
    actual = gloria.similarity({}, {}, images, texts, hyper)["local"]
    z, u, mask = (np.asarray(x) for x in (images.local, texts.local, texts.mask))
    expected = literal_gloria(z[3], u[2][mask[2]], hyper, "max")
    np.testing.assert_allclose(actual[3, 2], expected, rtol=1e-4)


def test_a_text_without_words_scores_finitely():
    images, texts = features.draw_features()
    without_words = texts.replace(
        mask=texts.mask.at[3].set(False), word_id=texts.word_id.at[3].set(0)
    )
    assert np.isfinite(
        gloria.similarity({}, {}, images, without_words, gloria.Hyper())["local"]
    ).all()
