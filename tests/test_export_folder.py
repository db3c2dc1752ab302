"""Model folders: what is saved is what is loaded, and a changed or foreign folder is refused."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save
from saved_models import TEXTS, assert_equal_answers, make_config, make_model, make_variables
from tokenizers import BertWordPieceTokenizer
from transformers import AutoTokenizer

import plan_jax
from plan_jax import model as models
from plan_jax.checkpoint.checksums import fingerprint
from plan_jax.config import Config
from plan_jax.data.tokenizer import load_tokenizer, tokenize_batch
from plan_jax.export import folder as folders
from plan_jax.methods import plan
from plan_jax.types import UserError

FIELDS = {"hyper": {}, "fine_map": False}
METHODS = {
    "plan": {},
    "convirt": FIELDS | {"method": "convirt"},
    "convirt_sigmoid": FIELDS | {"method": "convirt", "hyper": {"contrast": "sigmoid"}},
    "gloria": FIELDS | {"method": "gloria"},
    "mgca": FIELDS | {"method": "mgca"},
    "asg": FIELDS | {"method": "asg"},
    "place": FIELDS | {"method": "place"},
}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    return model.save_pretrained(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def copy(saved, tmp_path):
    """Returns a copy of the saved model that a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.mark.parametrize("method", METHODS)
def test_the_parameters_of_each_method_are_saved(method, tmp_path):
    config = make_config(**METHODS[method])
    components = models.build_components(config)
    variables = make_variables(components)
    model = models.make_model(components, config, variables)
    loaded = models.load_variables(model.save_pretrained(tmp_path / "saved"))
    for name, tree in variables.items():
        assert jax.tree.structure(loaded[name]) == jax.tree.structure(tree)
        leaves = (jax.tree.leaves(tree), jax.tree.leaves(loaded[name]))
        for expected, actual in zip(*leaves, strict=True):
            np.testing.assert_array_equal(actual, expected, strict=True)
    assert loaded["config"].hyper == config.hyper and loaded["config"].method == config.method
    checksums = json.loads((tmp_path / "saved/checksums.json").read_text())
    assert checksums["params_sha256"] == fingerprint(variables["params"])


def test_a_saved_model_computes_the_same(model, saved):
    loaded = plan_jax.load(saved)
    assert_equal_answers(model, loaded)
    assert loaded.tower.name == model.tower.name and loaded.grid == model.grid


def test_half_precision_halves_the_parameters_and_computes_nearly_the_same(model, saved, tmp_path):
    half = model.save_pretrained(tmp_path / "half", dtype="float16")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (half, saved)]
    assert sizes[0] < 0.7 * sizes[1]
    loaded = plan_jax.load(half)
    assert_equal_answers(model, loaded, 1e-2)
    with pytest.raises(AssertionError):
        assert_equal_answers(model, loaded)
    # Saved once more, it loses nothing.
    again = loaded.save_pretrained(tmp_path / "again", dtype="float16")
    name = "model.safetensors"
    assert (again / name).read_bytes() == (half / name).read_bytes()


def test_values_too_large_for_half_precision_are_refused(tmp_path):
    config, folder = make_config(), tmp_path / "saved"
    variables = {"params": {"x": np.float32([1e5])}, "batch_stats": {}, "memory": {}}
    options = {"step": 0, "about": {}, "metrics": {}}
    tokenizer = load_tokenizer("phantom")
    with pytest.raises(UserError, match="params/x has values too large for float16; use dtype"):
        folders.encode_model(config, variables, tokenizer, dtype="float16", **options)
    with pytest.raises(UserError, match="dtype is 'int8'; use one of float32, float16"):
        folders.encode_model(config, variables, tokenizer, dtype="int8", **options)
    assert not folder.exists()


FILES = (
    *("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"),
    *("metrics.json", "checksums.json"),
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("position", [0, 0.5, -1])
def test_a_changed_byte_is_one_sentence_that_names_the_file(name, position, copy):
    path = copy / name
    content = bytearray(path.read_bytes())
    content[int(position * len(content)) if position >= 0 else -1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        plan_jax.load(copy)
    assert str(error.value).startswith(f"{path} is not the file that was saved; ")


@pytest.mark.parametrize("name", sorted(set(FILES) - {"metrics.json"}))
def test_a_missing_file_is_named(name, copy):
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"model .*copy has no {name}; save or download it again"):
        plan_jax.load(copy)


def test_a_card_that_was_edited_is_reported_and_the_model_is_loaded(model, copy, capsys):
    with (copy / "README.md").open("a") as file:
        file.write("\nOne more sentence.\n")
    assert_equal_answers(model, plan_jax.load(copy))
    sentence = f"{copy / 'README.md'} is not the file that was saved; the model itself is unchanged"
    assert sentence in capsys.readouterr().err


def test_a_folder_of_a_later_format_is_refused(copy):
    settings = json.loads((copy / "config.json").read_text()) | {"format": 2, "version": "9.1"}
    (copy / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"by plan_jax 9.1 in format 2, and this version reads"):
        plan_jax.load(copy)


def test_checksums_that_name_another_folder_are_refused(copy):
    hashes = json.loads((copy / "checksums.json").read_text())["files"] | {"../secret": "0"}
    (copy / "checksums.json").write_bytes(folders._encode_checksums(hashes, ""))
    with pytest.raises(UserError, match=r"names '../secret', which is not a file of its folder"):
        plan_jax.load(copy)


def test_a_loaded_model_is_shown_in_one_line(model):
    assert repr(model) == "Model('plan', images 32 x 32, maps 8 x 8)"


def test_the_working_directory_is_not_replaced(model, tmp_path, monkeypatch):
    (tmp_path / "own/inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "own/inner")
    for name in (".", "..", tmp_path / "own"):
        with pytest.raises(UserError, match="holds the working directory; pass another folder"):
            model.save_pretrained(name)
    assert (tmp_path / "own/inner").samefile(".")


def test_a_model_replaces_a_model_and_nothing_else(model, copy, tmp_path):
    other = make_model(seed=1)
    (tmp_path / "copy.old").mkdir()
    assert other.save_pretrained(copy) == copy
    assert_equal_answers(other, plan_jax.load(copy))
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "copy.old"}
    (copy / ".git").mkdir()
    with pytest.raises(UserError, match="holds .git beside its model, which would be lost; move"):
        model.save_pretrained(copy)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds todo.txt and no model of plan_jax; pass a new"):
        model.save_pretrained(tmp_path / "notes")
    with pytest.raises(UserError, match=r"todo.txt is a file; pass the name of a new folder"):
        model.save_pretrained(tmp_path / "notes/todo.txt")
    assert (tmp_path / "notes/todo.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    assert_equal_answers(model, plan_jax.load(tmp_path / "empty"))


@pytest.mark.parametrize("failing", ["first", "second"])
def test_a_failure_leaves_the_old_model(failing, model, copy, tmp_path, monkeypatch):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    rename = Path.rename

    def fail(self, target):
        if self.name.endswith(".part") or failing == "first":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UserError, match="No space left on device"):
        make_model(seed=1).save_pretrained(copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_kill_between_two_renames_leaves_the_old_model(
    model, copy, tmp_path, monkeypatch, capsys
):
    rename, done = Path.rename, []

    def kill(self, target):
        if done:
            raise KeyboardInterrupt
        done.append(rename(self, target))

    monkeypatch.setattr(Path, "rename", kill)
    with pytest.raises(KeyboardInterrupt):
        make_model(seed=1).save_pretrained(copy)
    monkeypatch.undo()
    assert not copy.exists()
    (tmp_path / "link").symlink_to(copy)
    for name in (tmp_path / "link", copy):
        assert_equal_answers(model, plan_jax.load(name))
    (tmp_path / "link").unlink()
    assert f"model {copy} was being replaced; its old version" in capsys.readouterr().err
    # The next two take the place, and nothing is left beside it, but what is being written.
    (tmp_path / ".copy.1-1.part").mkdir()
    os.utime(tmp_path / ".copy.1-1.part", (0, 0))
    (tmp_path / ".copy.1-2.part").mkdir()
    for seed in (2, 3):
        make_model(seed=seed).save_pretrained(copy)
    assert_equal_answers(make_model(seed=3), plan_jax.load(copy))
    assert {path.name for path in tmp_path.iterdir()} == {"copy", ".copy.1-2.part"}


def test_a_file_of_ones_own_among_added_files_is_not_lost(model, copy):
    folders.add_files(copy, {"programs/image.bin": b"ab"})
    (copy / "programs/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds programs/notes.txt beside its model, which would"):
        model.save_pretrained(copy)
    assert (copy / "programs/notes.txt").read_text() == "mine"
    (copy / "programs/notes.txt").rename(copy.parent / "notes.txt")
    (copy / "programs/__pycache__").mkdir()
    model.save_pretrained(copy)


def test_files_are_added_and_verified(copy):
    folders.add_files(copy, {"programs/image.bin": b"ab"})
    folders.add_files(copy, {"programs/image.bin": b"abc", "programs/text.bin": b""})
    plan_jax.load(copy)
    (copy / "programs/image.bin").write_bytes(b"abd")
    with pytest.raises(UserError, match=r"programs/image.bin is not the file that was saved"):
        plan_jax.load(copy)
    with pytest.raises(UserError, match=r"'../x' is not a name inside .*copy; use a relative name"):
        folders.add_files(copy, {"../x": b""})


def test_a_link_to_a_model_stays_a_link(model, copy, tmp_path):
    (tmp_path / "link").symlink_to(copy)
    make_model(seed=1).save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and not copy.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "link"]


def write_files(folder, **contents):
    """Replaces files of a model folder, `name__suffix` by content, with hashes that fit."""
    hashes = json.loads((folder / "checksums.json").read_text())["files"]
    for key, content in contents.items():
        name = key.replace("__", ".")
        (folder / name).write_bytes(content)
        hashes[name] = hashlib.sha256(content).hexdigest()
    (folder / "checksums.json").write_bytes(folders._encode_checksums(hashes, ""))


def test_a_model_does_not_choose_where_an_evaluation_writes(copy, tmp_path):
    settings = json.loads((copy / "config.json").read_text())
    settings["config"]["data"]["dir"] = settings["config"]["parallel"]["cache"] = str(tmp_path)
    write_files(copy, config__json=json.dumps(settings).encode())
    config = models.load_config(copy)
    assert config.data.dir == "data" and config.parallel.cache == ""


def test_a_config_that_cannot_be_used_is_named(copy):
    settings = json.loads((copy / "config.json").read_text())
    settings["config"]["later"] = 1
    write_files(copy, config__json=json.dumps(settings).encode())
    with pytest.raises(UserError, match=r"copy has a config that cannot be used \(config.later is"):
        plan_jax.load(copy)


def test_no_path_of_the_machine_is_saved(tmp_path):
    (tmp_path / "own").mkdir()
    values = make_config().to_dict()
    values["data"] |= {"name": "pairs", "dir": str(tmp_path), "tokenizer": str(tmp_path / "v.txt")}
    values["data"]["builder"] = {"manifest": "ward_7/list.csv", "images": str(tmp_path / "films")}
    values["parallel"] |= {"cache": str(tmp_path / "programs")}
    values["weights"] |= {"vision": str(tmp_path / "own"), "text": "owner/name"}
    values["weights"]["heads"] = "ward_7/gone/heads.pth"
    config = Config.from_dict(values)
    content = folders.remove_places(config)
    assert str(tmp_path) not in json.dumps(content) and "ward_7" not in json.dumps(content)
    cleaned = Config.from_dict(content)
    assert cleaned.data.builder["manifest"] == "list.csv" and cleaned.data.tokenizer == "v.txt"
    assert (cleaned.weights.vision, cleaned.weights.text) == ("own", "owner/name")
    assert cleaned.weights.heads == "heads.pth"
    assert cleaned.data.dir == "data" and cleaned.parallel.cache == ""
    assert cleaned.vision == config.vision and cleaned.hyper == config.hyper


def test_a_tokenizer_that_names_code_is_refused(copy, capfd):
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (copy / "own.py").write_text("print('own code')\nclass Own: pass\n")
    write_files(copy, tokenizer_config__json=json.dumps(settings).encode())
    with pytest.raises(UserError, match=r"tokenizer_config.json was not written by plan_jax; save"):
        plan_jax.load(copy)
    # Nor is anybody asked whether to run the code, where the folder is named as a tokenizer.
    with contextlib.suppress(UserError):
        load_tokenizer(str(copy))
    output = "".join(capfd.readouterr())
    assert "own code" not in output and "[y/N]" not in output


@pytest.mark.parametrize("change", [{"config": []}, {"about": {"note": 1}}, {"step": "1"}])
def test_a_config_without_what_is_written_is_named(change, copy):
    settings = json.loads((copy / "config.json").read_text()) | change
    write_files(copy, config__json=json.dumps(settings).encode())
    message = rf"config.json has no {min(change)} as plan_jax writes it; save or download"
    with pytest.raises(UserError, match=message):
        plan_jax.load(copy)


def test_arrays_that_fit_no_config_are_named(copy):
    tensors = load_file(copy / "model.safetensors")
    write_files(copy, model__safetensors=save(tensors | {"step": np.zeros(1)}))
    with pytest.raises(UserError, match="has an array 'step', which no model of plan_jax has"):
        plan_jax.load(copy)
    name = next(name for name in tensors if "image_tower" in name and name.endswith("kernel"))
    write_files(copy, model__safetensors=save(tensors | {name: np.zeros((1, 1, 1, 1), "f")}))
    with pytest.raises(UserError, match=r"copy has other weights than its config describes \(For"):
        plan_jax.load(copy)


def make_hub_tokenizer(folder):
    """Writes a cased BERT tokenizer as transformers does."""
    words = "the left lung is clear No effusion Effusion ##s heart normal pneumothorax on ."
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words.split(), "no", "effusion"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)))
    BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=False).save(
        str(folder / "tokenizer.json")
    )
    settings = {"tokenizer_class": "BertTokenizerFast", "do_lower_case": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("kind", ["vocabulary", "hub"])
def test_a_tokenizer_of_one_s_own_is_saved(kind, tmp_path):
    make_hub_tokenizer(tmp_path / "own")
    name = str(tmp_path / "own") if kind == "hub" else str(tmp_path / "own" / "vocab.txt")
    data = make_config().to_dict()["data"] | {"tokenizer": name}
    model = make_model(data=data)
    expected = tokenize_batch(load_tokenizer(name), TEXTS, 24, 20)
    shutil.rmtree(tmp_path / "own")
    folder = model.save_pretrained(tmp_path / "saved")
    loaded = plan_jax.load(folder)
    actual = tokenize_batch(load_tokenizer(str(folder)), TEXTS, 24, 20)
    for field in ("tokens", "word_index", "word_id", "sentence"):
        np.testing.assert_array_equal(getattr(actual, field), getattr(expected, field))
    assert_equal_answers(model, loaded)
    ids = AutoTokenizer.from_pretrained(folder)("Effusion on the left")["input_ids"]
    assert ids == [
        int(x)
        for x in tokenize_batch(
            load_tokenizer(str(folder)), ["Effusion on the left"], 24, 20
        ).tokens[0]
        if x
    ]
    for file in ("tokenizer_config.json", "config.json", "README.md"):
        assert str(tmp_path) not in (folder / file).read_text()


def test_a_tokenizer_that_cannot_be_read_is_refused(copy):
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json is not a tokenizer \(.*; save the model"):
        load_tokenizer(str(copy))


def test_a_config_with_guided_rounds_is_saved():
    hyper = plan.Hyper(guide_round_steps=1)
    config = Config(method="plan", fine_map=True, hyper=hyper)
    assert folders.remove_places(config)["hyper"]["guide_round_steps"] == 1
