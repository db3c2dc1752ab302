"""Heads on towers: what is cached, frozen and fitted; a fit that was stopped goes on the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from plan_jax import optim
from plan_jax.heads import head_on_tower
from plan_jax.types import Stages, Tower, UserError


class Net(nn.Module):
    """Patches of an image, a layer, BatchNorm."""

    @nn.compact
    def __call__(self, x, train):
        """Give a map of 2 x 2."""
        x = x.astype(jnp.float32).reshape(-1, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4) / 255
        x = nn.Dense(6, name="fc")(x.reshape(-1, 2, 2, 4))
        return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))


class Head(nn.Module):
    """A linear layer."""

    @nn.compact
    def __call__(self, seen, rows, train=False):
        """Say one number for each image."""
        return nn.Dense(1)(seen)[:, 0]


def make_tower():
    net = Net()
    variables = net.init(jax.random.key(0), jnp.zeros((2, 4, 4, 1), jnp.uint8), False)

    def apply(variables, images, train=False, native=False):
        if not train:
            x, stats = net.apply(variables, images, False), variables["batch_stats"]
        else:
            x, changed = net.apply(variables, images, True, mutable=["batch_stats"])
            stats = changed["batch_stats"]
        return Stages(x.mean((1, 2)) + (100.0 if native else 0.0), (x,)), stats

    return Tower("net", variables, apply)


def data(count, seed=0):
    """Images whose upper half is bright or not, and which."""
    rng = np.random.default_rng(seed)
    label = rng.random(count) < 0.5
    images = rng.integers(0, 120, (count, 4, 4, 1)).astype(np.uint8)
    images[label, :2] += 100
    return images, label.astype(np.float32)


def criterion(outputs, rows):
    return optax.sigmoid_binary_cross_entropy(outputs, rows["label"]).mean()


def attached(mode="frozen", **options):
    images, label = data(2)
    example = {"image": images, "label": label}
    return head_on_tower.attach(
        make_tower(),
        Head(),
        criterion,
        example,
        pick=lambda stages: stages.pooled,
        mode=mode,
        native=False,
        **options,
    )


def fitted(made, epochs=20, folder=None, rate=0.05, **options):
    parts = []
    for count, seed in ((64, 1), (30, 2)):
        images, label = data(count, seed)
        parts.append(made.rows(images) | {"label": label})
    settings = {"batch": 16, "patience": 50, "seed": 3, "folder": folder} | options
    return optim.fit_head(
        made.loss, made.params, made.stats, *parts, optax.adam(rate), epochs=epochs, **settings
    )


def test_a_head_on_frozen_features_learns_and_leaves_the_tower_alone():
    made = attached()
    fit = fitted(made)
    images, label = data(50, 9)
    said = made.predict(fit.params, fit.stats, made.rows(images)) > 0
    assert (said == (label > 0)).mean() > 0.9
    assert fit.history[-1]["loss"] < 0.8 * fit.history[0]["loss"]
    assert fit.best == max(row["score"] for row in fit.history)
    assert not jax.tree.leaves(fit.params["tower"])
    same = jax.tree.map(np.array_equal, fit.stats["tower"], made.stats["tower"])
    assert all(jax.tree.leaves(same))


def test_cached_features_are_the_computed_ones():
    kept, fresh = attached(), attached(limit=0)
    images, label = data(70)
    rows = kept.rows(images)
    assert set(rows) == {"seen"} and set(fresh.rows(images)) == {"image"}
    seen = fresh.see(fresh.params, fresh.stats, {"image": images})
    np.testing.assert_allclose(rows["seen"], seen, rtol=1e-6)
    one, other = fitted(kept), fitted(fresh)
    losses = [[row["loss"] for row in fit.history] for fit in (one, other)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_finetuning_moves_the_tower_and_its_statistics():
    made = attached("finetune")
    fit = fitted(made, epochs=3)
    for moved, held in (
        (fit.params["tower"], made.params["tower"]),
        (fit.stats["tower"], made.stats["tower"]),
    ):
        same = jax.tree.leaves(jax.tree.map(np.array_equal, moved, held))
        assert not any(same)


def test_frozen_in_training_mode_moves_statistics_only():
    made = attached("frozen_train_norm")
    fit = fitted(made, epochs=2)
    assert not jax.tree.leaves(fit.params["tower"])
    same = jax.tree.map(np.array_equal, fit.stats["tower"], made.stats["tower"])
    assert not any(jax.tree.leaves(same))


def test_the_head_says_the_same_however_many_rows_there_are():
    made = attached()
    images, _ = data(67)
    whole = made.predict(made.params, made.stats, made.rows(images))
    some = made.predict(made.params, made.stats, made.rows(images[:5]))
    assert whole.shape == (67,)
    np.testing.assert_allclose(whole[:5], some, rtol=1e-6)


def test_features_that_are_no_numbers_are_named():
    with pytest.raises(UserError, match=r"features of 1 of 3 images are not finite \(the first is"):
        head_on_tower.finite({"a": np.array([[1.0], [np.nan], [2.0]])})


def test_a_stopped_fit_goes_on_to_the_same_end(tmp_path):
    made = attached()
    whole = fitted(made, epochs=6)

    class Stopped(Exception):
        pass

    calls = []

    def judge(params, stats):
        calls.append(1)
        if len(calls) == 4:
            raise Stopped
        return float(len(calls))

    with pytest.raises(Stopped):
        fitted(made, epochs=6, folder=tmp_path, judge=judge)
    kept = list(tmp_path.glob("head-*.msgpack"))
    assert len(kept) == 1
    calls[:] = [1] * 10  # were an epoch judged again, it would be seen in its score
    again = fitted(made, epochs=6, folder=tmp_path, judge=judge)
    assert [row["score"] for row in again.history] == [1, 2, 3, 11, 12, 13]
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(a, b)
    done = fitted(made, epochs=6, folder=tmp_path, judge=judge)
    assert len(calls) == 13 and done.history == again.history


def test_a_broken_file_of_a_fit_is_named_and_made_again(tmp_path, capsys):
    made = attached()
    first = fitted(made, epochs=2, folder=tmp_path)
    (path,) = tmp_path.glob("head-*.msgpack")
    path.write_bytes(path.read_bytes()[:50])
    again = fitted(made, epochs=2, folder=tmp_path)
    assert "is broken" in capsys.readouterr().err
    assert again.history == first.history


def test_other_settings_are_another_fit(tmp_path):
    made = attached()
    fitted(made, epochs=1, folder=tmp_path)
    fitted(made, epochs=2, folder=tmp_path)
    fitted(made, epochs=1, folder=tmp_path, about="other")
    assert len(list(tmp_path.glob("head-*.msgpack"))) == 3
    images, label = data(64, 1)
    rows = made.rows(images) | {"label": label}
    for changed in (0, 40):  # of the rows to fit, and of those to validate, one label in the middle
        other = rows | {"label": np.where(np.arange(64) == changed, 1 - label, label)}
        for parts in ((rows, other), (other, rows)):
            optim.fit_head(
                made.loss,
                made.params,
                made.stats,
                *parts,
                optax.sgd(0.1),
                batch=16,
                epochs=1,
                patience=1,
                seed=0,
                folder=tmp_path,
            )
    assert len(list(tmp_path.glob("head-*.msgpack"))) == 7


def test_patience_ends_a_fit_and_the_best_epoch_is_kept():
    made = attached()
    scores = iter([1.0, 3.0, 2.0, 2.0, 2.0, 9.0])
    seen = []

    def judge(params, stats):
        seen.append(params)
        return next(scores)

    fit = fitted(made, epochs=20, patience=3, judge=judge)
    assert len(fit.history) == 5 and fit.best == 3.0
    assert fit.params is seen[1]


def test_the_validation_loss_is_that_of_all_rows():
    made = attached()
    images, label = data(30, 2)
    fit = fitted(made, epochs=1)
    rows = made.rows(images) | {"label": label}
    value, _ = made.loss(fit.params, fit.stats, rows, jax.random.key(0), False)
    assert fit.best == pytest.approx(-float(value), rel=1e-5)


def test_nothing_to_fit_and_a_loss_that_is_no_number_are_said():
    made = attached()
    rows = {"seen": np.zeros((0, 6), np.float32), "label": np.zeros(0, np.float32)}
    with pytest.raises(UserError, match="head has no rows to be fitted to"):
        optim.fit_head(
            made.loss,
            made.params,
            made.stats,
            rows,
            rows,
            optax.sgd(0.1),
            batch=4,
            epochs=1,
            patience=1,
            seed=0,
        )
    with pytest.raises(UserError, match="loss of head is (nan|inf) in epoch [12]; lower its rate"):
        fitted(made, rate=1e38)
