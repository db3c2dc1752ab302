"""The contract of all methods, one parametrised test for each clause.

That several devices compute the same step as one is tested in soak/test_steps.py.
"""

import dataclasses
import functools
import re
import typing

import features
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plan_jax.methods import METHODS
from plan_jax.types import UserError

SMALL_HYPERS = {
    "plan": {"num_sampled_words": 5, "tile_size": 2, "num_candidates": 3, "guide_round_steps": 1},
    "gloria": {"tile_size": 2},
    "asg": {"num_layers": 1, "num_heads": 2, "hidden_dim": 8},
    "mgca": {"num_prototypes": 4, "freeze_prototype_steps": 0, "tile_size": 2},
    "place": {"num_queries": 3},
}
# For the test of memory: more words than are sampled, as in the papers.
MEMORY_HYPERS = {"plan": {"num_sampled_words": 12}}
KEY = jax.random.key(0)
# Jitted once for all tests, so that each program is compiled once.
SIMILARITY, HEATMAP = (
    {name: jax.jit(getattr(method, verb), static_argnums=4) for name, method in METHODS.items()}
    for verb in ("similarity", "heatmap")
)


def initialise(name, dim=8, **changes):
    """Returns a method with small constants, its parameters and its memory."""
    method = METHODS[name]
    hyper = method.Hyper(**SMALL_HYPERS.get(name, {}) | changes)
    return method, hyper, *method.init(KEY, features.make_context(dim), hyper)


all_methods = pytest.mark.parametrize("name", sorted(METHODS))


@all_methods
def test_all_have_the_same_names(name):
    method, hyper, _, memory = initialise(name)
    assert isinstance(method.PAPER, str) and isinstance(method.REQUIRES, tuple)
    assert dataclasses.is_dataclass(hyper) and hyper == dataclasses.replace(hyper)
    assert isinstance(memory, dict)


@all_methods
def test_loss_and_its_gradients_of_features_and_parameters_are_finite_and_not_zero(name):
    method, hyper, params, memory = initialise(name)
    images, texts = features.draw_features()
    extra = features.draw_extra(texts)

    def objective(params, images, texts):
        return method.loss(
            params, memory, images, texts, extra, key=KEY, step=jnp.array(9), hyper=hyper
        )[0]

    gradient = jax.jit(jax.value_and_grad(objective, (0, 1, 2), allow_int=True))
    loss, (params_gradient, *feature_gradients) = gradient(params, images, texts)
    assert np.isfinite(loss)
    for leaf in jax.tree.leaves(params_gradient):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0
    for side in feature_gradients:
        assert np.isfinite(side.pooled).all() and np.abs(side.pooled).max() > 0
        if name != "convirt":  # its loss uses no local features
            assert np.isfinite(side.local).all() and np.abs(side.local).max() > 0


@all_methods
def test_the_loss_reads_the_features_that_the_method_names_and_no_others(name):
    method, hyper, params, memory = initialise(name)
    sides = features.draw_features()
    extra = features.draw_extra(sides[1])
    named = sides[0].select(method.IMAGE_FEATURES), sides[1].select(method.TEXT_FEATURES)

    def trace_loss(sides):
        """Returns the program of the loss as text, in which only arrays that are read occur."""
        options = {"key": KEY, "step": jnp.array(9), "hyper": hyper}
        program = jax.make_jaxpr(lambda: method.loss(params, memory, *sides, extra, **options))()
        return re.sub(r" at 0x\w+", "", str(program))

    expected = trace_loss(sides)
    assert trace_loss(named) == expected
    for side, names in ((0, method.IMAGE_FEATURES), (1, method.TEXT_FEATURES)):
        for field in names:
            if getattr(sides[side], field) is None or field == "next_attention":
                continue
            fewer = list(named)
            fewer[side] = sides[side].select(set(names) - {field})
            with pytest.raises((AttributeError, IndexError, TypeError, ValueError)):
                if trace_loss(fewer) != expected:  # an optional one, as a finer map
                    raise ValueError(field)


@all_methods
def test_permuting_pairs_permutes_scores(name):
    _, hyper, params, memory = initialise(name)
    images, texts = features.draw_features()
    rows, columns = np.array([3, 0, 5, 1, 4, 2]), np.array([1, 5, 2, 0, 3, 4])
    expected = SIMILARITY[name](params, memory, images, texts, hyper)
    permuted = features.permute(images, rows), features.permute(texts, columns)
    actual = SIMILARITY[name](params, memory, *permuted, hyper)
    for kind in expected:
        np.testing.assert_allclose(
            actual[kind], expected[kind][rows][:, columns], rtol=1e-4, atol=1e-5
        )


@all_methods
def test_padded_words_change_nothing(name):
    _, hyper, params, memory = initialise(name)
    images, texts = features.draw_features()
    padded = features.append_padding(texts)
    for kind, expected in SIMILARITY[name](params, memory, images, texts, hyper).items():
        actual = SIMILARITY[name](params, memory, images, padded, hyper)[kind]
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    maps, weight = HEATMAP[name](params, memory, images, texts, hyper)
    padded_maps, padded_weight = HEATMAP[name](params, memory, images, padded, hyper)
    num_words = texts.mask.shape[1]
    expected, actual = (x * texts.mask[..., None] for x in (maps, padded_maps[:, :num_words]))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(padded_weight[:, :num_words], weight, rtol=1e-4, atol=1e-5)
    assert (np.asarray(padded_weight)[:, num_words:] == 0).all()


@all_methods
def test_heat_maps_are_finite_and_fit_the_grid(name):
    _, hyper, params, memory = initialise(name)
    images, texts = features.draw_features()
    maps, weight = HEATMAP[name](params, memory, images, texts, hyper)
    num_pixels = np.prod(images.fine_grid if name == "plan" else images.grid)
    assert maps.shape == (*texts.mask.shape, num_pixels)
    assert np.isfinite(maps).all() and (np.asarray(weight) >= 0).all()


@all_methods
def test_the_score_of_a_pair_does_not_depend_on_the_batch(name):
    _, hyper, params, memory = initialise(name)
    images, texts = features.draw_features()
    tables = SIMILARITY[name](params, memory, images, texts, hyper)
    pair = features.permute(images, np.array([2])), features.permute(texts, np.array([4]))
    for kind, score in SIMILARITY[name](params, memory, *pair, hyper).items():
        np.testing.assert_allclose(score[0, 0], tables[kind][2, 4], rtol=1e-4, atol=1e-5)


def make_gradient(name, pairs, dim, fine=False, **changes):
    """Returns the gradient of a loss by the features of both sides, and features of many pixels."""
    method, hyper, params, memory = initialise(name, dim, **MEMORY_HYPERS.get(name, {}) | changes)
    sides = features.draw_features(pairs, words=24, dim=dim, grid=(19, 19), fine=fine)
    extra = features.draw_extra(sides[1])

    def compute_loss(images, texts):
        options = {"key": KEY, "step": jnp.array(9), "hyper": hyper}
        return method.loss(params, memory, images, texts, extra, **options)[0]

    return jax.grad(compute_loss, (0, 1), allow_int=True), sides


@pytest.mark.parametrize(
    ("name", "fine"), [*((name, False) for name in METHODS if name != "convirt"), ("plan", True)]
)
def test_no_array_of_the_local_loss_grows_faster_than_the_batch(name, fine):
    """Compares the largest arrays of the gradient's program at B = 16 and B = 128.

    The maps are as large as the papers' (19 x 19), where tables [B B] of scores do not matter.
    ConVIRT is left out, because it has only such a table. The memory of the compiled program is
    compared in soak/test_memory.py. Vectors are short, since a table of the batch's pairs would
    else be no larger than a batch of pixels; a small `guide_sigma` keeps affinities small too.
    """
    changes = {"guide_sigma": 0.5} if fine else {}
    sizes = {}
    for pairs in (16, 128):
        gradient, sides = make_gradient(name, pairs, 16, fine, **changes)
        program = jax.make_jaxpr(gradient)(*sides)
        sizes[pairs] = max(features.list_array_sizes(program.jaxpr))
    assert sizes[128] <= 8 * sizes[16], sizes


def extreme_values(kind):
    """Returns values for a field of this type: extreme ones, wrong ones, and of other types."""
    if typing.get_origin(kind) is typing.Literal:
        return (*typing.get_args(kind), "", "nonsense", None, 1)
    if kind is bool:
        return True, False, "yes", None, 2
    # The config converts ints to floats before a Hyper is built.
    numbers = [kind(compute_loss) for compute_loss in (-1, 0, 1, 10**12 if kind is int else 1e30)]
    return *numbers, -numbers[-1], float("nan"), float("inf"), "", None, True


CONSTANTS = [
    (name, field.name)
    for name in sorted(METHODS)
    for field in dataclasses.fields(METHODS[name].Hyper)
]


@functools.cache
def compute_tiny_loss(name, hyper):
    """Returns the loss of two pairs.

    Cached, because the extreme value of a constant is often its default, and the defaults are the
    same for all constants of a method. Not jitted: compiling a whole program for each value would
    take minutes.
    """
    method, sides = METHODS[name], features.draw_features(pairs=2, words=3, grid=(2, 2))
    extra = features.draw_extra(sides[1]) | {"teacher": sides, "concise": sides[1]}
    params, memory = method.init(KEY, features.make_context(), hyper)
    loss, _ = method.loss(params, memory, *sides, extra, key=KEY, step=jnp.array(9), hyper=hyper)
    return loss


@pytest.mark.parametrize(("name", "constant"), CONSTANTS)
def test_an_extreme_constant_runs_or_is_refused_by_a_sentence(name, constant):
    method = METHODS[name]
    kind = next(field.type for field in dataclasses.fields(method.Hyper) if field.name == constant)
    num_refused = 0
    for value in extreme_values(kind):
        try:
            hyper = method.Hyper(**SMALL_HYPERS.get(name, {}) | {constant: value})
            assert np.isfinite(compute_tiny_loss(name, hyper)), (constant, value)
        except UserError as error:
            num_refused += 1
            assert str(error).startswith(f"hyper.{constant} is {value!r}"), error
            assert "; use " in str(error), error
    assert num_refused >= 3, "values of another type are refused"


def test_the_averaged_model_is_refused_where_there_is_none():
    context = dataclasses.replace(features.make_context(), ema_decay=0.0)
    plan = METHODS["plan"]
    with pytest.raises(UserError, match=r"hyper.progress is ema.*set config.ema_decay=0.99"):
        plan.init(KEY, context, plan.Hyper(progress="ema"))
