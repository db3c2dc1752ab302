"""Saves a model as a folder or on the hub, and reads one: what `Model` and `load` call."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from plan_jax.checkpoint.checksums import fingerprint
from plan_jax.config import Config
from plan_jax.data.tokenizer import Tokenizer
from plan_jax.export import folder, hub
from plan_jax.types import UserError, check_local

STATEMENTS = ("data_name", "data_licence", "licence", "note")  # what only the user knows
# The data that plan_jax draws itself are the only ones of which it knows the licence.
PHANTOM = {
    "data_name": "phantoms: synthetic radiographs with reports, drawn by plan_jax; no patients",
    "data_licence": "Apache-2.0",
    "licence": "Apache-2.0",
}


@dataclass(frozen=True)
class Pretrained:
    """A trained model as it is saved.

    `variables` returns `params`, `batch_stats` and `memory`; it is called when the model is saved.
    `source` is the run that they come from. Of a saved model, `about` and `metrics` are what its
    folder held when it was read: the folder may be replaced meanwhile.
    """

    config: Config
    tokenizer: Tokenizer
    variables: Callable[[], Mapping[str, PyTree]]
    step: int = 0
    source: Path | None = None
    about: Mapping[str, str] | None = None
    metrics: Mapping[str, Mapping[str, Any]] | None = None

    def save(
        self,
        out: str | Path,
        *,
        dtype: str = "float32",
        data_name: str = "",
        data_licence: str = "",
        licence: str = "",
        note: str = "",
        title: str = "",
    ) -> Path:
        """Writes a model folder, which `plan_jax.load` reads, and returns its path.

        Args:
          out: the folder; a saved model that is there is replaced.
          dtype: float32, or float16 for a file of half the size.
          data_name: what the model was trained on, for its card.
          data_licence: licence of these data.
          licence: licence of the weights, as `apache-2.0`.
          note: one more sentence for the card, in Markdown.
          title: name of the model; "" is that of the folder.

        Raises:
          UserError: the folder holds anything else or cannot be written, or a parameter is too
            large for float16.
        """
        check_local("folder", out)
        folder.check_replaceable(Path(out).absolute())
        about = self._state(
            data_name=data_name, data_licence=data_licence, licence=licence, note=note
        )
        variables = jax.device_get(dict(self.variables()))
        metrics = self._find_metrics(fingerprint(variables["params"]))
        options: dict[str, Any] = {"dtype": dtype, "step": self.step, "about": about}
        options["metrics"] = metrics
        files, params_sha256 = folder.encode_model(
            self.config, variables, self.tokenizer, **options
        )
        from plan_jax.export import card  # it imports matplotlib, which loading does not need

        text = card.write_card(
            Config.from_dict(folder.remove_places(self.config)),
            title=title or Path(out).absolute().name,
            num_params=sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
            version=folder.installed_version(),
            params_sha256=params_sha256,
            **options,
        )
        return folder.write_folder(out, files | {folder.CARD: text.encode()}, params_sha256)

    def push(
        self,
        repo: str,
        *,
        private: bool = True,
        token: str | None = None,
        message: str = "Upload a model of plan_jax",
        saved: Path | None = None,
        **options: str,
    ) -> str:
        """Uploads the model to the Hugging Face Hub, and returns the address of its repository.

        Args:
          repo: `owner/name`; created if it does not exist.
          private: whether a new repository is private.
          token: of the user; None for that of `hf auth login` or HF_TOKEN.
          message: of the commit.
          saved: a folder that `save` wrote, to upload its model as it is; None saves one.
          **options: as for `save`.

        Raises:
          UserError: the hub refuses or cannot be reached; or everybody could have the model, and
            the data or their licence are not stated.
        """
        hub.check_repository(repo)
        names = ("data_name", "data_licence")
        if saved is not None:
            about = folder.read_settings(saved)["about"]
        else:
            about = self._state(**{name: options.get(name, "") for name in STATEMENTS})
        if not private and (missing := [name for name in names if not about.get(name)]):
            raise UserError(
                f"a public model needs a card that names its data and their licence; pass"
                f" {' and '.join(missing)}, or push with private=True"
            )
        with tempfile.TemporaryDirectory(prefix="plan_jax_") as parent:
            if saved is None:
                saved = self.save(Path(parent) / repo.rpartition("/")[2], **options)  # type: ignore[arg-type]
            return hub.push_folder(saved, repo, private=private, token=token, message=message)

    def _state(self, **stated: str) -> dict[str, str]:
        """Returns what is stated of data and licences: now, else when the source was saved."""
        previous: Mapping[str, str] = self.about or {}
        is_phantom = self.config.data.name == "phantom"
        if self.about is None and is_phantom and not any(vars(self.config.weights).values()):
            previous = PHANTOM
        return {name: value or previous.get(name, "") for name, value in stated.items()}

    def _find_metrics(self, params_sha256: str) -> Mapping[str, Mapping[str, Any]]:
        """Returns what was measured on these parameters, by the name of the evaluation.

        A run that has trained on, or again, has metrics of other parameters, which are left out.
        """
        if self.metrics is not None:
            return self.metrics
        if self.source is None:
            return {}
        paths = {self.config.eval.split: self.source / folder.METRICS}
        paths |= {
            path.parent.name: path for path in sorted(self.source.glob("eval/*/metrics.json"))
        }
        values = {name: folder.read_object(path) for name, path in paths.items()}
        return {
            name: x
            for name, x in values.items()
            if x.get("steps") == self.step
            and x.get("params_sha256", params_sha256) == params_sha256
        }
