"""ConVIRT's and GLoRIA's equations against slow literal loops on ragged texts."""

import features
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plan_jax.methods import convirt, gloria

KEY = jax.random.key(0)


def cosine(x, y):
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def nce(table):
    return np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(table)])


def value(method, hyper, images, texts):
    return method.loss({}, {}, images, texts, {}, key=KEY, step=jnp.array(0), hyper=hyper)[0]


@pytest.mark.parametrize("pairs", [2, 6])
def test_convirt_is_the_literal_formula(pairs):
    images, texts = features.make(pairs=pairs)
    x, y = np.asarray(images.pooled, np.float64), np.asarray(texts.pooled, np.float64)
    table = np.array([[cosine(a, b) for b in y] for a in x]) / 0.1
    want = 0.75 * nce(table) + 0.25 * nce(table.T)
    np.testing.assert_allclose(value(convirt, convirt.Hyper(), images, texts), want, rtol=1e-5)


def test_convirt_maps_pixels_against_the_whole_phrase():
    images, texts = features.make()
    maps, weight = convirt.heatmap({}, {}, images, texts, convirt.Hyper())
    want = cosine(np.asarray(images.local[2, 4]), np.asarray(texts.pooled[2]))
    real = np.asarray(texts.mask[2])
    np.testing.assert_allclose(np.asarray(maps)[2, real, 4], want, rtol=1e-4)
    np.testing.assert_array_equal(weight, texts.mask)


def slow_gloria(pixels, words, hyper, kind="sum"):
    """One pair, word by word; only real words come in."""
    if hyper.normalise_attention:
        pixels = pixels / np.linalg.norm(pixels, axis=-1, keepdims=True)
        directions = words / np.linalg.norm(words, axis=-1, keepdims=True)
    else:
        directions = words
    products = directions @ pixels.T
    shares = np.exp(products) / np.exp(products).sum(0)
    match = []
    for n in range(len(words)):
        attention = np.exp(hyper.attention_sharpness * shares[n])
        attention = attention / attention.sum()
        region = sum(a * p for a, p in zip(attention, pixels, strict=True))
        match.append(hyper.word_sharpness * cosine(words[n], region))
    return max(match) if kind == "max" else np.log(np.exp(match).sum())


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("pairs", [2, 5])
def test_gloria_is_the_literal_formula(pairs, normalise):
    images, texts = features.make(pairs=pairs)
    hyper = gloria.Hyper(normalise_attention=normalise, tile_size=2)
    z, u, mask = (np.asarray(x) for x in (images.local, texts.local, texts.mask))
    local = np.array(
        [[slow_gloria(z[i], u[j][mask[j]], hyper) for j in range(pairs)] for i in range(pairs)]
    )
    tables = gloria.similarity({}, {}, images, texts, hyper)
    np.testing.assert_allclose(tables["local"], local, rtol=1e-4)
    cosines = np.asarray(tables["global"], np.float64)
    want = sum(nce(10.0 * t) for t in (local, local.T, cosines, cosines.T))
    np.testing.assert_allclose(value(gloria, hyper, images, texts), want, rtol=1e-4)
    largest = gloria.similarity({}, {}, images, texts, gloria.Hyper(retrieval_score="max"))["local"]
    assert (np.asarray(largest) <= np.asarray(tables["local"]) + 1e-5).all() or normalise


def test_gloria_retrieves_by_the_maximum_if_asked():
    images, texts = features.make()
    hyper = gloria.Hyper(retrieval_score="max", tile_size=2)
    got = gloria.similarity({}, {}, images, texts, hyper)["local"]
    z, u, mask = (np.asarray(x) for x in (images.local, texts.local, texts.mask))
    want = slow_gloria(z[3], u[2][mask[2]], hyper, "max")
    np.testing.assert_allclose(got[3, 2], want, rtol=1e-4)


def test_a_text_without_words_scores_finitely():
    images, texts = features.make()
    nothing = texts.replace(mask=texts.mask.at[3].set(False), word_id=texts.word_id.at[3].set(0))
    assert np.isfinite(gloria.similarity({}, {}, images, nothing, gloria.Hyper())["local"]).all()
