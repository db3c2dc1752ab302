"""Classification: what is fitted and how it is scored, against literal loops over images."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import metrics as sk
from task_runs import check_task, run_task

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
        assert not native, "the published protocol shows a ResNet images of 299 pixels"
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


def single_class_splits(splits):
    """Splits of three classes: a record has the first of its labels, or else the last one."""
    labels = {0: [1, 0, 0], 1: [0, 1, 0], 2: [0, 0, 1]}
    return {
        split: [
            dataclasses.replace(r, labels=np.int8(labels[int(np.argmax([*r.labels[:2], 1]))]))
            for r in records
        ]
        for split, records in splits.items()
    }


def relabelled(splits, **columns):
    """Splits whose labels of a finding (`f0`, ..) come from a function of split, number, label."""
    changed_splits = {}
    for split, records in splits.items():
        changed_splits[split] = []
        for n, record in enumerate(records):
            labels = record.labels.copy()
            for name, relabel in columns.items():
                labels[int(name[1:])] = relabel(split, n, labels[int(name[1:])])
            changed_splits[split].append(dataclasses.replace(record, labels=labels))
    return changed_splits


@pytest.fixture
def fits(monkeypatch):
    """The fits of an evaluation, in order, each with its training examples and statistics."""
    recorded, fit_head = [], classification.fit_head

    def recording_fit_head(loss, params, stats, train, *args, **options):
        fit_result = fit_head(loss, params, stats, train, *args, **options)
        recorded.append((fit_result, train, stats))
        return fit_result

    monkeypatch.setattr(classification, "fit_head", recording_fit_head)
    return recorded


def evaluate(splits, options=QUICK, model=None, **context):
    context = {"findings": FINDINGS} | context
    return run_task(classification, model or make_model(), splits, options, **context)


def literal_logits(fit_result, records, tower=None):
    """Logits by a loop over images and features, in float64."""
    tower, dense = tower or make_tower(), fit_result.params["head"]["Dense_0"]
    kernel, bias = np.float64(dense["kernel"]), np.float64(dense["bias"])
    variables = {"params": tower.variables["params"], "batch_stats": fit_result.stats["tower"]}
    if fit_result.params["tower"]:
        variables["params"] = fit_result.params["tower"]
    stages, _ = tower.apply(variables, np.stack([r.image for r in records]))
    logits = []
    for features in np.float64(stages.pooled):
        x = (features - fit_result.stats["head"]["mean"]) / fit_result.stats["head"]["std"]
        logits.append([sum(x[e] * kernel[e, f] for e in range(6)) + bias[f] for f in range(3)])
    return np.array(logits)


def stack_labels(records):
    return np.stack([record.labels for record in records])


def binary_cross_entropy(logits, labels):
    terms = []
    for z_row, y_row in zip(logits, labels, strict=True):
        for z, y in zip(z_row, y_row, strict=True):
            if y >= 0:
                p = 1 / (1 + math.exp(-z))
                terms.append(-math.log(p if y else 1 - p))
    return sum(terms) / len(terms)


def test_multilabel_learns_and_its_metrics_are_those_of_literal_loops(fits):
    splits = make_splits(unknown=0.2)
    values, curves = evaluate(splits)
    fit_result, train, _ = fits[-1]
    labels = {split: stack_labels(records) for split, records in splits.items()}
    logits = {split: literal_logits(fit_result, splits[split]) for split in ("val", "test")}
    val_loss = binary_cross_entropy(logits["val"], labels["val"])
    assert -fit_result.score == pytest.approx(val_loss, rel=1e-4)
    assert "features" in train and not fit_result.params["tower"]
    assert not fit_result.stats["tower"]["mean"].any()
    assert (fit_result.stats["head"]["std"] == 1).all() and not fit_result.stats["head"][
        "mean"
    ].any()
    assert fit_result.score == max(epoch["score"] for epoch in fit_result.history)
    assert values["100/auroc_macro"] > 0.9 > 0.5 == values["chance/100/auroc_macro"]
    expected = {name: [] for name in ("auroc", "auprc", "f1", "accuracy", "chance_f1", "frequent")}
    for i, name in enumerate(("pleural_effusion", "mass", "edema")):
        mask = {split: labels[split][:, i] >= 0 for split in labels}
        y_val, y, y_train = (labels[s][mask[s], i] for s in ("val", "test", "train"))
        z_val, z = (logits[s][mask[s], i] for s in ("val", "test"))
        expected["auroc"].append(sk.roc_auc_score(y, z))
        assert values[f"100/{name}/auroc"] == pytest.approx(expected["auroc"][-1])
        expected["auprc"].append(sk.average_precision_score(y, z))
        f1_values = [(sk.f1_score(y_val, z_val >= t), t) for t in z_val]
        threshold = max(f1_values)[1] - 1e-5
        expected["f1"].append(sk.f1_score(y, z >= threshold))
        expected["accuracy"].append(sk.accuracy_score(y, z >= threshold))
        expected["frequent"].append(np.mean(y == (y_train.mean() >= 0.5)))
        expected["chance_f1"].append(2 * y.sum() / (len(y) + y.sum()))
    for name in ("auroc", "auprc", "f1"):
        assert values[f"100/{name}_macro"] == pytest.approx(np.mean(expected[name]))
    assert values["100/accuracy"] == pytest.approx(np.mean(expected["accuracy"]))
    assert values["chance/100/f1_macro"] == pytest.approx(np.mean(expected["chance_f1"]))
    assert values["chance/100/accuracy"] == pytest.approx(np.mean(expected["frequent"]))
    assert values["100/auroc_macro"] > values["100/auroc_macro_low"] > 0.5
    assert values["100/auroc_macro_high"] <= 1
    assert values["10/n_train"] == 8 and values["100/n_train"] == 80 == len(train["labels"])
    assert values["10/labels_skipped"] == values["100/labels_unseen"] == 0
    assert 0 < values["100/ece"] < 0.3
    assert [curve.kind for curve in curves] == ["roc"] * 3 + ["calibration"]
    assert [curve.name for curve in curves] == [*FINDINGS, "all findings"]
    for curve, area in zip(curves, expected["auroc"], strict=False):
        assert np.trapezoid(curve.y, curve.x) == pytest.approx(area)
    assert np.isfinite(list(values.values())).all()


def test_two_calls_agree_and_a_saved_fit_is_not_repeated(tmp_path):
    splits = make_splits((30, 10, 20))
    options = dataclasses.replace(QUICK, epochs=3, fractions=(0.5,))
    first, _ = evaluate(splits, options, seed=1, folder=tmp_path)
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 1 and paths[0].name.startswith("classification_50-")
    content = paths[0].read_bytes()
    assert evaluate(splits, options, seed=1, folder=tmp_path)[0] == first
    assert paths == sorted(tmp_path.iterdir()) and paths[0].read_bytes() == content
    assert evaluate(splits, options, seed=1)[0] == first


def test_multiclass_learns_and_scores_the_likeliest_class(fits):
    splits = single_class_splits(make_splits())
    options = dataclasses.replace(QUICK, kind="multiclass", fractions=(1.0,))
    values, curves = evaluate(splits, options)
    fit_result = fits[0][0]
    logits = {split: literal_logits(fit_result, splits[split]) for split in ("val", "test")}
    truth = {split: stack_labels(splits[split]).argmax(1) for split in splits}
    losses = [
        math.log(sum(math.exp(x) for x in z)) - z[y]
        for z, y in zip(logits["val"], truth["val"], strict=True)
    ]
    assert -fit_result.score == pytest.approx(np.mean(losses), rel=1e-4)
    predicted, y = logits["test"].argmax(1), truth["test"]
    assert values["100/accuracy"] == pytest.approx(np.mean(predicted == y))
    assert values["100/f1_macro"] == pytest.approx(sk.f1_score(y, predicted, average="macro"))
    probabilities = np.exp(logits["test"]) / np.exp(logits["test"]).sum(1, keepdims=True)
    area = sk.roc_auc_score(y, probabilities, multi_class="ovr")
    assert values["100/auroc_macro"] == pytest.approx(area, abs=1e-6)
    assert values["100/accuracy_low"] <= values["100/accuracy"] <= values["100/accuracy_high"]
    frequent = np.bincount(truth["train"]).argmax()
    assert values["chance/100/accuracy"] == np.mean(y == frequent) < values["100/accuracy"] - 0.2
    assert curves[-1].kind == "calibration" and curves[-1].x.min() >= 1 / 3


def test_finetuning_fits_the_tower_and_its_norm(fits):
    splits = make_splits((48, 16, 20))
    options = dataclasses.replace(QUICK, epochs=3, fractions=(1.0,), learning_rate=0.02)
    evaluate(splits, dataclasses.replace(options, mode="finetune"))
    fit_result, train, _ = fits[0]
    assert "image" in train and len(train["image"]) == 48
    initial = make_tower().variables["params"]["kernel"]
    assert np.abs(fit_result.params["tower"]["kernel"] - initial).max()
    assert np.abs(fit_result.stats["tower"]["mean"]).max() > 0
    logits = literal_logits(fit_result, splits["val"])
    val_loss = binary_cross_entropy(logits, stack_labels(splits["val"]))
    assert -fit_result.score == pytest.approx(val_loss, rel=1e-4)


def test_standardised_features_do_not_depend_on_their_scale(fits):
    splits = make_splits((40, 12, 20))
    options = dataclasses.replace(QUICK, epochs=4, fractions=(0.5,), standardise=True)
    values, _ = evaluate(splits, options)
    scaled_values, _ = evaluate(splits, options, make_model(make_tower(1000.0)))
    assert values == pytest.approx(scaled_values, abs=1e-4)
    fit_result, train, stats = fits[0]
    np.testing.assert_allclose(stats["head"]["mean"], train["features"].mean(0), atol=1e-6)
    np.testing.assert_allclose(stats["head"]["std"], train["features"].std(0), rtol=1e-5)
    np.testing.assert_array_equal(fit_result.stats["head"]["std"], stats["head"]["std"])


def test_findings_with_one_class_are_skipped_and_counted():
    splits = make_splits((40, 12, 30))
    options = dataclasses.replace(QUICK, epochs=3, fractions=(0.025, 1.0))
    single_index = classification.draw_share(40, 1 / 40, 0)[0]
    changed_splits = relabelled(
        splits,
        f1=lambda split, n, label: 1 if split == "test" else label,
        f2=lambda split, n, label: (
            np.int8(n % 2) if split != "train" else label * (n != single_index)
        ),
    )
    values, curves = evaluate(changed_splits, options)
    for share in ("2.5", "100"):
        assert values[f"{share}/labels_skipped"] == 1
        assert np.isnan(values[f"{share}/mass/auroc"])
        areas = [values[f"{share}/{name}/auroc"] for name in ("pleural_effusion", "edema")]
        assert values[f"{share}/auroc_macro"] == pytest.approx(np.mean(areas))
    assert values["2.5/n_train"] == 1 and values["2.5/labels_unseen"] == 2
    assert values["100/labels_unseen"] == 0
    assert [curve.name for curve in curves] == ["Pleural Effusion", "Edema", "all findings"]
    absent = relabelled(splits, f0=lambda split, n, label: 0 if split == "train" else label)
    values, _ = evaluate(absent, dataclasses.replace(options, fractions=(1.0,), epochs=1))
    assert values["100/labels_skipped"] == 1
    assert np.isnan(values["100/pleural_effusion/auroc"])


def test_the_policy_for_uncertain_labels_reaches_loss_and_metrics(fits):
    splits = make_splits((30, 10, 20), unknown=0.3)
    options = dataclasses.replace(QUICK, epochs=1, fractions=(1.0,))
    raw_labels = stack_labels(splits["train"])
    areas = {}
    for policy in ("ignore", "one", "mgca"):
        values, _ = evaluate(splits, dataclasses.replace(options, uncertain=policy))
        areas[policy] = values["100/auroc_macro"]
        train = fits[-1][1]
        uncertain = {"ignore": [0, 0, 0], "one": [1, 1, 1], "mgca": [1, 0, 1]}[policy]
        expected = np.where(raw_labels < 0, uncertain, raw_labels)
        np.testing.assert_array_equal(train["labels"], expected)
        np.testing.assert_array_equal(train["mask"], (raw_labels >= 0) | (policy != "ignore"))
    assert len(set(areas.values())) == 3


def test_shares_are_nested_and_selected_by_the_seed():
    draw_share = classification.draw_share
    shares = [set(draw_share(250, f, 5).tolist()) for f in (0.01, 0.1, 0.4, 1.0)]
    assert [len(share) for share in shares] == [2, 25, 100, 250]
    assert all(a < b for a, b in zip(shares, shares[1:], strict=False))
    assert shares[1] != set(draw_share(250, 0.1, 6).tolist())
    assert draw_share(7, 0.01, 0).shape == (1,)
    assert draw_share(7, 1.0, 0).tolist() == list(range(7))


def test_the_learning_rate_is_constant_or_warms_up_and_decays():
    def rates(options, steps=10):
        options = dataclasses.replace(options, weight_decay=0.0)
        optimiser = classification.build_optimiser(options, steps)
        params, sizes = {"bias": jnp.zeros(2)}, []
        state = optimiser.init(params)
        for _ in range(steps):  # a constant gradient moves Adam by its learning rate
            updates, state = optimiser.update({"bias": jnp.ones(2)}, state, params)
            sizes.append(-float(updates["bias"][0]))
        return sizes

    assert rates(Options(learning_rate=0.1)) == pytest.approx([0.1] * 10, rel=1e-4)
    warmup = [0, 0.025, 0.05, 0.075, *[0.1] * 6]
    assert rates(Options(learning_rate=0.1, warmup_steps=4)) == pytest.approx(warmup, rel=1e-4)
    cosine = [0.1 * (1 + math.cos(math.pi * n / 10)) / 2 for n in range(10)]
    cosine_rates = rates(Options(learning_rate=0.1, schedule="cosine"))
    assert cosine_rates == pytest.approx(cosine, rel=1e-3, abs=1e-7)
    options = Options(learning_rate=0.1, schedule="cosine", warmup_steps=2, decay_steps=6)
    decay = [0.1 * (1 + math.cos(math.pi * n / 4)) / 2 for n in range(5)]
    assert rates(options) == pytest.approx([0, 0.05, *decay, 0, 0, 0], rel=1e-3, abs=1e-7)
    optimiser = classification.build_optimiser(Options(weight_decay=0.5, learning_rate=0.1), 1)
    params = {"bias": jnp.ones(2)}
    updates, _ = optimiser.update({"bias": jnp.zeros(2)}, optimiser.init(params), params)
    assert optax.apply_updates(params, updates)["bias"] == pytest.approx([0.95] * 2)


def without_labels(splits):
    empty = np.zeros(0, np.int8)
    return {
        split: [dataclasses.replace(record, labels=empty) for record in records]
        for split, records in splits.items()
    }


@pytest.mark.parametrize(
    ("change", "options", "findings", "message"),
    [
        (lambda s: s, {}, (), "needs labels, and the dataset has no findings; leave"),
        (without_labels, {}, FINDINGS, "needs labels, and split train has none; add labels"),
        (lambda s: s | {"val": []}, {}, FINDINGS, "no records in split val; add some"),
        (
            lambda s: s,
            {"labels": ("Mass", "Hernia")},
            FINDINGS,
            "classification.labels Hernia are not findings of the data; choose from Pleural",
        ),
        (
            lambda s: s,
            {"kind": "multiclass", "labels": ("Mass",)},
            FINDINGS,
            "multiclass has the single label Mass; give two, or use multilabel",
        ),
    ],
)
def test_data_that_cannot_be_classified_are_refused_before_any_fit(
    change, options, findings, message, fits
):
    splits = change(make_splits((6, 4, 4)))
    options = dataclasses.replace(QUICK, **options)
    with pytest.raises(UserError, match=message):
        check_task(classification, splits, options, findings)
    with pytest.raises(UserError, match=message):
        evaluate(splits, options, findings=findings)
    assert not fits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fractions": (0.1, 2.0)}, r"fractions is \(0.1, 2.0\); use numbers above 0, at most 1"),
        ({"fractions": ()}, r"fractions is \(\); use numbers"),
        ({"batch": 0}, "classification.batch is 0; use at least 1"),
        ({"bootstrap_samples": 1}, "classification.bootstrap_samples is 1; use at least 2"),
        ({"learning_rate": -1.0}, "classification.learning_rate is -1.0; use at least 0"),
        ({"weight_decay": math.nan}, "classification.weight_decay is nan; use at least 0"),
        ({"mode": "frozen"}, "classification.mode is 'frozen'; use one of linear, finetune"),
    ],
)
def test_options_check_their_ranges(options, message):
    with pytest.raises(UserError, match=message):
        Options(**options)


def test_multiclass_counts_the_records_with_none_or_several_labels():
    splits = single_class_splits(make_splits((6, 4, 4)))
    options = Options(kind="multiclass")
    check_task(classification, splits, options, FINDINGS)
    labels = [[1, 1, 0], [0, 0, 0], [1, 0, 0], [1, -1, -1]]
    records = [
        dataclasses.replace(record, labels=np.int8(y))
        for record, y in zip(splits["test"], labels, strict=True)
    ]
    message = "and 2 of 4 in split test have none or several; use multilabel"
    with pytest.raises(UserError, match=message):
        check_task(classification, splits | {"test": records}, options, FINDINGS)
    check_task(classification, splits | {"test": records[2:]}, options, FINDINGS)
    with pytest.raises(UserError, match="fake has no image tower"):
        evaluate(splits, options, dataclasses.replace(make_model(), tower=None))


def test_a_fit_that_diverges_names_its_share_and_the_option():
    options = dataclasses.replace(QUICK, learning_rate=1e38, fractions=(1.0,))
    message = (
        r"the loss of classification_100 is (nan|inf) in epoch \d+; "
        r"lower config.eval.classification.learning_rate$"
    )
    with pytest.raises(UserError, match=message):
        evaluate(make_splits((40, 12, 30)), options)


def test_one_class_in_all_findings_is_undefined_and_not_a_failure():
    splits = make_splits((40, 12, 30))
    changed = relabelled(
        splits,
        **{f"f{i}": lambda split, n, label: 1 if split == "test" else label for i in (0, 1, 2)},
    )
    values, _ = evaluate(changed, dataclasses.replace(QUICK, fractions=(1.0,), epochs=1))
    assert np.isnan(values["100/auroc_macro"]) and values["100/labels_skipped"] == 3
