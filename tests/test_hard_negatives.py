"""Hard negatives: the loss against a literal loop, the step on many devices, and the batches."""

import dataclasses
import math
from functools import cache

import features
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from records import ANATOMY_NAMES, REGION_NAMES, make_record
from test_train import random_batch
from tiny_models import TOWERS

from configs import testing
from plan_jax import parallel
from plan_jax.config import Config, HardNegativesConfig
from plan_jax.data import loader, report_parser, schema
from plan_jax.data import tokenizer as tokenization
from plan_jax.data.dataset import Dataset
from plan_jax.methods import METHODS
from plan_jax.methods.hard_negatives import variant_loss
from plan_jax.model import build_components
from plan_jax.state import init_state
from plan_jax.step import make_step
from plan_jax.types import UserError

HYPER = {
    "asg": {"num_layers": 1, "num_heads": 2, "hidden_dim": 8},
    "mgca": {"num_prototypes": 8},
    "place": {"num_queries": 4, "num_blocks": 1, "num_decoder_blocks": 1},
}
TAU = 0.2

# The loss ----------------------------------------------------------------------------------------


def make_sides(method, pairs=4):
    """Returns features of images, texts and variants, of which the last two equal their texts."""
    module = METHODS[method]
    images, texts = features.draw_features(pairs, seed=1)
    _, variants = features.draw_features(pairs, seed=2)
    differs = np.arange(pairs) < pairs - 2
    images, texts, variants = (
        side.select(names)
        for side, names in (
            (images, module.IMAGE_FEATURES),
            (texts, module.TEXT_FEATURES),
            (variants, module.TEXT_FEATURES),
        )
    )
    variants = jax.tree.map(
        lambda x, y: jnp.where(differs.reshape(-1, *[1] * (x.ndim - 1)), x, y), variants, texts
    )
    return images, texts, variants, jnp.asarray(differs)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_loss_and_its_gradients_are_those_of_a_literal_loop(method):
    module = METHODS[method]
    hyper = module.Hyper(**HYPER.get(method, {}))
    params, memory = module.init(jax.random.key(0), features.make_context(), hyper)
    images, texts, variants, differs = make_sides(method)

    def pick(side, row):
        return jax.tree.map(lambda leaf: leaf[row : row + 1], side)

    def literal(images, texts, variants):
        total, num_ahead = 0.0, 0.0
        for row in range(len(differs)):
            tables = [
                module.similarity(params, memory, pick(images, row), pick(side, row), hyper)
                for side in (texts, variants)
            ]
            kinds = set(tables[0]) - {"both"}
            excess = [tables[1][kind][0, 0] - tables[0][kind][0, 0] for kind in kinds]
            terms = [jnp.log(1 + jnp.exp(value / TAU)) for value in excess]
            total += sum(terms) / len(terms) * differs[row]
            num_ahead += (sum(excess) < 0) * differs[row]
        return total / len(differs), num_ahead / differs.sum()

    def fused(images, texts, variants):
        return variant_loss(module, params, memory, images, texts, variants, differs, hyper, TAU)

    results = []
    for function in (literal, fused):
        compute = jax.jit(jax.value_and_grad(function, (0, 1, 2), has_aux=True, allow_int=True))
        results.append(compute(images, texts, variants))
    ((expected, share), expected_grads), ((loss, accuracy), grads) = results
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(accuracy, share)
    assert loss > 0
    for x, y in zip(jax.tree.leaves(expected_grads), jax.tree.leaves(grads), strict=True):
        if x.dtype == jnp.float32:
            np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-6)


def test_a_text_without_a_variant_has_no_loss_and_no_gradient():
    images, texts, variants, _ = make_sides("convirt")
    nowhere = jnp.zeros(4, bool)

    def compute(pooled):
        side = texts.replace(pooled=pooled)
        hyper = METHODS["convirt"].Hyper()
        return variant_loss(METHODS["convirt"], {}, {}, images, side, variants, nowhere, hyper, TAU)

    (loss, accuracy), grad = jax.value_and_grad(compute, has_aux=True)(texts.pooled)
    assert loss == accuracy == 0 and not grad.any()


# The step ----------------------------------------------------------------------------------------


@cache
def take_step(devices, microbatch, kinds=("negation",)):
    """Returns the metrics and the gradients of a step of GLoRIA with towers without BatchNorm."""
    content = testing.get_config().to_dict() | TOWERS | {"method": "gloria", "hyper": {}}
    config = Config.from_dict(content)
    components = build_components(config, parallel.AXIS)
    batch = random_batch(16)
    if kinds:
        tokens = np.asarray(batch.text.tokens).copy()
        tokens[:6, 1] += 1  # the last two have no variant
        batch = batch.replace(variant=batch.text.replace(tokens=tokens))
    state, _ = init_state(components, config, batch)
    optimiser = optax.sgd(1.0)
    before = parallel.to_host(state.params)
    state = state.replace(opt_state=optimiser.init(state.params))
    settings = HardNegativesConfig(kinds=kinds, weight=3.0, tau=TAU)
    step = make_step(components, optimiser, 0.0, parallel.AXIS, microbatch, settings)
    mesh = parallel.make_mesh(devices)
    step = parallel.parallelise(step, mesh)
    state, metrics = step(parallel.replicate(state, mesh), parallel.shard(batch, mesh))
    after, metrics = parallel.to_host((state.params, metrics))
    return metrics, jax.tree.map(np.subtract, before, after)


def test_devices_and_microbatches_do_not_change_the_step():
    (expected, expected_grads), (metrics, grads) = take_step(1, 0), take_step(8, 1)
    assert 0 < metrics["loss_variant"] < math.log(2) + 1
    for name in ("loss", "loss_variant", "variant_accuracy"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)
    pairs = list(zip(*map(jax.tree.leaves, (expected_grads, grads)), strict=True))
    scale = math.sqrt(sum(float((x**2).sum()) for x, _ in pairs))
    error = math.sqrt(sum(float(((x - y) ** 2).sum()) for x, y in pairs))
    assert error <= 1e-5 * scale


def test_the_loss_is_added_to_that_of_the_method():
    with_variants, without = take_step(1, 0)[0], take_step(1, 0, ())[0]
    assert "loss_variant" not in without
    expected = without["loss"] + 3 * with_variants["loss_variant"]
    np.testing.assert_allclose(with_variants["loss"], expected, rtol=1e-5)


# Batches -----------------------------------------------------------------------------------------

REPORTS = (
    "Small effusion on the left. Lungs are clear. Heart is normal.",
    "Heart is normal. Lungs are clear.",
    "No nodule. Lungs are clear.",
)
FINDINGS = ("nodule", "pleural effusion")


def make_dataset(reports=REPORTS, count=12):
    source = [
        schema.serialize(dataclasses.replace(make_record(i), text=reports[i % len(reports)]))
        for i in range(count)
    ]
    return Dataset(source, FINDINGS, ANATOMY_NAMES, REGION_NAMES)


def read_batch(variants, steps=1, dataset=None):
    batches = loader.train_batches(
        dataset or make_dataset(),
        tokenization.load_tokenizer("phantom"),
        batch_size=6,
        size=24,
        max_tokens=32,
        max_words=28,
        seed=3,
        variants=variants,
    )
    for _ in range(steps):
        batch = next(batches)
    batches.close()
    return batch


def test_variants_change_one_sentence_in_the_order_of_the_text():
    batch = read_batch(("laterality", "negation"))
    changed = (batch.variant.tokens != batch.text.tokens).any(-1)
    # Two of three reports have a variant.
    assert 2 <= changed.sum() < 6
    for text, variant in zip(batch.text.sentence, batch.variant.sentence, strict=True):
        lengths, others = (
            np.bincount(sentence[sentence >= 0], minlength=3) for sentence in (text, variant)
        )
        # A word more or less in one sentence, and the others where they were.
        assert (lengths != others).sum() <= 1


def test_a_run_without_variants_has_the_same_batches():
    plain, batch = read_batch(()), read_batch(("negation",))
    assert plain.variant is None
    for x, y in zip(*map(jax.tree.leaves, (plain, batch.replace(variant=None))), strict=True):
        np.testing.assert_array_equal(x, y)


def test_variants_are_a_function_of_seed_and_step():
    first, again = (read_batch(("negation", "severity"), steps=3) for _ in range(2))
    np.testing.assert_array_equal(first.variant.tokens, again.variant.tokens)


def test_findings_that_the_dataset_lacks_have_no_variant():
    dataset = make_dataset(("No fracture is seen. Lungs are clear.",))
    assert "fracture" in report_parser.FINDINGS
    with pytest.raises(UserError, match=r"no text of 12 .*kinds negation; .*set it to \(\)"):
        loader.describe_variants(dataset, ("negation",))


def test_the_run_says_how_many_texts_have_a_variant():
    (sentence,) = loader.describe_variants(make_dataset(), ("negation", "severity"))
    assert sentence.startswith("8 of 12 sampled texts")
    assert loader.describe_variants(make_dataset(), ()) == []


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"kinds": ("colour",)}, "use some of laterality, negation, severity, region"),
        ({"weight": -1.0}, "use 0 to 10000"),
        ({"tau": 0.0}, "use 0.001 to 100"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change, remedy):
    with pytest.raises(UserError, match=remedy):
        Config.from_dict({"hard_negatives": change})
