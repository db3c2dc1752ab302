"""The contest of tools/compare.py: its trials, what they choose, and the table of differences."""

import json
import math

import numpy as np
import pytest

from configs.compare import HARD_HYPER, METHODS, TUNED, get_config
from plan_jax.config import Config
from plan_jax.main import apply_overrides
from plan_jax.page.examples import save_examples
from plan_jax.types import ExampleScores, UserError
from tools import compare

NUM_TRIALS = 6  # the defaults, a learning rate, and two values of each of two constants
NAMES = [f"{i} nodule" for i in range(30)]


def write_run(folder, cnr, recall=0.5):
    """Writes what a run leaves: the noise of the images is that of every run."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = dict(zip(compare.SCORED, (cnr, 2.0, recall, recall), strict=True))
    (folder / "metrics.json").write_text(json.dumps(metrics | {"grounding/pointing": 0.5}))
    values = np.random.default_rng(0).normal(size=len(NAMES)) + cnr
    table = np.stack([values, np.ones(len(NAMES))], 1)[..., None]
    save_examples(folder, "phantom", {"grounding/cnr_signed": ExampleScores(NAMES, table)}, [])


@pytest.fixture
def contest(tmp_path, monkeypatch):
    """A contest of runs that are not trained: returns a function, and what it would have run.

    The CNR of a run is its tau, and the default's is 0.1.
    """
    started = {}

    def train(folder, variant, overrides, core=None):
        if (folder / "metrics.json").exists():
            return "finished earlier"
        started[folder.name] = fields = dict(
            argument.removeprefix("--config.").split("=") for argument in overrides
        )
        write_run(folder, float(fields.get("hyper.tau", 0.1)))
        return "finished"

    monkeypatch.setattr(compare, "train", train)

    def run(*arguments):
        started.clear()
        compare.main(["--runs", str(tmp_path), *arguments])
        return dict(started)

    return run


def test_every_method_has_as_many_trials():
    assert list(TUNED) == list(METHODS)
    for method in METHODS:
        settings = compare.list_settings(method)
        for scores in (lambda values: 0.0, lambda values: float(len(values))):
            _, trials = compare.search(settings, scores)
            assert len(trials) == NUM_TRIALS
            assert len({compare.describe(trial.values) for trial in trials}) == NUM_TRIALS


@pytest.mark.parametrize("method", METHODS)
def test_every_trial_and_hard_phantoms_are_valid_configs(method):
    def load(values):
        texts = {name: str(value) for name, value in values.items()}
        return Config.from_dict(apply_overrides(get_config(method).to_dict(), texts))

    default = load({})
    for field, (first, *others) in compare.list_settings(method).items():
        section, _, name = field.partition(".")
        assert getattr(getattr(default, section), name) == first
        for value in others:
            assert getattr(getattr(load({field: value}), section), name) == value != first
    hard = load(compare.hard_values(method))
    assert hard.data.builder["difficulty"] == "hard" and hard.data.max_words > 100
    for name, value in HARD_HYPER.get(method, {}).items():
        assert getattr(hard.hyper, name) == value


def test_a_change_is_kept_only_if_it_is_better():
    scores = {"": 1.0, "a=2": 1.0, "a=3": 2.0, "a=3,b=5": -math.inf, "a=3,b=6": 3.0}
    settings = {"x.a": (1, 2, 3), "x.b": (4, 5, 6)}
    choice, trials = compare.search(settings, lambda values: scores[compare.describe(values)])
    assert choice == {"x.a": 3, "x.b": 6}
    assert [compare.describe(trial.values) for trial in trials] == list(scores)


def test_the_score_counts_grounding_and_retrieval_alike():
    metrics = dict(zip(compare.SCORED, (1.0, 2.0, 0.2, 0.4), strict=True))
    assert compare.compute_score(metrics) == pytest.approx((0.5 + 0.3) / 2)
    assert compare.compute_score(metrics | {"grounding/cnr_signed": None}) == -math.inf


def test_trials_use_no_seed_and_no_split_of_a_final_run(contest, tmp_path, capsys):
    started = contest("--variants", "convirt,plan", "--tune", "--tune-steps", "7", "--seeds", "2")
    trials = [fields for fields in started.values() if "eval.split" in fields]
    assert len(trials) == 2 * NUM_TRIALS and len(started) == len(trials) + 2 * 2
    for fields in trials:
        assert (fields["seed"], fields["eval.split"], fields["steps"]) == ("100", "val", "7")
    final = started["convirt-1"]
    assert final["hyper.tau"] == "0.2" and final["seed"] == "1" and "steps" not in final
    assert "hyper.tau_region" not in started["plan-1"]
    stored = json.loads((tmp_path / "tuned-7/tuning.json").read_text())
    assert stored["convirt"]["choice"] == {"hyper.tau": 0.2} and stored["plan"]["choice"] == {}
    assert [len(method["trials"]) for method in stored.values()] == [NUM_TRIALS] * 2
    output = capsys.readouterr().out
    default = "default: learning_rate=0.006,tau=0.1,image_to_text=0.75"
    assert f"| ConVIRT | {default} | 0.275 |  |" in output
    assert "| ConVIRT | tau=0.2 | 0.300 | chosen |" in output
    assert output.count("| chosen |") == 2 and "validation phantoms" in output


def test_a_contest_is_resumed_and_keeps_its_choice(contest, tmp_path):
    arguments = ("--variants", "convirt", "--tune", "--seeds", "1")
    contest(*arguments)
    (folder,) = tmp_path.iterdir()
    (folder / "trials/convirt-tau=0.2/metrics.json").unlink()
    assert list(contest(*arguments)) == ["convirt-tau=0.2"]
    path = folder / "tuning.json"
    path.write_text(path.read_text().replace('"hyper.tau": 0.2', '"hyper.tau": 0.3'))
    with pytest.raises(UserError, match="another choice for convirt; pass another --runs"):
        contest(*arguments)


def test_hard_and_tuned_runs_have_folders_of_their_own(contest, tmp_path):
    arguments = ("--variants", "place", "--seeds", "1")
    assert set(contest(*arguments)["place-0"]) == {"seed", "data.dir"}
    assert contest(*arguments, "--hard")["place-0"]["hyper.max_sentences"] == "24"
    contest(*arguments, "--hard", "--tune")
    names = {path.parent.parent.name for path in tmp_path.rglob("place-0/metrics.json")}
    assert names == {tmp_path.name, "hard", "hard-tuned-400"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--tune", "--variants", "plan,plan_2"), "variant plan_2 has no constants in TUNED"),
        (("--seeds", "101"), "101 is too many; pass at most 99"),
    ],
)
def test_what_cannot_be_fair_is_refused(contest, arguments, message):
    with pytest.raises(UserError, match=message):
        contest(*arguments)


def test_a_diverged_trial_is_the_worst_and_another_failure_ends_the_search(tmp_path):
    with pytest.raises(UserError, match="did not finish, see .*log.txt; re-run"):
        compare.score_trial(tmp_path)
    (tmp_path / "log.txt").write_text("the loss is not finite from step 3 of 9 on; lower ...")
    assert compare.score_trial(tmp_path) == -math.inf


def test_differences_are_paired_over_images_and_seeds(contest, tmp_path):
    for seed, level in enumerate((1.0, 2.0)):
        write_run(tmp_path / f"plan-{seed}", level + 0.5)
        write_run(tmp_path / f"mgca-{seed}", level)
    contest("--variants", "mgca,plan", "--seeds", "2")
    page = (tmp_path / "report.html").read_text()
    # The noise of images and of seeds is common to both, so the difference is exact.
    assert "PLAN minus it: CNR" in page and "0.500 ±" in page and "[0.50, 0.50]" in page
