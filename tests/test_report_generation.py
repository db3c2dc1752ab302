"""Report generation: the optimiser, the metrics, and a decoder that learns to write reports."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from task_runs import check_task, run_task

from plan_jax.heads.vocabulary import Vocabulary
from plan_jax.tasks import report_generation
from plan_jax.tasks.report_generation import Options
from plan_jax.types import Model, Record, Stages, Tower, UserError

SIDE = 8
FINDINGS = ("nodule", "effusion")
REPORTS = (
    "1. Heart is normal.\n2. No nodule, no effusion.",
    "Heart is normal. Small nodule in the left lung. No effusion.",
    "There is effusion on the right side!  Heart is large.",
    "Nodule, 1.5 cm; and effusion.",
)
QUICK = Options(
    max_length=16,
    min_count=2,
    width=32,
    feed_forward=32,
    heads=2,
    encoder_layers=1,
    layers=1,
    visual_dropout=0.1,
    learning_rate=1e-2,
    clip_value=1.0,
    epochs=30,
    beam_size=2,
    num_examples=3,
)


def make_tower():
    """Means of the image's quarters in three channels, times a scale that can be fitted."""
    variables = {"params": {"scale": np.ones(3, np.float32)}, "batch_stats": {}}

    def apply(variables, images, train=False, native=False):
        x = images.astype(jnp.float32).reshape(-1, 2, SIDE // 2, 2, SIDE // 2).mean((2, 4)) / 255
        maps = jnp.stack([x, 1 - x, 0.5 * jnp.ones_like(x)], -1) * variables["params"]["scale"]
        return Stages(maps.reshape(len(x), -1), (maps,)), variables["batch_stats"]

    return Tower("quarters", variables, apply)


def make_model(tower=None):
    return Model("fake", (2, 2), 0, SIDE, None, None, None, None, tower=tower or make_tower())


def make_splits(counts=(64, 16, 24), seed=0):
    """Images whose bright quarter determines the report."""
    random, splits = np.random.default_rng(seed), {}
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        splits[split] = []
        for n in range(count):
            image, kind = random.integers(0, 60, (SIDE, SIDE, 1)), int(random.integers(4))
            y, x = divmod(kind, 2)
            image[4 * y : 4 * y + 4, 4 * x : 4 * x + 4] += 150
            splits[split].append(Record(image.astype(np.uint8), REPORTS[kind], f"{split}{n}"))
    return splits


def label_report(text):
    """Returns the findings of a text, denied where `no` precedes them."""
    words = re.findall(r"[a-z]+", text.lower())
    preceding = dict(zip(words[1:], words, strict=False))
    return {name: int(preceding.get(name) != "no") for name in FINDINGS if name in words}


def run(splits, options=QUICK, **context):
    context |= {"findings": FINDINGS, "label_report": label_report}
    return run_task(report_generation, make_model(), splits, options, **context)


@pytest.fixture(scope="module")
def learned_case(tmp_path_factory):
    """Metrics and examples of a decoder after a fit, and the folder of the fit."""
    folder = tmp_path_factory.mktemp("fits")
    return *run(make_splits(), folder=folder), folder


def test_the_decoder_learns_which_report_belongs_to_an_image(learned_case):
    values, examples, _ = learned_case
    assert values["strict/bleu4"] > 0.95 and values["strict/rouge_l"] > 0.95
    assert values["strict/meteor_no_synonyms"] > 0.95 and values["strict/cider"] > 9
    assert values["ce/f1_micro"] == values["ce/f1_macro"] == 1
    assert values["distinct"] == 4 / 24 and 5 < values["words"] < 14
    assert len(examples) == 3
    assert all(example.generated == example.reference for example in examples)
    assert examples[0].image.shape == (SIDE, SIDE, 1)


def test_every_metric_has_its_baselines(learned_case):
    values, _, _ = learned_case
    keys = [key for key in values if key.split("/")[0] in ("strict", "r2gen", "ce")]
    assert len(keys) == 7 + 8 + 7
    for baseline in ("retrieval", "common"):
        assert all(f"{baseline}/{key}" in values for key in keys)
    assert values["retrieval/strict/bleu4"] == pytest.approx(1)
    assert values["retrieval/ce/f1_micro"] == 1
    assert values["common/strict/bleu4"] < 0.8 < values["strict/bleu4"]
    assert values["n_train"] == 64 and values["n_test"] == 24 and values["reports_empty"] == 0
    assert values["vocabulary"] == 20 and 1 <= values["epochs"] <= 30


def test_a_saved_fit_is_not_repeated(learned_case):
    values, examples, folder = learned_case
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(times) == 1
    second_values, second_examples = run(make_splits(), folder=folder)
    assert second_values == values
    assert [x.generated for x in second_examples] == [x.generated for x in examples]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_a_tower_is_finetuned_and_the_epoch_selected_by_bleu(monkeypatch):
    fits, fit_head = [], report_generation.fit_head

    def recording_fit_head(*args, **options):
        fits.append((fit_head(*args, **options), args))
        return fits[-1][0]

    monkeypatch.setattr(report_generation, "fit_head", recording_fit_head)
    options = dataclasses.replace(
        QUICK,
        mode="finetune",
        select_by="bleu4",
        beam_size=1,
        epochs=2,
        max_train_records=20,
        max_test_records=5,
        visual_learning_rate=1e-3,
    )
    splits = make_splits((30, 6, 9))
    splits["train"][3:7] = [dataclasses.replace(r, text=" \n.") for r in splits["train"][3:7]]
    values, _ = run(splits, options)
    fit_result, (_, _, _, train, *_) = fits[0]
    assert train["tokens"].shape == (20, 15) and "image" in train
    assert len(fit_result.history) == 2
    assert all(0 <= epoch["score"] <= 1 for epoch in fit_result.history)
    change = np.abs(fit_result.params["tower"]["scale"] - 1)
    assert 1e-4 < change.max() < 4e-3  # as far as two steps of visual_learning_rate reach
    assert values["n_train"] == 20 and values["n_test"] == 5 and values["reports_empty"] == 4
    assert values["retrieval/ce/f1_micro"] == 1  # by the tower before the fit


def test_the_optimiser_is_that_of_torch_with_amsgrad_and_l2():
    options = Options(
        epochs=4,
        decay_epochs=2,
        learning_rate=0.1,
        visual_learning_rate=0.01,
        weight_decay=0.3,
        clip_value=0.5,
    )
    optimiser = report_generation.build_optimiser(options, steps_per_epoch=1)
    params = {"head": {"w": jnp.array([2.0, -1.0])}, "tower": {"w": jnp.array([2.0, -1.0])}}
    state, update = optimiser.init(params), jax.jit(optimiser.update)
    expected = {name: np.array([2.0, -1.0]) for name in params}
    moments = {name: [np.zeros(2) for _ in range(3)] for name in params}
    for n, gradient in enumerate(([4.0, 0.1], [-0.2, 0.3], [0.1, -9.0], [0.1, 0.1]), 1):
        gradients = jax.tree.map(lambda _, g=gradient: jnp.array(g), params)
        updates, state = update(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for name, rate in (("head", 0.1), ("tower", 0.01)):
            m, v, v_max = moments[name]
            g = np.clip(gradient, -0.5, 0.5) + 0.3 * expected[name]
            m[:], v[:] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            v_max[:] = np.maximum(v_max, v / (1 - 0.999**n))
            rate *= 0.1 ** ((n - 1) // 2)
            expected[name] = expected[name] - rate * m / (1 - 0.9**n) / (np.sqrt(v_max) + 1e-8)
            np.testing.assert_allclose(params[name]["w"], expected[name], rtol=1e-4)


def test_rare_words_and_cut_ends_lower_the_strict_metrics_only():
    vocabulary = Vocabulary((".", "heart", "is", "no", "effusion", "nodule"))
    generated = ["heart is <unk> . no effusion", "no nodule ."]
    references = ["heart is cardiomegalic . no effusion . nodule is seen .", "no nodule ."]
    options = dataclasses.replace(QUICK, max_length=7)
    values = report_generation._report_scores(
        generated, references, vocabulary, options, label_report
    )
    assert values["r2gen/bleu4"] == values["r2gen/rouge_l"] == pytest.approx(1)
    assert values["r2gen/rouge_l_balanced"] == pytest.approx(1)
    assert values["strict/bleu1"] < 0.7 and values["strict/rouge_l"] < 0.9
    assert values["ce/recall_micro"] == 0 and values["ce/findings"] == 1


def test_rouge_of_r2gen_weighs_recall_as_coco_does():
    """Two of four generated words, and two of three of the reference: P 1/2, R 2/3."""
    vocabulary = Vocabulary((".", "a", "b", "c", "d", "e"))
    texts = ["a b c d"], ["a b e"]
    values = report_generation._report_scores(*texts, vocabulary, QUICK, label_report)
    beta = 1.2**2
    assert values["r2gen/rouge_l"] == pytest.approx((1 + beta) / 3 / (2 / 3 + beta / 2))
    balanced = 2 * (1 / 3) / (1 / 2 + 2 / 3)
    assert values["r2gen/rouge_l_balanced"] == values["strict/rouge_l"] == pytest.approx(balanced)
    assert "strict/rouge_l_coco" not in values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"width": 30, "heads": 4},
            "report_generation.width 30 is not divisible by 4 heads; use 28 or 32",
        ),
        ({"width": 3, "heads": 4}, "width 3 is not divisible by 4 heads; use 4$"),
        ({"beam_size": 0}, "report_generation.beam_size is 0; use at least 1"),
        ({"length_penalty": -1.0}, "report_generation.length_penalty is -1.0; use at least 0"),
        ({"max_length": 1}, "report_generation.max_length is 1; use at least 2"),
        (
            {"cleaning": "published"},
            "cleaning is 'published'; use one of fixed, published_iu, published_mimic",
        ),
    ],
)
def test_options_check_their_ranges(options, message):
    with pytest.raises(UserError, match=message):
        Options(**options)


def test_data_without_reports_are_refused():
    splits = make_splits((4, 2, 2))
    check_task(report_generation, splits, QUICK)
    empty = [dataclasses.replace(record, text="") for record in splits["val"]]
    for changed, count in (({**splits, "val": empty}, 2), ({"train": splits["train"]}, 0)):
        message = f"needs text in split val, and none of its {count} records has any; add reports"
        with pytest.raises(UserError, match=message):
            check_task(report_generation, changed, QUICK)
    message = "report_generation.min_count 99 leaves no word of 4 reports; lower it"
    with pytest.raises(UserError, match=message):
        run(splits, dataclasses.replace(QUICK, min_count=99))
    no_tower = dataclasses.replace(make_model(), tower=None)
    with pytest.raises(UserError, match="fake has no image tower to fit a head to; load"):
        run_task(report_generation, no_tower, splits, QUICK, label_report=label_report)
