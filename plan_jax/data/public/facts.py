"""Facts about a public dataset: for messages, for its summary, and for docs/data.md."""

from collections.abc import Mapping
from dataclasses import dataclass, field

BY_HASH = (
    "hash"  # a split rule of every dataset: by a hash of the patient, whatever lists there are
)
PHYSIONET_LICENCE = (
    "PhysioNet Credentialed Health Data License 1.5.0; an account with CITI training is needed"
)


@dataclass(frozen=True)
class Facts:
    """Facts about a public dataset.

    Attributes:
      name: the dataset's name in `config.data.name`.
      title: its name in the literature.
      content: what it holds, in a few words: films, patients, annotations.
      page: address of the page that it is downloaded from.
      licence: its licence, and how access is obtained.
      citation: the paper: first author, journal or conference, year.
      files: the files that the source folder has to hold, in words.
      provides: what its records have: some of `reports`, `labels`, `boxes`, `masks`, `regions`,
        `anatomy`.
      patients: what a patient's id is. If images are not told apart by patient, the sentence says
        so, and `is_split_by_image` is True.
      splits: name of a rule -> what it does; the first is the default.
      leaks: name of a rule -> how many images of its test split share a patient with training.
      defects: known faults of the published files, each in a few words.
      counts: what the publication counts, as {"images": 112120, "patients": 30805}.
      findings: names of the labels, in order.
    """

    name: str
    title: str
    content: str
    page: str
    licence: str
    citation: str
    files: str
    provides: tuple[str, ...]
    patients: str
    splits: Mapping[str, str]
    is_split_by_image: bool = False
    leaks: Mapping[str, str] = field(default_factory=dict)
    defects: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    findings: tuple[str, ...] = ()

    @property
    def default_split(self) -> str:
        """Returns the name of the rule that applies unless another is named."""
        return next(iter(self.splits))

    @property
    def split_rules(self) -> tuple[str, ...]:
        """Returns the names of all rules."""
        return tuple(dict.fromkeys([*self.splits, BY_HASH]))
