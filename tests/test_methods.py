"""The contract that every method keeps, one parametrised test a clause; devices: test_steps.py."""

import dataclasses
import typing

import features
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plan_jax.methods import METHODS
from plan_jax.types import UserError

SMALL = {
    "plan": {"num_sampled_words": 5, "tile_size": 2, "num_candidates": 3},
    "gloria": {"tile_size": 2},
    "asg": {"num_layers": 1, "num_heads": 2, "hidden_dim": 8},
    "mgca": {"num_prototypes": 4, "freeze_prototype_steps": 0, "tile_size": 2},
    "place": {"num_queries": 3},
}
KEY = jax.random.key(0)


SIMILARITY, HEATMAP = (
    {name: jax.jit(getattr(method, verb), static_argnums=4) for name, method in METHODS.items()}
    for verb in ("similarity", "heatmap")
)


def setup(name, dim=8, **changes):
    method = METHODS[name]
    hyper = method.Hyper(**SMALL.get(name, {}) | changes)
    return method, hyper, *method.init(KEY, features.make_context(dim), hyper)


def value(name, images, texts, extra, **changes):
    method, hyper, params, memory = setup(name, images.pooled.shape[-1], **changes)
    return method.loss(
        params, memory, images, texts, extra, key=KEY, step=jnp.array(9), hyper=hyper
    )


LARGE = {"plan": {"num_sampled_words": 12}}  # for the memory of a batch
all_methods = pytest.mark.parametrize("name", sorted(METHODS))


@all_methods
def test_all_have_the_same_names(name):
    method, hyper, params, memory = setup(name)
    assert isinstance(method.PAPER, str) and isinstance(method.REQUIRES, tuple)
    assert dataclasses.is_dataclass(hyper) and hyper == dataclasses.replace(hyper)
    assert isinstance(memory, dict)


@all_methods
def test_loss_is_finite_and_moves_both_towers_and_own_parameters(name):
    method, hyper, params, memory = setup(name)
    images, texts = features.make()
    extra = features.make_extra(texts)

    def objective(parts):
        params, images, texts = parts
        return method.loss(
            params, memory, images, texts, extra, key=KEY, step=jnp.array(9), hyper=hyper
        )[0]

    gradient = jax.jit(jax.value_and_grad(objective, allow_int=True))
    out, grads = gradient((params, images, texts))
    assert np.isfinite(out)
    for leaf in jax.tree.leaves(grads[0]):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0
    for side in grads[1:]:
        assert np.isfinite(side.pooled).all() and np.abs(side.pooled).max() > 0
    if name != "convirt":
        for side in grads[1:]:
            assert np.isfinite(side.local).all() and np.abs(side.local).max() > 0


@all_methods
def test_permuting_pairs_permutes_scores(name):
    method, hyper, params, memory = setup(name)
    images, texts = features.make()
    rows, columns = np.array([3, 0, 5, 1, 4, 2]), np.array([1, 5, 2, 0, 3, 4])
    want = SIMILARITY[name](params, memory, images, texts, hyper)
    moved = features.permute(images, rows), features.permute(texts, columns)
    got = SIMILARITY[name](params, memory, *moved, hyper)
    for kind in want:
        np.testing.assert_allclose(got[kind], want[kind][rows][:, columns], rtol=1e-4, atol=1e-5)


@all_methods
def test_padded_words_change_nothing(name):
    method, hyper, params, memory = setup(name)
    images, texts = features.make()
    padded = features.pad(texts)
    for kind, want in SIMILARITY[name](params, memory, images, texts, hyper).items():
        got = SIMILARITY[name](params, memory, images, padded, hyper)[kind]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    maps, weight = HEATMAP[name](params, memory, images, texts, hyper)
    maps_, weight_ = HEATMAP[name](params, memory, images, padded, hyper)
    words = texts.mask.shape[1]
    np.testing.assert_allclose(
        maps_[:, :words] * texts.mask[..., None], maps * texts.mask[..., None], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(weight_[:, :words], weight, rtol=1e-4, atol=1e-5)
    assert (np.asarray(weight_)[:, words:] == 0).all()


@all_methods
def test_heat_maps_are_finite_and_fit_the_grid(name):
    method, hyper, params, memory = setup(name)
    images, texts = features.make()
    maps, weight = HEATMAP[name](params, memory, images, texts, hyper)
    cells = np.prod(images.fine_grid if name == "plan" else images.grid)
    assert maps.shape == (*texts.mask.shape, cells)
    assert np.isfinite(maps).all() and (np.asarray(weight) >= 0).all()


@all_methods
def test_a_pair_alone_scores_as_in_a_batch(name):
    method, hyper, params, memory = setup(name)
    images, texts = features.make()
    table = SIMILARITY[name](params, memory, images, texts, hyper)
    pair = features.permute(images, np.array([2])), features.permute(texts, np.array([4]))
    for kind, score in SIMILARITY[name](params, memory, *pair, hyper).items():
        np.testing.assert_allclose(score[0, 0], table[kind][2, 4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"convirt"}))
def test_memory_of_the_local_loss_is_at_most_linear_in_the_batch(name):
    """Temporary memory of the compiled loss and its gradient, from B = 16 to 128, on maps as large
    as the papers' (19 x 19), where the B x B tables of scores no longer count. ConVIRT has no more
    than such a table.
    """
    sizes = {}
    for pairs in (16, 128):
        images, texts = features.make(pairs=pairs, words=24, dim=128, grid=(19, 19), fine=False)

        def objective(images, texts):
            extra = features.make_extra(texts)
            return value(name, images, texts, extra, **LARGE.get(name, {}))[0]

        gradient = jax.jit(jax.grad(objective, (0, 1), allow_int=True))
        memory = gradient.lower(images, texts).compile().memory_analysis()
        sizes[pairs] = memory.temp_size_in_bytes
    assert sizes[128] <= 8 * sizes[16], sizes


def extreme_values(kind):
    """Values of every sort for a field of a type: extreme, wrong, and of another type."""
    if typing.get_origin(kind) is typing.Literal:
        return (*typing.get_args(kind), "", "nonsense", None, 1)
    if kind is bool:
        return True, False, "yes", None, 2
    # The config converts ints to floats before a Hyper is built.
    numbers = [kind(value) for value in (-1, 0, 1, 10**12 if kind is int else 1e30)]
    return *numbers, -numbers[-1], float("nan"), float("inf"), "", None, True


CONSTANTS = [
    (name, field.name)
    for name in sorted(METHODS)
    for field in dataclasses.fields(METHODS[name].Hyper)
]


@pytest.mark.parametrize(("name", "constant"), CONSTANTS)
def test_an_extreme_constant_runs_or_is_refused_by_a_sentence(name, constant):
    method, images_and_texts = METHODS[name], features.make(pairs=2, words=3, grid=(2, 2))
    extra = features.make_extra(images_and_texts[1]) | {"teacher": images_and_texts}
    kind = next(f.type for f in dataclasses.fields(method.Hyper) if f.name == constant)
    refused = 0
    for setting in extreme_values(kind):
        try:
            hyper = method.Hyper(**SMALL.get(name, {}) | {constant: setting})
            # Not jitted: compiling a whole program for each setting would take minutes.
            params, memory = method.init(KEY, features.make_context(), hyper)
            arguments = params, memory, *images_and_texts, extra
            loss, _ = method.loss(*arguments, key=KEY, step=jnp.array(9), hyper=hyper)
            assert np.isfinite(loss), (constant, setting)
        except UserError as error:
            refused += 1
            assert str(error).startswith(f"hyper.{constant} is {setting!r}"), error
            assert "; use " in str(error), error
    assert refused >= 3, "values of another type are refused"


def test_the_averaged_model_is_refused_where_there_is_none():
    context = dataclasses.replace(features.make_context(), ema_decay=0.0)
    plan = METHODS["plan"]
    with pytest.raises(UserError, match=r"hyper.progress is ema.*set config.ema_decay=0.99"):
        plan.init(KEY, context, plan.Hyper(progress="ema"))
