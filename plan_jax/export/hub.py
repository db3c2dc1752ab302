"""The Hugging Face Hub: fetching a model folder, and uploading one.

What the hub says becomes one sentence. Nothing but the files of a model folder is fetched.
"""

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path

from plan_jax.export import folder as folders
from plan_jax.types import UserError

# `owner/name`, perhaps with a branch, tag or commit after `@`.
HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w.-]*(/\w[\w.-]*)*))?")
# Small files by which a repository of another library is told, before its weights are fetched.
MARKERS = (
    *(folders.CONFIG, folders.CHECKSUMS, "open_clip_config.json", "adapter_config.json"),
    *("modules.json", "model_index.json"),
)
# What a model may have besides; of a model that is replaced, nothing is left.
EXTRAS = ("programs/*", "image_tower/*")
FILES = (*folders.REQUIRED, folders.CHECKSUMS, folders.METRICS, folders.CARD)
LOGIN = "log in with `hf auth login`"


def fetch_model(source: str) -> Path:
    """Returns the cached folder of a model on the hub, fetched if need be.

    Args:
      source: `owner/name` or `owner/name@revision`.

    Raises:
      UserError: there is none, it is of another library, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download  # 0.3 s to import, and needed here only

    match = HUB_ID.fullmatch(source)
    if match is None:
        raise UserError(f"model {source!r} is not a name on the hub; use owner/name")
    repo, revision = match["repo"], match["revision"]
    with report_hub_errors(source):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(MARKERS)))
    if not folders.is_model_folder(folder):
        raise UserError(describe_foreign(folder, f"model {source} on the hub"))
    with report_hub_errors(source):
        # By its commit: the branch may move between the two requests.
        return Path(snapshot_download(repo, revision=folder.name, allow_patterns=list(FILES)))


def push_folder(folder: Path, repo: str, *, private: bool, token: str | None, message: str) -> str:
    """Uploads a model folder as one commit; returns the address of the repository.

    The repository is created if there is none. Only files that `checksums.json` lists are uploaded.

    Args:
      folder: the model folder.
      repo: `owner/name`.
      private: whether a new repository is private.
      token: of the user; None for that of `hf auth login` or HF_TOKEN.
      message: of the commit.

    Raises:
      UserError: the folder holds no complete model; the hub refuses or cannot be reached; or the
        repository is public, and a private one is asked for.
    """
    from huggingface_hub import HfApi

    check_repository(repo)
    names = folders.list_files(folder)
    with report_hub_errors(repo, is_push=True):
        api = HfApi(token=token)
        url = api.create_repo(repo, private=private, exist_ok=True)
        # An existing repository keeps its visibility.
        if private and not api.repo_info(repo).private:
            raise UserError(
                f"repository {repo} is public and the model would be too; push with private=False"
                " if everybody may have it, or to another repository"
            )
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=message,
            allow_patterns=names,
            delete_patterns=list(EXTRAS),
        )
    return str(url)


def check_repository(repo: str) -> None:
    """Raises UserError unless a name is that of a repository on the hub."""
    match = HUB_ID.fullmatch(repo)
    if match is None or match["revision"]:
        raise UserError(f"repository {repo!r} is not a name on the hub; use owner/name")


def describe_foreign(folder: Path, name: str) -> str:
    """Returns a sentence on what a folder without a model of plan_jax seems to hold."""
    kind = recognise_library(folder)
    if not kind:
        return f"{name} is not a model of plan_jax; use a folder that save_pretrained wrote"
    return (
        f"{name} looks like {kind}, not like a model of plan_jax; to start training from its"
        " weights, set config.weights"
    )


def recognise_library(folder: Path) -> str:
    """Returns what kind of another library's model a folder seems to hold, "" if none is known."""
    config = folders.read_object(folder / folders.CONFIG)
    # Of a repository without any of the markers not even a folder is fetched.
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "open_clip_config.json" in names:
        return "a model of open_clip"
    if "adapter_config.json" in names:
        return "an adapter of peft"
    if "modules.json" in names:
        return "a model of sentence-transformers"
    if "model_index.json" in names:
        return "a pipeline of diffusers"
    if "pretrained_cfg" in config or "architecture" in config:
        return f"a model of timm ({config.get('architecture', 'unnamed')})"
    if "architectures" in config or "model_type" in config:
        architectures = config.get("architectures") or [config.get("model_type")]
        return f"a model of transformers ({architectures[0]})"
    if "saved_model.pb" in names:
        return "a SavedModel of TensorFlow"
    for suffix, kind in SUFFIXES.items():
        if matches := sorted(x for x in names if x.endswith(suffix)):
            return f"{kind} ({matches[0]})"
    return ""


SUFFIXES = {
    ".safetensors": "a safetensors file of another library",
    ".msgpack": "a checkpoint of flax",
    **dict.fromkeys((".pth", ".pt", ".ckpt", ".bin", ".tar"), "a checkpoint of torch"),
    ".h5": "a model of Keras",
    ".keras": "a model of Keras",
    ".onnx": "a model in ONNX",
}


@contextlib.contextmanager
def report_hub_errors(name: str, *, is_push: bool = False) -> Iterator[None]:
    """Turns what the hub or the network says about a repository into a sentence without the token.

    Args:
      name: name of the repository.
      is_push: whether a model is uploaded, so that neither a folder nor the cache is of any help.

    Raises:
      UserError: in place of the many kinds of errors of huggingface_hub.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the hub raises many kinds
        raise UserError(_describe_error(error, name, is_push)) from None


def _describe_error(error: Exception, name: str, is_push: bool) -> str:
    from huggingface_hub import constants, errors

    reason = (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(". ")
    # A token with a line break or an accent cannot be sent, and the message may repeat it.
    if isinstance(error, UnicodeEncodeError) or "Bearer" in reason:
        return f"the token for {name} has characters that no token has; copy it again, or {LOGIN}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"model {name} cannot be written to the cache of the hub ({error.strerror}); free disk"
            " space, or choose HF_HOME elsewhere"
        )
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"model {name} asks for access first; request it on its page on the hub, and {LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"model {name} has no such revision; use a branch, tag or commit that exists"
    if isinstance(error, errors.HFValidationError):
        return f"{name!r} is not a name on the hub; use owner/name"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"model {name} needs a token of the hub; {LOGIN}, or set HF_TOKEN"
    if status == 401:
        return (
            f"model {name} does not exist on the hub, or is private and the token is missing or"
            f" wrong; check the name, or {LOGIN}"
        )
    if status == 403:
        return f"the hub does not let this token read or write {name}; use a token that may"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return f"model {name} does not exist on the hub; check the name"
    problem, remedy = (
        (f"model {name} was not pushed, since", "")
        if is_push
        else (
            f"model {name} is neither a folder here nor in the cache of the hub, and",
            ", or pass a folder",
        )
    )
    if constants.HF_HUB_OFFLINE:
        action = "push" if is_push else "fetch"
        return f"{problem} HF_HUB_OFFLINE is set; unset it to {action} the model{remedy}"
    if status is not None:
        return f"the hub answered {status} about {name}; repeat the command later"
    if isinstance(error, OSError) and error.errno is not None and error.filename:
        return f"{error.filename} cannot be written ({error.strerror}); choose HF_HOME elsewhere"
    is_connection = "onnect" in f"{type(error).__name__} {reason}"
    if isinstance(error, errors.LocalEntryNotFoundError | OSError) or is_connection:
        return f"{problem} the hub cannot be reached; connect to the internet{remedy}"
    return f"the hub failed on {name} ({reason}); repeat the command later"
