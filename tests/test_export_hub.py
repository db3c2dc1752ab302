"""The hub: what is pushed is what is loaded, and each refusal is one sentence."""

import json

import local_hub
import pytest
from huggingface_hub import constants
from saved_models import assert_equal_answers, make_model

import plan_jax
from plan_jax.export import folder as folders
from plan_jax.export import hub, sources
from plan_jax.types import UserError

STATED = {"data_name": "films of a test", "data_licence": "CC0-1.0", "licence": "cc0-1.0"}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Returns a running hub, which huggingface_hub asks, with an empty cache here."""
    with local_hub.run_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.split("/", 3)[3]
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.url}/{template}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_a_pushed_model_is_loaded_from_the_hub_and_then_from_the_cache(
    model, server, monkeypatch, tmp_path
):
    address = model.push_to_hub("owner/tiny", token=local_hub.TOKEN, dtype="float32", **STATED)
    assert address == f"{server.url}/owner/tiny"
    assert server.private["owner/tiny"] and len(server.commits["owner/tiny"]) == 1
    monkeypatch.setenv("HF_TOKEN", local_hub.READER)
    loaded = plan_jax.load("owner/tiny")
    assert_equal_answers(model, loaded)
    commit, files = server.commits["owner/tiny"][0]
    assert "films of a test" in files["README.md"].decode()
    server.add_commit("owner/tiny", {"config.json": b"{}", "notes.txt": b"x"})
    assert_equal_answers(model, plan_jax.load(f"owner/tiny@{commit}"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(server.requests)
    assert_equal_answers(model, plan_jax.load(f"owner/tiny@{commit}"))
    assert len(server.requests) == asked
    assert not list((tmp_path / "cache").rglob("notes.txt"))


def test_a_saved_folder_is_pushed_with_all_its_files(model, server, tmp_path):
    saved = model.save_pretrained(tmp_path / "saved")
    folders.add_files(saved, {"programs/heatmap.jaxexport": b"abc"})
    (saved / "reports.csv").write_text("of patients")
    model.push_to_hub("owner/tiny", token=local_hub.TOKEN, saved=saved)
    _, files = server.commits["owner/tiny"][0]
    assert files["programs/heatmap.jaxexport"] == b"abc" and "model.safetensors" in files
    assert "reports.csv" not in files
    # Programs of the old weights do not stay beside the new ones.
    model.push_to_hub("owner/tiny", token=local_hub.TOKEN)
    _, files = server.commits["owner/tiny"][1]
    assert "programs/heatmap.jaxexport" not in files and "model.safetensors" in files


def test_a_folder_that_is_no_model_is_not_pushed(model, server, tmp_path):
    (tmp_path / "films").mkdir()
    (tmp_path / "films/1.png").write_bytes(b"")
    with pytest.raises(UserError, match="model .*films has no checksums.json; save or download"):
        model.push_to_hub("owner/tiny", token=local_hub.TOKEN, saved=tmp_path / "films")
    assert not server.commits


def test_a_public_folder_states_its_data_itself(server, tmp_path):
    data = make_model().config.to_dict()["data"] | {"name": "pairs", "builder": {}}
    unstated = make_model(data=data)
    saved = unstated.save_pretrained(tmp_path / "saved")
    options = {"token": local_hub.TOKEN, "private": False, "saved": saved}
    with pytest.raises(UserError, match="pass data_name and data_licence, or push with private"):
        unstated.push_to_hub("owner/tiny", **options, **STATED)
    assert not server.commits


@pytest.mark.parametrize("token", ["hf_secret\n", "hf_secr\u00e9t"])
def test_a_token_is_never_repeated(token, model, server):
    with pytest.raises(UserError, match="token for owner/tiny has characters that no token") as e:
        model.push_to_hub("owner/tiny", token=token)
    assert "secr" not in str(e.value)


def test_a_full_disk_is_not_taken_for_a_missing_network():
    message = r"cache of the hub \(No space left on device\); free disk space"
    with pytest.raises(UserError, match=message), hub.report_hub_errors("owner/tiny"):
        raise OSError(28, "No space left on device")


def test_a_second_push_replaces_the_model(model, server, monkeypatch):
    model.push_to_hub("owner/tiny", token=local_hub.TOKEN)
    other = make_model(seed=1)
    other.push_to_hub("owner/tiny", token=local_hub.TOKEN, message="Train longer")
    assert len(server.commits["owner/tiny"]) == 2
    monkeypatch.setenv("HF_TOKEN", local_hub.READER)
    assert_equal_answers(other, plan_jax.load("owner/tiny"))


def test_a_public_model_needs_a_stated_licence_and_a_private_one_a_private_repository(
    model, server
):
    server.commits["owner/open"] = []
    with pytest.raises(UserError, match="repository owner/open is public and the model would be"):
        model.push_to_hub("owner/open", token=local_hub.TOKEN)
    assert server.commits["owner/open"] == []
    unstated = make_model(data=model.config.to_dict()["data"] | {"name": "pairs", "builder": {}})
    with pytest.raises(UserError, match="pass data_name and data_licence, or push with private"):
        unstated.push_to_hub("owner/open", token=local_hub.TOKEN, private=False)
    unstated.push_to_hub("owner/open", token=local_hub.TOKEN, private=False, **STATED)
    assert not server.private.get("owner/open")
    assert_equal_answers(unstated, plan_jax.load("owner/open"))


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "owner/tiny does not exist on the hub, or is private and the token is missing"),
        ("hf_wrong", "owner/tiny does not exist on the hub, or is private and the token is"),
        (local_hub.READER, "the hub does not let this token read or write owner/tiny; use a"),
    ],
)
def test_a_token_that_may_not_write(token, message, model, server):
    with pytest.raises(UserError, match=message):
        model.push_to_hub("owner/tiny", token=token)
    assert not server.commits


def test_models_that_cannot_be_fetched(server, monkeypatch):
    server.add_commit("owner/gated", {"config.json": b"{}"})
    server.gated.add("owner/gated")
    server.add_commit("owner/empty", {"notes.txt": b""})
    monkeypatch.setenv("HF_TOKEN", local_hub.READER)
    cases = {
        "owner/none": "model owner/none does not exist on the hub; check the name",
        "owner/gated": "model owner/gated asks for access first; request it on its page",
        "owner/empty@v9": "model owner/empty@v9 has no such revision; use a branch, tag or commit",
        "owner/empty": "model owner/empty on the hub is not a model of plan_jax; use a folder",
    }
    for name, message in cases.items():
        with pytest.raises(UserError) as error:
            plan_jax.load(name)
        assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"config.json": {"architectures": ["CLIPModel"]}}, "a model of transformers (CLIPModel)"),
        ({"config.json": {"architecture": "resnet50"}}, "a model of timm (resnet50)"),
        ({"open_clip_config.json": {}}, "a model of open_clip"),
    ],
)
def test_a_model_of_another_library_is_named_before_its_weights_are_fetched(files, kind, server):
    contents = {name: json.dumps(content).encode() for name, content in files.items()}
    server.add_commit("owner/other", contents | {"model.safetensors": b"0" * 1000})
    with pytest.raises(UserError) as error:
        plan_jax.load("owner/other")
    assert f"model owner/other on the hub looks like {kind}, not like a model" in str(error.value)
    assert not any("safetensors" in path for _, path in server.requests)


def test_a_hub_that_cannot_be_reached(model, server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError) as error:
        model.push_to_hub("owner/tiny", token=local_hub.TOKEN)
    reason = "the hub cannot be reached; connect to the internet"
    assert str(error.value) == f"model owner/tiny was not pushed, since {reason}"
    with pytest.raises(UserError, match="and the hub cannot be reached; connect to the internet"):
        plan_jax.load("owner/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set; unset it to fetch the model"):
        plan_jax.load("owner/tiny")


@pytest.mark.parametrize("name", ["owner/../x", "owner/name/x", "../name", "owner/na me", "a@b"])
def test_a_name_that_no_repository_has(name):
    with pytest.raises(UserError, match="is not a name on the hub; use owner/name"):
        hub.fetch_model(name)
    with pytest.raises(UserError, match="is not a name on the hub; use owner/name"):
        hub.check_repository(name)


def test_a_mistyped_folder_of_a_run_is_not_looked_up(server, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="checkpoint runs/dmo does not exist; pass the folder of"):
        sources.find_model("runs/dmo")
    assert not server.requests
