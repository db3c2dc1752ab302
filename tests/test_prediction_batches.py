"""Many pairs: each image and phrase is encoded once, and faults do not end the others."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_models import draw_film, make_tiny_model

from plan_jax import prediction
from plan_jax.prediction import batches
from plan_jax.prediction.batches import Job

TEXTS = ["pleural effusion on the left", "no effusion", "nodule in the right upper zone"]


@pytest.fixture(autouse=True)
def in_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def save_films(count):
    names = [f"{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        Image.fromarray(draw_film(40 + number, 33, number)).save(name)
    return names


def count_calls(model):
    """Returns the model, and the images and texts that it encodes, padding left out."""
    images, texts = [], []

    def encode_image(batch):
        images.extend({image.tobytes() for image in batch})
        return model.encode_image(batch)

    def encode_text(batch):
        texts.extend(dict.fromkeys(batch))
        return model.encode_text(batch)

    return replace(model, encode_image=encode_image, encode_text=encode_text), images, texts


def locate(model, jobs, **options):
    clock = batches.Clock()
    outcomes = list(batches.ground_jobs(model, jobs, prediction.Options(**options), clock))
    return outcomes, clock


@pytest.mark.parametrize(("num_images", "num_texts"), [(1, 1), (2, 1), (5, 1), (6, 3), (1, 3)])
def test_pairs_have_the_groundings_of_single_calls(num_images, num_texts):
    model, names = make_tiny_model(), save_films(num_images)
    counted, images, texts = count_calls(model)
    jobs = batches.list_products(names, TEXTS[:num_texts])
    outcomes, clock = locate(counted, jobs)
    assert [outcome.row for outcome in outcomes] == list(range(1, num_images * num_texts + 1))
    # One more image, and one phrase a second time, to compile.
    assert len(images) == num_images + 1 and len(texts) == num_texts + 1
    assert len(clock.latencies) == num_images and min(clock.latencies) > 0
    for outcome in outcomes[:: max(1, len(outcomes) // 4)]:
        with pytest.warns(UserWarning, match="phantoms"):
            single = model.ground(outcome.image, outcome.text)
        grounding = outcome.grounding
        np.testing.assert_allclose(grounding.heat_map, single.heat_map, atol=1e-4)
        assert grounding.similarity == pytest.approx(single.similarity, abs=1e-3)
        assert grounding.heat_map.shape == np.asarray(Image.open(outcome.image)).shape


def test_faults_are_named_and_the_others_go_on():
    names = save_films(3)
    with open("bad.png", "w") as file:
        file.write("text")
    jobs = [
        Job(names[0], "first", ["effusion", "...", "no effusion"], [1, 2, 7]),
        Job("bad.png", "bad", ["effusion", "nodule"], [3, 4]),
        Job("", "cell", ["effusion"], [5], fault="names no image"),
        Job(names[1], "last", ["effusion"], [6]),
    ]
    outcomes, clock = locate(make_tiny_model(), jobs)
    faults = {outcome.row: outcome for outcome in outcomes if outcome.grounding is None}
    assert [outcome.row for outcome in outcomes] == [1, 2, 7, 3, 4, 5, 6]
    assert sorted(faults) == [2, 3, 4, 5]
    assert "has no word" in faults[2].fault
    assert faults[3].fault.startswith("bad is not an image") and faults[3].text == "effusion"
    assert faults[5].fault == "names no image" and faults[5].image == "cell"
    assert len(clock.latencies) == 2


def test_a_map_that_is_not_finite_does_not_end_the_others():
    model, names = make_tiny_model(), save_films(3)
    calls = []

    def heatmap(images, texts, rounds):
        maps, weights = model.heatmap(images, texts, rounds=rounds)
        calls.append(len(maps))
        return (maps * np.nan if len(calls) == 3 else maps), weights  # the second image

    broken = replace(model, heatmap=heatmap)
    outcomes, clock = locate(broken, batches.list_products(names, TEXTS[:1]))
    assert calls == [1, 1, 1, 1]
    assert [outcome.grounding is None for outcome in outcomes] == [False, True, False]
    assert outcomes[1].fault.startswith("the heat map in 1.png has values that are not finite")
    assert len(clock.latencies) == 2


def test_when_no_phrase_can_be_read_nothing_is_computed():
    counted, images, texts = count_calls(make_tiny_model())
    outcomes, clock = locate(counted, batches.list_products(save_films(2), ["...", "\U0001fac1"]))
    assert all("has no word" in outcome.fault for outcome in outcomes) and len(outcomes) == 4
    assert not images and not texts and clock.latencies == []


def test_nothing_is_compiled_for_other_sizes_of_images():
    model, names = make_tiny_model(), save_films(9)
    locate(model, batches.list_products(names[:5], TEXTS[:1]))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compiled.append(event) if "backend_compile" in event else None
    )
    jax.jit(lambda x: x + 1)(1.0)
    assert compiled  # the listener works
    compiled.clear()
    outcomes, _ = locate(model, batches.list_products(names, TEXTS[1:2]))
    assert len({outcome.grounding.heat_map.shape for outcome in outcomes}) == 9 and not compiled


def test_features_of_phrases_are_kept_as_long_as_they_are_needed():
    model = make_tiny_model()
    jobs = [Job("a", "a", TEXTS[:2], [1, 2]), Job("b", "b", TEXTS[1:], [3, 4])]
    cache = batches.TextCache(model, jobs)
    cache.add(TEXTS)
    for text in TEXTS[:2]:
        cache.release(text)
    assert list(cache.features) == TEXTS[1:]
    for text in TEXTS[1:]:
        cache.release(text)
    assert not cache.features and not cache.notes
