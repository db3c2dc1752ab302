"""The least bytes that the devices have to exchange, by their formulas."""

from plan_jax.methods import METHODS
from plan_jax.preflight import minimum


def test_one_device_sends_nothing():
    hyper = METHODS["plan"].Hyper()
    sizes = minimum.Sizes(1, 16, 8, 20, 1000, 32)
    assert minimum.minimum_bytes("plan", hyper, sizes) == {}


def test_the_sigmoid_loss_sends_texts_around_the_ring():
    sizes = minimum.Sizes(devices=4, batch=8, dim=10, max_words=5, num_parameters=100)
    hyper = METHODS["convirt"].Hyper(contrast="sigmoid")
    expected = {"all-reduce": 400, "collective-permute": 2 * 3 * 2 * 10 * 4}
    assert minimum.minimum_bytes("convirt", hyper, sizes) == expected


def test_the_words_of_plan_travel_after_the_draw():
    sizes = minimum.Sizes(devices=4, batch=8, dim=10, max_words=50, num_parameters=0)
    hyper = METHODS["plan"].Hyper(num_sampled_words=3, rounds=0)
    numbers = 10 + 3 * 10  # the report's vector and three words
    columns = 2 + 3  # of the cosines, of the reports' scores, and of each word
    assert minimum.loss_bytes("plan", hyper, sizes) == {
        "all-gather": 2 * (4 * numbers + 4 * 3),
        "reduce-scatter": 8 * 4 * numbers,
        "all-reduce": 4 * (8 * 2 * columns + 8 * 3 * 3),
    }
