"""Report generation: texts cleaned and counted, the optimiser, and a decoder that learns to say."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from task_runs import check_task, run_task

from plan_jax.heads import vocabulary as report_vocabulary
from plan_jax.heads.vocabulary import END, PAD, UNKNOWN, Vocabulary, clean_report, to_sentences
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
    clip_norm=1.0,
    epochs=30,
    beam=2,
    num_examples=3,
)


def make_tower():
    """Means of the image's quarters, each told by three channels; a scale that can be tuned."""
    variables = {"params": {"scale": np.ones(3, np.float32)}, "batch_stats": {}}

    def apply(variables, images, train=False, native=False):
        x = images.astype(jnp.float32).reshape(-1, 2, SIDE // 2, 2, SIDE // 2).mean((2, 4)) / 255
        maps = jnp.stack([x, 1 - x, 0.5 * jnp.ones_like(x)], -1) * variables["params"]["scale"]
        return Stages(maps.reshape(len(x), -1), (maps,)), variables["batch_stats"]

    return Tower("quarters", variables, apply)


def make_model(tower=None):
    return Model("fake", (2, 2), 0, SIDE, None, None, None, None, tower=tower or make_tower())


def make_splits(counts=(64, 16, 24), seed=0):
    """The quarter that is bright says which report an image has."""
    random, splits = np.random.default_rng(seed), {}
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        splits[split] = []
        for n in range(count):
            image, kind = random.integers(0, 60, (SIDE, SIDE, 1)), int(random.integers(4))
            y, x = divmod(kind, 2)
            image[4 * y : 4 * y + 4, 4 * x : 4 * x + 4] += 150
            splits[split].append(Record(image.astype(np.uint8), REPORTS[kind], f"{split}{n}"))
    return splits


def labeller(text):
    """Read findings, denied where `no` stands before them."""
    words = re.findall(r"[a-z]+", text.lower())
    before = dict(zip(words[1:], words, strict=False))
    return {name: int(before.get(name) != "no") for name in FINDINGS if name in words}


def run(splits, options=QUICK, tower=None, **keys):
    model = make_model(tower)
    keys |= {"findings": FINDINGS, "label_report": labeller}
    return run_task(report_generation, model, splits, options, **keys)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """What a decoder says after some epochs, and where its fit is kept."""
    folder = tmp_path_factory.mktemp("fits")
    return *run(make_splits(), folder=folder), folder


def test_the_decoder_learns_which_report_belongs_to_an_image(learned):
    values, rows, _ = learned
    assert values["strict/bleu4"] > 0.95 and values["strict/rouge_l"] > 0.95
    assert values["strict/meteor_no_synonyms"] > 0.95 and values["strict/cider"] > 9
    assert values["ce/f1_micro"] == values["ce/f1_macro"] == 1
    assert values["distinct"] == 4 / 24 and 5 < values["words"] < 14
    same = [row.generated == row.reference for row in rows]
    assert len(rows) == 3 and all(same)
    assert rows[0].image.shape == (SIDE, SIDE, 1)


def test_the_baselines_stand_beside_it(learned):
    values, _, _ = learned
    keys = [key for key in values if key.split("/")[0] in ("strict", "r2gen", "ce")]
    assert len(keys) == 7 + 7 + 7
    for name in ("retrieval", "common"):
        assert all(f"{name}/{key}" in values for key in keys)
    assert values["retrieval/strict/bleu4"] == pytest.approx(1)
    assert values["retrieval/ce/f1_micro"] == 1
    assert values["common/strict/bleu4"] < 0.8 < values["strict/bleu4"]
    assert values["n_train"] == 64 and values["n_test"] == 24 and values["reports_empty"] == 0
    assert values["vocabulary"] == 20 and 1 <= values["epochs"] <= 30


def test_a_fit_that_is_kept_is_not_fitted_again(learned):
    values, rows, folder = learned
    kept = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(kept) == 1
    again, shown = run(make_splits(), folder=folder)
    assert again == values and [r.generated for r in shown] == [r.generated for r in rows]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == kept


def test_a_tower_is_tuned_and_the_epoch_chosen_by_bleu(monkeypatch):
    fits, original = [], report_generation.fit_head

    def fit_head(*args, **keys):
        fits.append((original(*args, **keys), args))
        return fits[-1][0]

    monkeypatch.setattr(report_generation, "fit_head", fit_head)
    options = dataclasses.replace(
        QUICK,
        mode="finetune",
        select="bleu4",
        beam=1,
        epochs=2,
        max_train_records=20,
        max_test_records=5,
        visual_learning_rate=1e-3,
    )
    splits = make_splits((30, 6, 9))
    splits["train"][3:7] = [dataclasses.replace(r, text=" \n.") for r in splits["train"][3:7]]
    values, rows = run(splits, options)
    (fit, args), _ = fits[0], rows
    assert args[3]["tokens"].shape == (20, 15) and "image" in args[3]
    assert all(0 <= row["score"] <= 1 for row in fit.history) and len(fit.history) == 2
    moved = np.abs(fit.params["tower"]["scale"] - 1)
    assert 1e-4 < moved.max() < 4e-3  # as far as two steps of visual_learning_rate go
    assert values["n_train"] == 20 and values["n_test"] == 5 and values["reports_empty"] == 4
    assert values["retrieval/ce/f1_micro"] == 1  # by the tower as it was


def test_adam_is_that_of_torch_with_amsgrad_and_l2():
    options = Options(
        epochs=4,
        rate_step=2,
        learning_rate=0.1,
        visual_learning_rate=0.01,
        weight_decay=0.3,
        clip_norm=0.5,
    )
    tx = report_generation.optimiser(options, steps=1)
    params = {"head": {"w": jnp.array([2.0, -1.0])}, "tower": {"w": jnp.array([2.0, -1.0])}}
    state, update = tx.init(params), jax.jit(tx.update)
    wanted = {name: np.array([2.0, -1.0]) for name in params}
    moments = {name: [np.zeros(2) for _ in range(3)] for name in params}
    for n, gradient in enumerate(([4.0, 0.1], [-0.2, 0.3], [0.1, -9.0], [0.1, 0.1]), 1):
        grads = jax.tree.map(lambda _, g=gradient: jnp.array(g), params)
        updates, state = update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for name, rate in (("head", 0.1), ("tower", 0.01)):
            m, v, most = moments[name]
            g = np.clip(gradient, -0.5, 0.5) + 0.3 * wanted[name]
            m[:], v[:] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            most[:] = np.maximum(most, v / (1 - 0.999**n))
            rate *= 0.1 ** ((n - 1) // 2)
            wanted[name] = wanted[name] - rate * m / (1 - 0.9**n) / (np.sqrt(most) + 1e-8)
            np.testing.assert_allclose(params[name]["w"], wanted[name], rtol=1e-4)


def test_rare_words_and_cut_ends_count_in_strict_only():
    vocabulary = Vocabulary((".", "heart", "is", "no", "effusion", "nodule"))
    said = ["heart is <unk> . no effusion", "no nodule ."]
    truth = ["heart is cardiomegalic . no effusion . nodule is seen .", "no nodule ."]
    options = dataclasses.replace(QUICK, max_length=7)
    values = report_generation._scored(said, truth, vocabulary, options, labeller)
    assert values["r2gen/bleu4"] == values["r2gen/rouge_l"] == pytest.approx(1)
    assert values["strict/bleu1"] < 0.7 and values["strict/rouge_l"] < 0.9
    assert values["ce/recall_micro"] == 0 and values["ce/findings"] == 1


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", ""),
        ("...  ___ 1.", ""),
        ("No acute-on-chronic 'change'; T1-T2.", "no acute-on-chronic change t1-t2 ."),
        ("1) Clear.\n 2) Stable", "clear . stable ."),
        ("Seen in 2. Then 10 more.", "seen in 2 . then 10 more ."),
        ("Up to 3.2cm.Left", "up to 3.2 cm left ."),
    ],
)
def test_reports_are_cleaned(text, wanted):
    assert clean_report(text) == wanted
    assert clean_report(wanted) == wanted


def test_reports_are_cleaned_as_published():
    text = "1. Heart, large.. 2. ___ in\nL1. No effusion/oedema (2.5 cm) x-ray"
    wanted = "heart large .  in lno effusionoedema 25 cm x-ray ."
    assert clean_report(text, "published") == wanted
    assert clean_report("A. . B.", "published") == "a .  . b ."  # a sentence without words stays
    assert clean_report(" ", "published") == ""


def test_ids_come_back_as_words():
    vocabulary = report_vocabulary.build_vocabulary(["no nodule .", "no <unk> nodule ."], 2)
    assert vocabulary.words == (".", "no", "nodule") and len(vocabulary) == 7
    row = vocabulary.encode("no big nodule .", 7)
    assert row.tolist() == [5, UNKNOWN, 6, 4, END, PAD, PAD]
    assert vocabulary.decode(row) == "no <unk> nodule ."
    cut = vocabulary.encode("no big nodule .", 4)
    assert END not in cut and vocabulary.decode(cut) == "no <unk> nodule ."
    assert vocabulary.mask_unknown("no big nodule .", 2) == "no <unk>"
    assert to_sentences("no nodule . <unk> . .") == "No nodule. <unk>."


def test_mistakes_are_named():
    splits = make_splits((4, 2, 2))
    check_task(report_generation, splits, QUICK)
    silent = [dataclasses.replace(r, text="") for r in splits["val"]]
    for wrong, said in (
        ({**splits, "val": silent}, "report_generation needs text in val, and none of its 2"),
        ({"train": splits["train"]}, "needs text in val, and none of its 0"),
    ):
        with pytest.raises(UserError, match=said):
            check_task(report_generation, wrong, QUICK)
    for change, said in (
        ({"width": 30, "heads": 4}, "width is 30, which 4 heads do not divide"),
        ({"beam": 0}, "report_generation.beam is 0; use 1 or more"),
        ({"length_penalty": -1.0}, "length_penalty is -1.0; use 0"),
    ):
        with pytest.raises(UserError, match=said):
            check_task(report_generation, splits, dataclasses.replace(QUICK, **change))
    with pytest.raises(UserError, match="min_count 99 leaves no word of 4 reports"):
        run(splits, dataclasses.replace(QUICK, min_count=99))
    bare = dataclasses.replace(make_model(), tower=None)
    with pytest.raises(UserError, match="fake has no image tower"):
        run_task(report_generation, bare, splits, QUICK, label_report=labeller)
