"""The configuration that the builders of all public datasets share."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, ClassVar

from plan_jax.data.public.facts import Facts
from plan_jax.data.tfds import tfds
from plan_jax.types import UserError

VIEW_CHOICES = ("frontal", "all")
# Fields that say where data are and how fast they are prepared, not what the records are.
PLACES = ("source", "workers")


@dataclasses.dataclass(eq=False)  # compared by identity, like the class of TFDS
class PublicConfig(tfds.core.BuilderConfig):
    """Where a public dataset was downloaded to, and what becomes of it.

    A builder adds fields of its own, as the folder of reports that are downloaded apart. Such a
    field that names a place is listed in `places`.
    """

    facts: ClassVar[Facts]
    places: ClassVar[tuple[str, ...]] = ()

    # Folder of the dataset as downloaded.
    source: str = ""
    # Longer side of a stored image, in pixels.
    size: int = 256
    # Rule of the splits ("": the default of the dataset); docs/data.md lists them.
    split: str = ""
    # `frontal` leaves out lateral films where the dataset tells them apart; `all` keeps them.
    views: str = "frontal"
    # Fraction of patients in val, where a hash of the patient decides.
    val_fraction: float = 0.1
    # Fraction of patients in test, where a hash of the patient decides.
    test_fraction: float = 0.1
    # Largest fraction of images that cannot be used; more than that is an error.
    max_bad: float = 0.1
    # Processes that read images (0: one for each core).
    workers: int = 0

    def __post_init__(self) -> None:
        """Raises UserError if a value is out of range."""
        name = self.facts.name
        if self.size < 8:
            raise UserError(f"size {self.size} of dataset {name} is too small; use 8 or more")
        if self.split and self.split not in self.facts.split_rules:
            raise UserError(
                f"split rule {self.split!r} of dataset {name} is unknown; use one of "
                f"{', '.join(self.facts.split_rules)}"
            )
        if self.views not in VIEW_CHOICES:
            raise UserError(
                f"views {self.views!r} of dataset {name} is unknown; use one of "
                f"{', '.join(VIEW_CHOICES)}"
            )
        for field in ("val_fraction", "test_fraction", "max_bad"):
            if not 0 <= getattr(self, field) <= 1:
                raise UserError(f"{field} {getattr(self, field)} is not a fraction; use 0 to 1")
        if self.val_fraction + self.test_fraction > 1:
            raise UserError(
                f"val_fraction {self.val_fraction} and test_fraction {self.test_fraction} are more "
                "than all patients; lower one of them"
            )
        if self.workers < 0:
            raise UserError(f"workers {self.workers} is negative; use 0 for one for each core")

    @property
    def root(self) -> Path:
        """Returns the absolute path of the source folder."""
        return Path(os.path.abspath(os.path.expanduser(self.source or ".")))

    def is_present(self) -> bool:
        """Returns whether the source folder is there; prepared records do not need it.

        An empty folder is one whose drive is not mounted.
        """
        if not self.source:
            return False
        try:
            with os.scandir(self.root) as entries:
                return any(entries)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # reading its files says what is wrong
            return True

    @property
    def image_root(self) -> Path:
        """Returns the absolute path of the folder that the paths of images start from."""
        return self.root

    @property
    def split_rule(self) -> str:
        """Returns the name of the rule that divides the patients."""
        return self.split or self.facts.default_split

    def identity(self) -> dict[str, Any]:
        """Returns all that the records depend on, beside the content of the source folder."""
        inherited = {field.name for field in dataclasses.fields(tfds.core.BuilderConfig)}
        left_out = {*inherited, *PLACES, *self.places}
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in left_out
        }
        # Records made with a second folder differ from those made without, wherever it is.
        given = {f"has_{name}": bool(getattr(self, name)) for name in self.places}
        return values | given | {"split": self.split_rule}

    def digest(self) -> str:
        """Returns a hash of the options, whatever the source folder holds."""
        text = json.dumps(self.identity(), sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
