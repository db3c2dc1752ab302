"""The page that compares runs: differences with intervals, curves, phrases, and bad folders."""

import contextlib
import json
import re

import numpy as np
import pytest
from test_page import Page

from plan_jax import page
from plan_jax.page import __main__ as command
from plan_jax.page import runs as page_runs
from plan_jax.page.examples import load_examples, save_examples
from plan_jax.tasks import CATALOGUE, TITLES
from plan_jax.types import ExampleScores, PhraseExample, UserError

NAMES = [f"{i} nodule" for i in range(40)]


def phrase_example(index, level, size=24):
    truth = np.zeros((size, size), bool)
    truth[2:8, 2:8] = True
    image = np.full((size, size, 1), 40 + 20 * index, np.uint8)
    heat_maps = np.full((2, 4, 4), level, np.float32)
    heat_maps[1, 0, 0] = 1
    return PhraseExample(
        "random", f"phrase {index}", image, truth, heat_maps, level, 1.0, f"{index}"
    )


def write_run(
    folder,
    level,
    *,
    data="phantom, test",
    names=NAMES,
    size=24,
    history=True,
    options=None,
    more=None,
):
    """Writes what training leaves: a model whose CNR is `level` above noise of the examples."""
    folder.mkdir(parents=True)
    config = {"method": "plan", "seed": 3, "steps": 20, "data": {"name": "phantom"}}
    (folder / "config.json").write_text(json.dumps(config))
    values = np.random.default_rng(0).normal(size=len(names)) + level
    table = np.stack([values, np.ones(len(names))], 1)[..., None]
    metrics = {
        "grounding/cnr_signed": float(values.mean()),
        "grounding/prior/cnr_signed": 0.5,
        "retrieval/i2t_r5": 0.4,
        "retrieval/i2t_median_rank": 7.0,
        "zero_shot/auroc_macro": None,
        "params_sha256": "ab" * 32,
    } | (more or {})
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "report.html").write_text("<!doctype html>")
    if history:
        rows = [{"step": step, "loss": 3.0 / step} for step in range(1, 4)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = {"grounding/cnr_signed": ExampleScores(names, table)}
    phrases = [phrase_example(i, level, size) for i in range(3)]
    save_examples(folder, data, scores, phrases, options)
    return folder


@pytest.fixture
def pair(tmp_path):
    return [write_run(tmp_path / "a", 1.0), write_run(tmp_path / "b", 1.25)]


def render(folders):
    return page.render_runs(page_runs.read_runs(folders), CATALOGUE, TITLES)


def cells(html, label):
    """Returns the texts of the row of a metric."""
    runs = html.split("<tr>")
    row = next(part for part in runs if label in part)
    return [text.strip() for text in Page(f"<tr>{row.split('</tr>')[0]}</tr>").text if text.strip()]


def test_a_paired_difference_is_narrower_than_its_intervals(pair):
    row = cells(render(pair), "CNR, signed")
    # The noise of the examples is common to both runs, so the difference is exact.
    assert "+0.25" in row and "+0.25 to +0.25" in row and "better" in row


def test_a_difference_of_the_same_size_drowns_in_noise_of_its_own(tmp_path):
    first = write_run(tmp_path / "a", 1.0)
    second = write_run(tmp_path / "b", 1.25)
    stored = load_examples(second).scores["grounding/cnr_signed"].table
    stored[:, 0, 0] = np.random.default_rng(5).permutation(stored[:, 0, 0])
    save_examples(
        second, "phantom, test", {"grounding/cnr_signed": ExampleScores(NAMES, stored)}, []
    )
    assert "not distinguishable" in cells(render([first, second]), "CNR, signed")


def test_values_baselines_curves_phrases_and_links_are_there(pair, tmp_path):
    html = page.render_runs(
        page_runs.read_runs(pair), CATALOGUE, TITLES, folder=tmp_path / "elsewhere"
    )
    parsed = Page(html)
    text = " ".join(parsed.text)
    assert "Comparison of 2 runs" in text and f"b {page_runs._MINUS} a" in text
    for part in ("lung prior 0.50", "phrase 2", "a: CNR 1.00", "b: CNR 1.25", "median rank"):
        assert part in text, part
    assert ("href", "../a/report.html") in parsed.attributes
    assert html.count('alt="a: CNR 1.00; phrase: phrase 0"') == 1
    curves = html.split("Training curves")[1]
    # The legend names both runs, and there is a line for each.
    assert ">a<" in curves and ">b<" in curves
    assert "script" not in parsed.tags


def test_a_difference_without_single_examples_has_no_interval(pair):
    assert cells(render(pair), "R@5")[-2:] != ["better"]
    (pair[1] / "examples.npz").unlink()
    html = render(pair)
    assert "b has no scores of single examples" in html
    assert "It is not stored on which data b was evaluated" in html
    row = cells(html, "CNR, signed")
    assert "+0.25" in row and "better" not in row and "different data" not in row


def test_other_examples_have_no_interval(tmp_path):
    first = write_run(tmp_path / "a", 1.0)
    second = write_run(tmp_path / "b", 1.25, names=[f"{i} effusion" for i in range(40)])
    row = cells(render([first, second]), "CNR, signed")
    assert "other examples: no interval" in row and "better" not in row


def test_a_metric_without_single_examples_is_marked_where_its_task_has_others(tmp_path):
    more, names = {"grounding/miou_z": 0.3}, [f"{i} effusion" for i in range(40)]
    first = write_run(tmp_path / "a", 1.0, more=more)
    second = write_run(tmp_path / "b", 1.25, names=names, more=more)
    html = render([first, second])
    assert "other examples: no interval" in cells(html, "mIoU, above the mean")
    assert "other examples: no interval" not in cells(html, "R@5")


def test_examples_of_other_options_are_not_paired(tmp_path):
    options = {"crop": 1.0, "size": 24, "num_examples": 4}
    others = {"a": {}, "b": {"num_examples": 9}, "c": {"crop": 0.875}, "d": {"size": 48}}
    a, b, c, d = (
        write_run(tmp_path / name, 1.0 + i, options={"grounding": options | other})
        for i, (name, other) in enumerate(others.items())
    )
    html = render([a, b])
    assert "not paired" not in html and "better" in cells(html, "CNR, signed")
    for folder, part in ((c, "crop 1.0 and 0.875"), (d, "size 24 and 48")):
        html = render([a, folder])
        assert f"by grounding with different options ({part}), so their examples are not" in html
        row = cells(html, "CNR, signed")
        assert "other options: no interval" in row and "better" not in row


def test_examples_of_other_metrics_are_left_out(pair):
    for name in ("metrics.json", "examples.npz"):  # an evaluation that did not end, or a copy
        content = (pair[1] / name).read_bytes()
        other = write_run(pair[1].parent / f"other {name}", 3.0)
        (pair[1] / name).write_bytes((other / name).read_bytes())
        html = render(pair)
        assert "The examples.npz of b belongs to other metrics than its metrics.json" in html
        assert "no scores of single examples" not in html and "The same phrases" not in html
        assert "better" not in cells(html, "CNR, signed")
        (pair[1] / name).write_bytes(content)


def test_names_of_folders_are_legible_and_their_links_work(tmp_path):
    folders = [write_run(tmp_path / name, 1.0) for name in ("_old", "javascript:a#b")]
    html = page.render_runs(page_runs.read_runs(folders), CATALOGUE, TITLES, folder=tmp_path)
    assert 'href="javascript%3Aa%23b/report.html"' in html
    assert re.search(r"> ?_old</text>", html.split("Training curves")[1])


def test_runs_of_different_data_are_not_compared(tmp_path):
    first = write_run(tmp_path / "a", 1.0)
    second = write_run(tmp_path / "b", 1.25, data="pairs, test")
    html = render([first, second])
    assert "evaluated on different data (a: phantom, test; b: pairs, test)" in html
    assert "+0.25" not in html and "different data" in cells(html, "CNR, signed")


def test_a_run_without_an_evaluation_has_curves_only(pair):
    for name in ("metrics.json", "examples.npz"):
        (pair[0] / name).unlink()
    html = render(pair)
    assert "a has not been evaluated, so it has curves only." in html
    assert "Training curves" in html and "1.25" in html and "The same phrases" not in html


def test_the_folder_of_an_evaluation_takes_curves_and_config_of_its_run(tmp_path):
    folders = []
    for name, level in (("a", 1.0), ("b", 2.0)):
        write_run(tmp_path / name, 0.0)
        folder = write_run(tmp_path / name / "eval" / "test", level, history=False)
        (folder / "config.json").unlink()
        folders.append(folder)
    runs = page_runs.read_runs(folders)
    assert [run.label for run in runs] == ["a/eval/test", "b/eval/test"]
    assert [len(run.history) for run in runs] == [3, 3] and runs[0].config["seed"] == 3
    assert runs[1].metrics["grounding/cnr_signed"] - runs[0].metrics["grounding/cnr_signed"] == 1


def test_a_film_is_recognised_at_another_size_and_another_film_is_not(tmp_path):
    folders = [write_run(tmp_path / "a", 1.0), write_run(tmp_path / "b", 1.0, size=48)]
    runs = page_runs.read_runs(folders)
    assert len(page_runs.compare_phrases(runs)) == 3
    brighter = [
        PhraseExample("best", "p", np.full((24, 24, 1), 200, np.uint8), *_rest(), name=str(i))
        for i in range(3)
    ]
    save_examples(folders[1], "phantom, test", {}, brighter)
    assert not page_runs.compare_phrases(page_runs.read_runs(folders))


def _rest():
    return np.ones((24, 24), bool), np.zeros((1, 2, 2), np.float32), 0.0, 0.0


def test_one_run_is_not_compared_with_itself(tmp_path):
    folders = [write_run(tmp_path / "a", 1.0), write_run(tmp_path / "b", 1.0)]
    save_examples(folders[0], "phantom, test", {}, [phrase_example(0, 1.0)] * 2)
    save_examples(folders[1], "phantom, test", {}, [])
    assert not page_runs.compare_phrases(page_runs.read_runs(folders))


def test_stored_examples_return_without_their_names(tmp_path):
    folder = write_run(tmp_path / "a", 1.0, names=["7 John Doe has a nodule"])
    stored = load_examples(folder)
    assert stored.data == "phantom, test" and stored.phrases[2].phrase == "phrase 2"
    np.testing.assert_array_equal(stored.phrases[1].heat_maps, phrase_example(1, 1.0).heat_maps)
    assert stored.scores["grounding/cnr_signed"].statistic == "mean"
    with np.load(folder / "examples.npz") as arrays:
        assert not any("John" in str(arrays[name]) for name in arrays.files)


@pytest.mark.parametrize("part", ["metrics.json", "config.json", "examples.npz"])
@pytest.mark.parametrize("content", [b"", b"half {", b"[1]"])
def test_a_damaged_file_is_one_sentence(pair, part, content):
    (pair[1] / part).write_bytes(content)
    with pytest.raises(UserError, match=rf"^[^\n]*b/{part} (cannot be read|is not a JSON)[^\n]*$"):
        page_runs.read_runs(pair)


def test_damage_inside_an_archive_is_one_sentence(pair):
    path = pair[1] / "examples.npz"
    content = path.read_bytes()
    for start in range(0, len(content), 97):
        path.write_bytes(content[:start] + b"\xff" * 8 + content[start + 8 :])
        with contextlib.suppress(UserError):
            load_examples(pair[1])


MISTAKES = {
    "a folder that is no run": (["a", "empty"], "empty is not a run; pass a folder that training"),
    "no folder": (["a", "nowhere"], "nowhere does not exist; pass a folder that training"),
    "one run": (["a"], "1 runs cannot be compared; pass 2 to 6 folders"),
    "one run twice": (["a", "./a"], "a is named twice; pass each run once"),
    "a folder as page": (
        ["a", "b", "--out", "empty"],
        "empty is a folder; pass the path of a file",
    ),
    "an address": (["a", "gs://bucket/b"], "is an address; pass a path on a local disk"),
    "a file above the page": (["a", "b", "--out", "file/page.html"], "file cannot be created"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name, pair, tmp_path, monkeypatch, capsys):
    arguments, sentence = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert command.run(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and sentence in error


def test_the_command_writes_the_page(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.run(["a", "b", "--out", "pages/ab.html"]) == 0
    assert capsys.readouterr().out == "comparison of 2 runs: pages/ab.html\n"
    parsed = Page((tmp_path / "pages/ab.html").read_text())
    assert ("href", "../b/report.html") in parsed.attributes
