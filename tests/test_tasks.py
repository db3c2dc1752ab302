"""The tasks, asked of models whose answers are known: an oracle, noise, silence."""

import dataclasses

import numpy as np
import pytest
from task_runs import run_task

from plan_jax.metrics import grounding as grounding_metrics
from plan_jax.tasks import grounding, retrieval, zero_shot
from plan_jax.tasks.grounding_targets import collect_targets
from plan_jax.types import Features, Model, Phrase, Record, UserError

SIZE, GRID = 32, (8, 8)
FINDINGS = ("nodule", "pleural effusion")
PROMPTS = {name: ([f"there is {name}", name], [f"no {name}"]) for name in FINDINGS}


def make_records(number, seed=0):
    """Studies with 0..2 findings, each a square somewhere in its half of the image."""
    random, records = np.random.default_rng(seed), []
    for i in range(number):
        phrases, labels = [], np.zeros(2, np.int8)
        for finding in np.flatnonzero(random.random(2) < 0.6).tolist():
            side, y = random.integers(2), random.integers(2, 22)
            x = int(16 * side + random.integers(2, 8))
            mask = np.zeros((SIZE, SIZE), bool)
            mask[y : y + 6 + 2 * finding, x : x + 6] = True
            place, name = ("right", "left")[side], FINDINGS[finding]
            phrase = Phrase(f"{place} {name}", finding, f"{name}|{place}", name, mask=mask)
            phrases.append(phrase)
            labels[finding] = 1
        lungs = np.zeros((SIZE, SIZE), bool)
        lungs[4:28, 2:30] = True
        image = random.integers(0, 255, (SIZE, SIZE, 1), np.uint8)
        text = f"study {i}. " + ". ".join(p.text for p in phrases)
        records.append(Record(image, text, str(i), labels, tuple(phrases), {"lung": lungs}))
    return records


def make_model(answer, rounds=0, score=None, log=None):
    """A model that answers with `answer(image bytes, text, round)`, a map [8 8]."""
    images, texts = [], []
    log = [] if log is None else log

    def features(store, items):
        first = len(store)
        store.extend(items)
        index = np.arange(first, len(store), dtype=np.float32)[:, None]
        return Features(index, index[:, None], np.ones((len(items), 1), bool))

    def see(batch):
        return features(images, [one.tobytes() for one in batch])

    def read(some):
        log.append(("read", tuple(some)))
        return features(texts, some)

    def pairs(shown, read):
        return [int(i) for i in shown.pooled[:, 0]], [int(i) for i in read.pooled[:, 0]]

    def heatmap(shown, words, rounds=None):
        left, right = pairs(shown, words)
        log.append(("heatmap", len(left)))
        maps = [answer(images[i], texts[j], rounds) for i, j in zip(left, right, strict=True)]
        maps = np.stack(maps).reshape(len(left), 1, -1).astype(np.float32)
        wrong = np.arange(maps.size, dtype=np.float32).reshape(maps.shape)  # a word of no weight
        weight = np.tile(np.float32([2, 0]), (len(left), 1))
        return np.concatenate([maps, wrong], 1), weight

    def similarity(shown, words):
        left, right = pairs(shown, words)
        table = np.array([[score(images[i], texts[j]) for j in right] for i in left], np.float32)
        return {"global": table, "local": -table}

    return Model("fake", GRID, rounds, SIZE, see, read, similarity, heatmap)


def oracle_map(records):
    """The truth of a phrase in an image, averaged to the model's grid."""
    table = {}
    for bare in (False, True):
        for target in collect_targets(records, bare)[0]:
            small = target.truth.reshape(8, 4, 8, 4).mean((1, 3))
            table[records[target.record_index].image.tobytes(), target.text] = small
    return lambda image, text, rounds: table[image, text]


def text_of(records):
    return {r.image.tobytes(): r.text for r in records}


def test_an_oracle_reaches_the_ceiling_and_passes_every_null():
    records = make_records(60)
    priors = grounding.fit_priors(make_records(80, seed=1))
    model = make_model(oracle_map(records))
    values, cases = grounding.score_phrases(model, records, findings=FINDINGS, priors=priors)
    for prefix in ("", "bare/"):
        assert values[f"{prefix}cnr_signed"] > 3
        assert values[f"{prefix}pointing"] > 0.95
        assert values[f"{prefix}miou_z"] > 0.5
        for null in ("random", "centre", "prior", "mean_finding"):
            for key in ("cnr_signed", "pointing", "miou_z", "miou_minmax"):
                assert values[f"{prefix}{null}/{key}"] < values[prefix + key]
    assert values["miou_raw"] == pytest.approx(values["miou_minmax"], abs=0.05)
    order = [values[f"{k}/cnr_signed"] for k in ("random", "mean_finding", "mean_phrase")]
    assert order == sorted(order)
    assert "bare/mean_phrase/cnr_signed" not in values
    assert len(cases) == values["n"] == sum(len(r.phrases) for r in records)
    assert values["cnr_signed_low"] < values["cnr_signed"] < values["cnr_signed_high"]
    assert np.isfinite(list(values.values())).all()


def test_noise_scores_as_noise():
    records, random = make_records(200), np.random.default_rng(0)
    model = make_model(lambda *_: random.normal(size=GRID))
    values, cases = grounding.score_phrases(model, records, findings=FINDINGS)
    share = np.mean([case.truth.mean() for case in cases])
    assert abs(values["cnr_signed"]) < 0.12 < values["cnr_abs"]
    assert values["pointing"] == pytest.approx(share, abs=0.04)
    assert values["random/cnr_signed"] == pytest.approx(0, abs=0.12)


def test_a_model_that_says_nothing_scores_zero_and_the_share_of_the_truth():
    records = make_records(20)
    model = make_model(lambda *_: np.full(GRID, 0.3))
    values, cases = grounding.score_phrases(model, records, findings=FINDINGS)
    assert values["cnr_signed"] == values["miou_z"] == values["miou_minmax"] == 0
    share = np.mean([case.truth.mean() for case in cases])
    assert values["micro/pointing"] == pytest.approx(share)
    assert values["cnr_signed_low"] == values["cnr_signed_high"] == 0


def test_values_are_those_of_a_literal_loop():
    records, random = make_records(30), np.random.default_rng(1)
    maps = {}
    noise = lambda image, text, rounds: maps.setdefault((image, text), random.normal(size=GRID))  # noqa: E731
    values, cases = grounding.score_phrases(make_model(noise), records, findings=FINDINGS)
    scores = {name: [] for name in FINDINGS}
    for record in records:
        for phrase in record.phrases:
            small = maps[record.image.tobytes(), phrase.text].astype(np.float32)
            large = grounding_metrics.upsample(small[None], (SIZE, SIZE))[0]
            inside, outside = large[phrase.mask], large[~phrase.mask]
            cnr = (inside.mean() - outside.mean()) / np.sqrt(inside.var() + outside.var())
            scores[FINDINGS[phrase.finding]].append(cnr)
    for name in FINDINGS:
        key = name.replace(" ", "_")
        assert values[f"{key}/cnr_signed"] == pytest.approx(np.mean(scores[name]), abs=1e-4)
    macro = np.mean([np.mean(some) for some in scores.values()])
    assert values["cnr_signed"] == pytest.approx(macro, abs=1e-4)
    assert values["micro/cnr_signed"] == pytest.approx(np.mean(sum(scores.values(), [])), abs=1e-4)
    np.testing.assert_allclose(
        sorted(case.cnr for case in cases), sorted(sum(scores.values(), [])), atol=1e-4
    )


def test_rounds_are_scored_one_by_one():
    records = make_records(30)
    truth, random = oracle_map(records), np.random.default_rng(0)

    def answer(image, text, rounds):
        noise = {0: 2.0, 1: 0.5, 2: 0.0, None: 0.0}[rounds]
        return truth(image, text, rounds) + noise * random.normal(size=GRID)

    values, _ = grounding.score_phrases(make_model(answer, rounds=2), records, findings=FINDINGS)
    for prefix in ("", "bare/"):
        steps = [values[f"{prefix}round{t}/cnr_signed"] for t in range(3)]
        assert steps == sorted(steps) and steps[0] < steps[1] < steps[2]
        assert steps[2] == pytest.approx(values[f"{prefix}cnr_signed"])


def test_the_model_is_asked_in_chunks_of_one_size_and_reads_each_text_once():
    records, log = make_records(150), []
    model = make_model(oracle_map(records), log=log)
    values, _ = grounding.score_phrases(model, records, findings=FINDINGS)
    assert values["n"] > grounding.CHUNK
    assert {size for kind, size in log if kind == "heatmap"} == {grounding.CHUNK}
    for kind, texts in log:
        assert kind != "read" or len(texts) == len(set(texts))


def test_a_model_that_diverged_shows_nan():
    records = make_records(10)
    model = make_model(lambda *_: np.full(GRID, np.nan))
    values, _ = grounding.score_phrases(model, records, findings=FINDINGS)
    assert np.isnan([values["cnr_signed"], values["pointing"], values["miou_z"]]).all()


def test_grounding_of_odd_records():
    records = make_records(3)
    model = make_model(oracle_map(records))
    silent = [dataclasses.replace(record, phrases=()) for record in records]
    values, cases = grounding.score_phrases(model, silent, findings=FINDINGS)
    assert values == {"n": 0, "skipped": 0, "bare/n": 0, "bare/skipped": 0} and not cases
    assert grounding.illustrate(model, silent, cases) == []
    small = dataclasses.replace(records[0], image=np.zeros((8, 8, 1), np.uint8))
    options = grounding.Options()
    with pytest.raises(UserError, match=r"one size and got \[\(8, 8\), \(32, 32\)\]"):
        run_task(grounding, model, {"test": [small, *records]}, options, findings=FINDINGS)
    with pytest.raises(UserError, match="got none"):
        run_task(grounding, model, {"test": []}, options, findings=FINDINGS)


def test_unknown_findings_form_a_group_of_their_own():
    phrase = Phrase("opacity", boxes=((2, 2, 9, 9), (20, 20, 28, 28)))
    record = Record(np.zeros((SIZE, SIZE, 1), np.uint8), "opacity", phrases=(phrase,))
    values, cases = grounding.score_phrases(make_model(oracle_map([record])), [record], findings=())
    assert values["other/cnr_signed"] == values["cnr_signed"] > 2
    assert cases[0].finding == "other" and cases[0].truth.sum() == 7 * 7 + 8 * 8


def test_illustrations_are_best_random_worst_and_differ():
    records, random = make_records(40), np.random.default_rng(0)
    truth = oracle_map(records)
    noisy = lambda i, t, rounds: truth(i, t, rounds) + random.normal(size=GRID)  # noqa: E731
    model = make_model(noisy, rounds=2)
    _, cases = grounding.score_phrases(model, records, findings=FINDINGS)
    rows = grounding.illustrate(model, records, cases, options=grounding.Options(num_examples=3))
    assert [row.kind for row in rows] == ["best"] * 3 + ["random"] * 3 + ["worst"] * 3
    assert len({(row.phrase, row.image.tobytes()) for row in rows}) == 9
    assert rows[0].cnr == max(case.cnr for case in cases)
    assert min(case.cnr for case in cases) in [row.cnr for row in rows[6:]]
    assert all(row.heat_maps.shape == (3, *GRID) for row in rows)
    best = [row.phrase.split(" ", 1)[1] for row in rows[:2]]
    assert sorted(best) == sorted(FINDINGS)
    assert (
        len(
            grounding.illustrate(
                model, records, cases[:2], options=grounding.Options(num_examples=3)
            )
        )
        == 2
    )


def test_retrieval_of_an_oracle_and_of_its_opposite():
    records = make_records(40)
    own = text_of(records)
    model = make_model(None, score=lambda image, text: float(own[image] == text))
    values, rows = run_task(retrieval, model, {"test": records}, retrieval.Options(num_examples=2))
    for way in ("i2t", "t2i"):
        assert values[f"{way}_r1"] == values[f"{way}_r10"] == values[f"{way}_median_rank"] == 1
        assert values[f"local/{way}_r10"] == 0 and values[f"local/{way}_median_rank"] == 40
        assert values[f"chance/{way}_r5"] == pytest.approx(5 / 40)
    assert values["n"] == 40 and values["duplicates"] == 0
    assert len(rows) == 2
    for row in rows:
        assert (
            row.rank == 1 and row.retrieved[0] == (row.text, 1.0, True) and len(row.retrieved) == 5
        )
        assert not any(right for _, _, right in row.retrieved[1:])


def test_the_same_words_are_a_hit_wherever_they_are():
    records = make_records(12)
    texts = ["Clear  lungs."] * 3 + ["clear lungs."] + [f"other {i}" for i in range(8)]
    records = [dataclasses.replace(r, text=t) for r, t in zip(records, texts, strict=True)]
    place = {r.image.tobytes(): i for i, r in enumerate(records)}
    first = lambda image, text: float(text == "clear lungs.") - 0.01 * place[image]  # noqa: E731
    values, rows = run_task(
        retrieval,
        make_model(None, score=first),
        {"test": records},
        retrieval.Options(num_examples=12),
    )
    assert values["duplicates"] == 4
    assert values["i2t_r1"] == pytest.approx(4 / 12)
    assert values["t2i_r5"] == pytest.approx(5 / 12)  # every text finds images in their order
    assert values["chance/i2t_r1"] == pytest.approx((4 * 4 + 8) / 12 / 12)
    alike = [row for row in rows if row.text.lower().split() == ["clear", "lungs."]]
    assert len(alike) == 4 and all(row.retrieved[0][2] and row.rank == 1 for row in alike)


def test_random_retrieval_is_within_its_interval_of_chance():
    records, random = make_records(100), np.random.default_rng(0)
    model = make_model(None, score=lambda *_: random.random())
    values, _ = run_task(
        retrieval, model, {"test": records}, retrieval.Options(bootstrap_samples=200)
    )
    assert values["i2t_r10_low"] <= values["chance/i2t_r10"] <= values["i2t_r10_high"]
    assert values["i2t_median_rank"] == pytest.approx(values["chance/i2t_median_rank"], abs=20)


def classify(model, records, prompts):
    splits = {"test": records, "prompts": prompts}
    return run_task(zero_shot, model, splits, zero_shot.Options(), findings=FINDINGS)[0]


def test_zero_shot_of_an_oracle():
    records = make_records(40)
    present = {r.image.tobytes(): r.labels for r in records}

    def score(image, text):
        finding = next(i for i, name in enumerate(FINDINGS) if name in text)
        return float(present[image][finding]) * (-1 if text.startswith("no ") else 1)

    values = classify(make_model(None, score=score), records, PROMPTS)
    assert values["auroc_macro"] == values["nodule/auroc"] == 1
    assert values["local/auroc_macro"] == values["local/pleural_effusion/auroc"] == 0
    assert values["auroc_macro_low"] == values["auroc_macro_high"] == 1
    assert values["findings_scored"] == 2 and values["findings_skipped"] == 0


def test_zero_shot_score_is_the_difference_of_means():
    records, random, table = make_records(5), np.random.default_rng(0), {}
    score = lambda *pair: table.setdefault(pair, random.random())  # noqa: E731
    labels = [[1, 1], [0, -1], [1, 0], [0, -1], [-1, 0]]
    records = [dataclasses.replace(r, labels=np.int8(labels[i])) for i, r in enumerate(records)]
    values = classify(make_model(None, score=score), records, PROMPTS)
    for i, name in enumerate(FINDINGS):
        s = []
        for r in records:
            yes, name_only, no = (
                table[r.image.tobytes(), text] for text in (f"there is {name}", name, f"no {name}")
            )
            s.append((yes + name_only) / 2 - no)
        present, absent = ([a for a in range(5) if labels[a][i] == wanted] for wanted in (1, 0))
        areas = [float(s[a] > s[b]) for a in present for b in absent]
        assert values[f"{name.replace(' ', '_')}/auroc"] == pytest.approx(np.mean(areas))


def test_zero_shot_leaves_out_and_counts_what_has_one_class():
    records = [
        dataclasses.replace(r, labels=np.int8([1, i % 2])) for i, r in enumerate(make_records(6))
    ]
    model = make_model(None, score=lambda *_: 0.0)
    values = classify(model, records, PROMPTS)
    assert "nodule/auroc" not in values
    assert values["findings_skipped"] == 1
    assert values["auroc_macro"] == values["pleural_effusion/auroc"] == 0.5


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ({"oedema": (["a"], ["b"])}, "oedema name none of the data's findings .*nodule"),
        ({}, "nothing name none"),
        ({"nodule": (["a"], [])}, "nodule are empty on one side"),
    ],
)
def test_zero_shot_names_what_is_wrong_with_the_prompts(prompts, said):
    with pytest.raises(UserError, match=said):
        classify(make_model(None), make_records(4), prompts)
