"""Fits of heads: resumption, early stopping, the best epoch, mistakes."""

import chex
import jax
import numpy as np
import optax
import pytest
from fitted_heads import attach_scalar_head, fit_scalar_head, labelled_images

from plan_jax.heads import fit
from plan_jax.heads.examples import StoredRows
from plan_jax.types import UserError


def test_an_interrupted_fit_resumes_to_the_same_result(tmp_path):
    attached = attach_scalar_head()
    uninterrupted = fit_scalar_head(attached, epochs=6)

    class Interrupted(Exception):
        pass

    calls = []

    def score(params, stats):
        calls.append(1)
        if len(calls) == 4:
            raise Interrupted
        return float(len(calls))

    with pytest.raises(Interrupted):
        fit_scalar_head(attached, epochs=6, folder=tmp_path, score=score)
    assert len(list(tmp_path.glob("head-*.msgpack"))) == 1
    calls[:] = [1] * 10  # an epoch scored again would show in its score
    resumed = fit_scalar_head(attached, epochs=6, folder=tmp_path, score=score)
    assert [epoch["score"] for epoch in resumed.history] == [1, 2, 3, 11, 12, 13]
    chex.assert_trees_all_equal(resumed.params, uninterrupted.params)
    complete = fit_scalar_head(attached, epochs=6, folder=tmp_path, score=score)
    assert len(calls) == 13 and complete.history == resumed.history


def test_a_fit_to_images_on_disk_is_that_to_images_in_memory(tmp_path):
    """Fine-tuning reads every image again in each epoch, in the same order; a fit of it resumes."""
    fits = []
    for stored in (False, True):
        attached = attach_scalar_head("finetune")
        fits.append(fit_scalar_head(attached, epochs=2, folder=tmp_path, stored=stored))
    chex.assert_trees_all_equal(fits[0].params, fits[1].params)
    assert fits[0].history == fits[1].history
    assert len(list(tmp_path.glob("head-*.msgpack"))) == 2
    fit_scalar_head(attached, epochs=2, folder=tmp_path, stored=True)
    assert len(list(tmp_path.glob("head-*.msgpack"))) == 2


def test_a_fit_ends_where_the_run_has_to_stop():
    calls = []

    class Stopped(Exception):
        pass

    def check_stop():
        calls.append(1)
        if len(calls) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        fit_scalar_head(attach_scalar_head(), epochs=6, check_stop=check_stop)
    assert len(calls) == 2


def test_a_broken_state_is_reported_and_fitted_again(tmp_path, capsys):
    attached = attach_scalar_head()
    first = fit_scalar_head(attached, epochs=2, folder=tmp_path)
    (path,) = tmp_path.glob("head-*.msgpack")
    path.write_bytes(path.read_bytes()[:50])
    second = fit_scalar_head(attached, epochs=2, folder=tmp_path)
    message = capsys.readouterr().err
    assert f"{path} is broken" in message and "fitting the head again" in message
    assert second.history == first.history


def test_a_folder_that_cannot_be_used_does_not_end_a_fit(tmp_path, capsys):
    """A run on a disk that is full or read-only: the numbers are the same, and one line says so."""
    attached = attach_scalar_head()
    (tmp_path / "fits").write_text("a file, where the folder should be")
    result = fit_scalar_head(attached, epochs=2, folder=tmp_path / "fits")
    assert result.history == fit_scalar_head(attached, epochs=2).history
    message = capsys.readouterr().err
    assert (
        "cannot be written (File exists); choose another folder; the fit of head goes on" in message
    )
    assert message.count("cannot be resumed") == 1


def test_different_settings_and_data_are_different_fits(tmp_path):
    attached = attach_scalar_head()
    fit_scalar_head(attached, epochs=1, folder=tmp_path)
    fit_scalar_head(attached, epochs=2, folder=tmp_path)
    fit_scalar_head(attached, epochs=1, folder=tmp_path, description="different")
    assert len(list(tmp_path.glob("head-*.msgpack"))) == 3
    images, labels = labelled_images(64, 1)
    examples = attached.examples(images) | {"label": labels}
    for index in (0, 40):  # one changed label, of the examples to fit or of those to validate
        changed_labels = np.where(np.arange(64) == index, 1 - labels, labels)
        changed = examples | {"label": changed_labels}
        for splits in ((examples, changed), (changed, examples)):
            fit.fit_head(
                attached.loss,
                attached.params,
                attached.stats,
                *splits,
                optax.sgd(0.1),
                batch=16,
                epochs=1,
                patience=1,
                seed=0,
                folder=tmp_path,
            )
    assert len(list(tmp_path.glob("head-*.msgpack"))) == 7


def test_a_fit_does_not_depend_on_the_last_bits_of_its_features(tmp_path):
    """They are those of the devices that computed them; tower and images identify the fit."""
    attached = attach_scalar_head()
    images, labels = labelled_images(64, 1)
    other_images = images.copy()
    other_images[5, 0, 0] += 1
    first = attached.examples(images) | {"label": labels}
    rounded = first | {"features": np.nextafter(first["features"], np.float32(9))}
    stored = StoredRows(images.__getitem__, range(64), (4, 4, 1), np.uint8, str)
    other_tower = attach_scalar_head(select=lambda stages: 2 * stages.pooled)
    counts = []
    for examples in (
        first,
        rounded,
        attached.examples(other_images) | {"label": labels},
        attached.examples(stored) | {"label": labels},
        other_tower.examples(images) | {"label": labels},
    ):
        stats = attached.stats | {"head": {"mean": examples["features"].mean(0)}}
        fit.fit_head(
            attached.loss,
            attached.params,
            stats,
            examples,
            examples,
            optax.sgd(0.1),
            batch=16,
            epochs=1,
            patience=1,
            seed=0,
            folder=tmp_path,
        )
        counts.append(len(list(tmp_path.iterdir())))
    assert counts == [1, 1, 2, 3, 4]


def test_patience_stops_a_fit_and_the_best_epoch_is_returned():
    scores = iter([1.0, 3.0, 2.0, 2.0, 2.0, 9.0])
    scored_params = []

    def score(params, stats):
        scored_params.append(params)
        return next(scores)

    fit_result = fit_scalar_head(attach_scalar_head(), epochs=20, patience=3, score=score)
    assert len(fit_result.history) == 5 and fit_result.score == 3.0
    assert fit_result.params is scored_params[1]


def test_the_validation_loss_is_the_mean_over_all_examples():
    attached = attach_scalar_head()
    images, labels = labelled_images(30, 2)
    fit_result = fit_scalar_head(attached, epochs=1)
    examples = attached.examples(images) | {"label": labels}
    value, _ = attached.loss(
        fit_result.params, fit_result.stats, examples, jax.random.key(0), False
    )
    assert fit_result.score == pytest.approx(-float(value), rel=1e-5)


def test_no_examples_and_a_loss_that_is_not_finite_are_mistakes():
    attached = attach_scalar_head()
    empty = {"features": np.zeros((0, 6), np.float32), "label": np.zeros(0, np.float32)}
    with pytest.raises(UserError, match="head has no examples to fit to; give more records"):
        fit.fit_head(
            attached.loss,
            attached.params,
            attached.stats,
            empty,
            empty,
            optax.sgd(0.1),
            batch=4,
            epochs=1,
            patience=1,
            seed=0,
        )
    message = "loss of head is (nan|inf) in epoch [12]; lower learning_rate$"
    with pytest.raises(UserError, match=message):
        fit_scalar_head(attached, learning_rate=1e38)
