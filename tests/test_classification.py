"""Linear probing and fine-tuning: what is fitted and judged, against literal loops over images."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import metrics as sk
from task_runs import check_task, run_task

from plan_jax.heads.linear import LOSSES, Linear, feature_statistics
from plan_jax.tasks import classification
from plan_jax.tasks.classification import Options
from plan_jax.types import Model, Record, Stages, Tower, UserError

FINDINGS = ("Pleural Effusion", "Mass", "Edema")
QUICK = Options(
    learning_rate=0.05,
    batch=16,
    epochs=15,
    patience=15,
    fractions=(0.1, 1.0),
    bootstrap_samples=20,
)
SIDE = 8


def make_tower(scale=1.0):
    """Means of the image's quarters, a layer, a norm with running means, a tanh."""
    kernel = np.random.default_rng(7).normal(size=(4, 6)).astype(np.float32)
    variables = {"params": {"kernel": kernel}, "batch_stats": {"mean": np.zeros(6, np.float32)}}

    def apply(variables, images, train=False, native=False):
        assert not native, "the published probe sees a ResNet's images at 299 pixels"
        x = images.astype(jnp.float32).reshape(-1, 2, SIDE // 2, 2, SIDE // 2).mean((2, 4)) / 255
        x = x.reshape(-1, 4) @ variables["params"]["kernel"]
        mean = variables["batch_stats"]["mean"]
        if train:
            x, mean = x - x.mean(0), (mean + x.mean(0)) / 2
        else:
            x = x - mean
        x = jnp.tanh(x) * scale
        return Stages(x, (x[:, None, None],)), {"mean": mean}

    return Tower(f"quarters{scale}", variables, apply)


def make_model(tower=None):
    return Model("fake", (1, 1), 0, SIDE, None, None, None, None, tower=tower or make_tower())


def make_splits(counts=(80, 32, 60), unknown=0.0, seed=0):
    """Finding i brightens quarter i of the image; some labels are unknown."""
    random, splits = np.random.default_rng(seed), {}
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        splits[split] = []
        for n in range(count):
            labels = (random.random(3) < 0.45).astype(np.int8)
            image = random.integers(0, 110, (SIDE, SIDE, 1))
            for i in np.flatnonzero(labels):
                y, x = divmod(int(i), 2)
                image[4 * y : 4 * y + 4, 4 * x : 4 * x + 4] += 60 + int(random.integers(60))
            labels[random.random(3) < unknown] = -1
            splits[split].append(Record(image.astype(np.uint8), "", f"{split}{n}", labels))
    return splits


def one_class_each(splits):
    """Records of three classes: that of the labels drawn that is first, or the last one."""
    labels = {0: [1, 0, 0], 1: [0, 1, 0], 2: [0, 0, 1]}
    return {
        split: [
            dataclasses.replace(r, labels=np.int8(labels[int(np.argmax([*r.labels[:2], 1]))]))
            for r in records
        ]
        for split, records in splits.items()
    }


def relabelled(splits, **columns):
    """Splits with the label of a finding (`f0`, ..) made by a function of split, number, label."""
    out = {}
    for split, records in splits.items():
        out[split] = []
        for n, record in enumerate(records):
            labels = record.labels.copy()
            for name, make in columns.items():
                labels[int(name[1:])] = make(split, n, labels[int(name[1:])])
            out[split].append(dataclasses.replace(record, labels=labels))
    return out


@pytest.fixture
def fits(monkeypatch):
    """The fits of an evaluation, in order, with what each was given."""
    found, fit_head = [], classification.fit_head

    def listen(loss, params, stats, train, *rest, **options):
        fit = fit_head(loss, params, stats, train, *rest, **options)
        found.append((fit, train, stats))
        return fit

    monkeypatch.setattr(classification, "fit_head", listen)
    return found


def evaluate(splits, options=QUICK, model=None, **more):
    more = {"findings": FINDINGS} | more
    return run_task(classification, model or make_model(), splits, options, **more)


def logits_of(fit, records, tower=None):
    """Logits by a loop over images and features, in float64."""
    tower, dense = tower or make_tower(), fit.params["head"]["Dense_0"]
    kernel, bias = np.float64(dense["kernel"]), np.float64(dense["bias"])
    variables = {"params": tower.variables["params"], "batch_stats": fit.stats["tower"]}
    if fit.params["tower"]:
        variables["params"] = fit.params["tower"]
    rows = []
    for seen in np.float64(tower.apply(variables, np.stack([r.image for r in records]))[0].pooled):
        level = (seen - fit.stats["head"]["mean"]) / fit.stats["head"]["std"]
        rows.append([sum(level[e] * kernel[e, f] for e in range(6)) + bias[f] for f in range(3)])
    return np.array(rows)


def binary_cross_entropy(logits, labels):
    terms = []
    for z_row, y_row in zip(logits, labels, strict=True):
        for z, y in zip(z_row, y_row, strict=True):
            if y >= 0:
                p = 1 / (1 + math.exp(-z))
                terms.append(-math.log(p if y else 1 - p))
    return sum(terms) / len(terms)


def test_multilabel_learns_and_its_numbers_are_those_of_literal_loops(fits):
    splits = make_splits(unknown=0.2)
    values, rows = evaluate(splits)
    fit, train, _ = fits[-1]
    labels = {split: np.stack([r.labels for r in some]) for split, some in splits.items()}
    logits = {split: logits_of(fit, splits[split]) for split in ("val", "test")}
    assert -fit.score == pytest.approx(binary_cross_entropy(logits["val"], labels["val"]), rel=1e-4)
    assert "features" in train and not fit.params["tower"] and not fit.stats["tower"]["mean"].any()
    assert (fit.stats["head"]["std"] == 1).all() and not fit.stats["head"]["mean"].any()
    assert fit.score == max(row["score"] for row in fit.history)
    assert values["100/auroc_macro"] > 0.9 > 0.5 == values["chance/100/auroc_macro"]
    scored = {"auroc": [], "auprc": [], "f1": [], "accuracy": [], "every": [], "more": []}
    for i, name in enumerate(("pleural_effusion", "mass", "edema")):
        known = {split: labels[split][:, i] >= 0 for split in labels}
        y_val, y, y_train = (labels[s][known[s], i] for s in ("val", "test", "train"))
        v, z = (logits[s][known[s], i] for s in ("val", "test"))
        scored["auroc"].append(sk.roc_auc_score(y, z))
        assert values[f"100/{name}/auroc"] == pytest.approx(scored["auroc"][-1])
        scored["auprc"].append(sk.average_precision_score(y, z))
        best = max(sorted(v, reverse=True), key=lambda t, v=v, y=y_val: sk.f1_score(y, v >= t))
        scored["f1"].append(sk.f1_score(y, z >= best - 1e-5))
        scored["accuracy"].append(sk.accuracy_score(y, z >= best - 1e-5))
        scored["more"].append(np.mean(y == (y_train.mean() >= 0.5)))
        scored["every"].append(2 * y.sum() / (len(y) + y.sum()))
    for name in ("auroc", "auprc", "f1"):
        assert values[f"100/{name}_macro"] == pytest.approx(np.mean(scored[name]))
    assert values["100/accuracy"] == pytest.approx(np.mean(scored["accuracy"]))
    assert values["chance/100/f1_macro"] == pytest.approx(np.mean(scored["every"]))
    assert values["chance/100/accuracy"] == pytest.approx(np.mean(scored["more"]))
    assert values["100/auroc_macro"] > values["100/auroc_macro_low"] > 0.5
    assert values["100/auroc_macro_high"] <= 1
    assert values["10/n_train"] == 8 and values["100/n_train"] == 80 == len(train["labels"])
    assert values["10/labels_skipped"] == values["100/labels_unseen"] == 0
    assert 0 < values["100/ece"] < 0.3
    assert [row.kind for row in rows] == ["roc"] * 3 + ["calibration"]
    assert [row.name for row in rows] == [*FINDINGS, "all findings"]
    for row, area in zip(rows, scored["auroc"], strict=False):
        assert np.trapezoid(row.y, row.x) == pytest.approx(area)
    assert np.isfinite(list(values.values())).all()


def test_two_calls_agree_and_a_stopped_one_goes_on(tmp_path):
    splits = make_splits((30, 10, 20))
    short = dataclasses.replace(QUICK, epochs=3, fractions=(0.5,))
    first, _ = evaluate(splits, short, seed=1, folder=tmp_path)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 1 and kept[0].name.startswith("classification_50-")
    before = kept[0].read_bytes()
    assert evaluate(splits, short, seed=1, folder=tmp_path)[0] == first
    assert kept == sorted(tmp_path.iterdir()) and kept[0].read_bytes() == before
    assert evaluate(splits, short, seed=1)[0] == first


def test_multiclass_learns_and_counts_the_likeliest_class(fits):
    splits = one_class_each(make_splits())
    options = dataclasses.replace(QUICK, kind="multiclass", fractions=(1.0,))
    values, rows = evaluate(splits, options)
    logits = {split: logits_of(fits[0][0], splits[split]) for split in ("val", "test")}
    truth = {s: np.array([r.labels.argmax() for r in splits[s]]) for s in splits}
    losses = [
        math.log(sum(math.exp(x) for x in z)) - z[y]
        for z, y in zip(logits["val"], truth["val"], strict=True)
    ]
    assert -fits[0][0].score == pytest.approx(np.mean(losses), rel=1e-4)
    called, y = logits["test"].argmax(1), truth["test"]
    assert values["100/accuracy"] == pytest.approx(np.mean(called == y))
    assert values["100/f1_macro"] == pytest.approx(sk.f1_score(y, called, average="macro"))
    chances = np.exp(logits["test"]) / np.exp(logits["test"]).sum(1, keepdims=True)
    area = sk.roc_auc_score(y, chances, multi_class="ovr")
    assert values["100/auroc_macro"] == pytest.approx(area, abs=1e-6)
    assert values["100/accuracy_low"] <= values["100/accuracy"] <= values["100/accuracy_high"]
    common = np.bincount(truth["train"]).argmax()
    assert values["chance/100/accuracy"] == np.mean(y == common) < values["100/accuracy"] - 0.2
    assert rows[-1].kind == "calibration" and rows[-1].x.min() >= 1 / 3


def test_finetuning_fits_the_tower_and_its_norm(fits):
    splits = make_splits((48, 16, 20))
    options = dataclasses.replace(QUICK, epochs=3, fractions=(1.0,), learning_rate=0.02)
    evaluate(splits, dataclasses.replace(options, mode="finetune"))
    tuned, given, _ = fits[0]
    assert "image" in given and len(given["image"]) == 48
    assert np.abs(
        tuned.params["tower"]["kernel"] - make_tower().variables["params"]["kernel"]
    ).max()
    assert np.abs(tuned.stats["tower"]["mean"]).max() > 0
    loss = binary_cross_entropy(
        logits_of(tuned, splits["val"]), np.stack([r.labels for r in splits["val"]])
    )
    assert -tuned.score == pytest.approx(loss, rel=1e-4)


def test_standardised_features_are_so_by_the_training_share_and_forget_their_scale(fits):
    splits = make_splits((40, 12, 20))
    options = dataclasses.replace(QUICK, epochs=4, fractions=(0.5,), standardise=True)
    values, _ = evaluate(splits, options)
    large, _ = evaluate(splits, options, make_model(make_tower(1000.0)))
    assert values == pytest.approx(large, abs=1e-4)
    fit, train, stats = fits[0]
    np.testing.assert_allclose(stats["head"]["mean"], train["features"].mean(0), atol=1e-6)
    np.testing.assert_allclose(stats["head"]["std"], train["features"].std(0), rtol=1e-5)
    np.testing.assert_array_equal(fit.stats["head"]["std"], stats["head"]["std"])


def test_a_feature_that_does_not_vary_keeps_its_scale():
    seen = np.float32([[1, 5, 0], [3, 5, 0]])
    found = feature_statistics(seen)
    assert found["mean"].tolist() == [2, 5, 0] and found["std"].tolist() == [1, 1, 1]
    head = Linear(2)
    made = head.init(jax.random.key(0), jnp.asarray(seen), {})
    assert np.abs(made["params"]["Dense_0"]["kernel"]).max() <= 3**-0.5
    said = head.apply({**made, "batch_stats": found}, seen + jnp.array([0.0, 0.0, 7.0]), {})
    kernel, bias = (np.asarray(made["params"]["Dense_0"][name]) for name in ("kernel", "bias"))
    expected = np.float32([[-1, 0, 7], [1, 0, 7]]) @ kernel + bias
    np.testing.assert_allclose(said, expected, rtol=1e-5)


def test_findings_with_one_class_are_left_out_and_counted():
    splits = make_splits((40, 12, 30))
    options = dataclasses.replace(QUICK, epochs=3, fractions=(0.025, 1.0))
    last = classification.draw(40, 1 / 40, 0)[0]
    odd = relabelled(
        splits,
        f1=lambda split, n, label: 1 if split == "test" else label,
        f2=lambda split, n, label: np.int8(n % 2) if split != "train" else label * (n != last),
    )
    values, rows = evaluate(odd, options)
    for share in ("2.5", "100"):
        assert values[f"{share}/labels_skipped"] == 1 and f"{share}/mass/auroc" not in values
        both = [values[f"{share}/{name}/auroc"] for name in ("pleural_effusion", "edema")]
        assert values[f"{share}/auroc_macro"] == pytest.approx(np.mean(both))
    assert values["2.5/n_train"] == 1 and values["2.5/labels_unseen"] == 2
    assert values["100/labels_unseen"] == 0
    assert [row.name for row in rows] == ["Pleural Effusion", "Edema", "all findings"]
    silent = relabelled(splits, f0=lambda split, n, label: 0 if split == "train" else label)
    values, _ = evaluate(silent, dataclasses.replace(options, fractions=(1.0,), epochs=1))
    assert values["100/labels_skipped"] == 1 and "100/pleural_effusion/auroc" not in values


def test_uncertain_labels_reach_loss_and_metrics_as_asked(fits):
    splits = make_splits((30, 10, 20), unknown=0.3)
    options = dataclasses.replace(QUICK, epochs=1, fractions=(1.0,))
    raw = np.stack([r.labels for r in splits["train"]])
    areas = {}
    for policy in ("ignore", "one", "mgca"):
        values, _ = evaluate(splits, dataclasses.replace(options, uncertain=policy))
        areas[policy] = values["100/auroc_macro"]
        rows = fits[-1][1]
        made = {"ignore": [0, 0, 0], "one": [1, 1, 1], "mgca": [1, 0, 1]}[policy]
        np.testing.assert_array_equal(rows["labels"], np.where(raw < 0, made, raw))
        np.testing.assert_array_equal(rows["mask"], (raw >= 0) | (policy != "ignore"))
    assert len(set(areas.values())) == 3


@pytest.mark.parametrize("unknown", [0.5, 1.0])
def test_the_loss_is_a_loop_over_known_labels(unknown):
    random = np.random.default_rng(3)
    logits = random.normal(size=(9, 3)).astype(np.float32)
    labels = random.integers(0, 2, (9, 3))
    labels[random.random((9, 3)) < unknown] = -1
    loss = jax.value_and_grad(LOSSES["multilabel"])
    rows = {"labels": jnp.asarray(labels == 1), "mask": jnp.asarray(labels >= 0)}
    value, slope = loss(logits, rows)
    expected = binary_cross_entropy(logits, labels) if unknown < 1 else 0
    assert value == pytest.approx(expected, rel=1e-5)
    assert not np.asarray(slope)[labels < 0].any() and np.isfinite(slope).all()
    assert loss(logits, rows | {"labels": rows["labels"] ^ ~rows["mask"]})[0] == value


def test_shares_are_nested_and_drawn_by_the_seed():
    shares = [set(classification.draw(250, f, 5).tolist()) for f in (0.01, 0.1, 0.4, 1.0)]
    assert [len(some) for some in shares] == [2, 25, 100, 250]
    assert all(a < b for a, b in zip(shares, shares[1:], strict=False))
    assert shares[1] != set(classification.draw(250, 0.1, 6).tolist())
    assert classification.draw(7, 0.01, 0).shape == (1,)
    assert classification.draw(7, 1.0, 0).tolist() == list(range(7))


def test_the_rate_is_constant_or_rises_and_falls():
    def rates(options, steps=10):
        tx = classification.optimiser(dataclasses.replace(options, weight_decay=0.0), steps)
        params, found = {"bias": jnp.zeros(2)}, []
        state = tx.init(params)
        for _ in range(steps):  # a gradient that stays the same moves Adam by its rate
            updates, state = tx.update({"bias": jnp.ones(2)}, state, params)
            found.append(-float(updates["bias"][0]))
        return found

    assert rates(Options(learning_rate=0.1)) == pytest.approx([0.1] * 10, rel=1e-4)
    rising = [0, 0.025, 0.05, 0.075, *[0.1] * 6]
    assert rates(Options(learning_rate=0.1, warmup_steps=4)) == pytest.approx(rising, rel=1e-4)
    cosine = [0.1 * (1 + math.cos(math.pi * n / 10)) / 2 for n in range(10)]
    made = rates(Options(learning_rate=0.1, schedule="cosine"))
    assert made == pytest.approx(cosine, rel=1e-3, abs=1e-7)
    both = Options(learning_rate=0.1, schedule="cosine", warmup_steps=2, steps=6)
    made = rates(both)
    falling = [0.1 * (1 + math.cos(math.pi * n / 4)) / 2 for n in range(5)]
    expected = [0, 0.05, *falling, 0, 0, 0]
    assert made == pytest.approx(expected, rel=1e-3, abs=1e-7)
    decayed = classification.optimiser(Options(weight_decay=0.5, learning_rate=0.1), 1)
    params = {"bias": jnp.ones(2)}
    updates, _ = decayed.update({"bias": jnp.zeros(2)}, decayed.init(params), params)
    assert optax.apply_updates(params, updates)["bias"] == pytest.approx([0.95] * 2)


def bare(splits):
    empty = np.zeros(0, np.int8)
    return {s: [dataclasses.replace(r, labels=empty) for r in some] for s, some in splits.items()}


@pytest.mark.parametrize(
    ("change", "options", "findings", "said"),
    [
        (lambda s: s, {}, (), "task classification needs labels, and the dataset has no findings"),
        (bare, {}, FINDINGS, "task classification needs labels, and split train has none"),
        (lambda s: s | {"val": []}, {}, FINDINGS, "no records in split val"),
        (
            lambda s: s,
            {"labels": ("Mass", "Hernia")},
            FINDINGS,
            "labels Hernia are not in the data",
        ),
        (lambda s: s, {"fractions": (0.1, 2.0)}, FINDINGS, r"fractions are \(0.1, 2.0\)"),
        (lambda s: s, {"fractions": ()}, FINDINGS, r"fractions are \(\)"),
        (lambda s: s, {"batch": 0}, FINDINGS, "classification batch is 0"),
        (lambda s: s, {"kind": "multiclass", "labels": ("Mass",)}, FINDINGS, "the one label Mass"),
    ],
)
def test_what_is_wrong_is_said_before_any_fit(change, options, findings, said, fits):
    splits = change(make_splits((6, 4, 4)))
    options = dataclasses.replace(QUICK, **options)
    with pytest.raises(UserError, match=said):
        check_task(classification, splits, options, findings)
    with pytest.raises(UserError, match=said):
        evaluate(splits, options, findings=findings)
    assert not fits


def test_multiclass_names_how_many_records_have_none_or_several():
    splits = one_class_each(make_splits((6, 4, 4)))
    options = Options(kind="multiclass")
    check_task(classification, splits, options, FINDINGS)
    labels = [[1, 1, 0], [0, 0, 0], [1, 0, 0], [1, -1, -1]]
    records = [
        dataclasses.replace(r, labels=np.int8(y))
        for r, y in zip(splits["test"], labels, strict=True)
    ]
    with pytest.raises(UserError, match="and 2 of 4 in split test have none or several"):
        check_task(classification, splits | {"test": records}, options, FINDINGS)
    check_task(classification, splits | {"test": records[2:]}, options, FINDINGS)
    with pytest.raises(UserError, match="fake has no image tower"):
        evaluate(splits, options, dataclasses.replace(make_model(), tower=None))
