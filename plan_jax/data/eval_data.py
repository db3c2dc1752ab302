"""Evaluation data from a dataset on disk, of which only the accessed records are read."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from plan_jax.data import phantom, prompts, report_parser
from plan_jax.data.dataset import Dataset, list_splits, open_dataset
from plan_jax.data.records import DatasetRecords, open_records
from plan_jax.types import EvalData, Record, UserError, read_column, select_records

VALIDATION_SHARE = 0.2  # of the training patients, where no split validates


class DatasetEvalData(EvalData):
    """The splits of a dataset as evaluation data, each opened once and on first access.

    A record is decoded whenever it is accessed, and not kept, so memory does not depend on their
    number; see `DatasetRecords`. Only the properties that a task accesses cost time: a task that
    fits no head never opens `train`.
    """

    def __init__(
        self,
        name: str,
        split: str,
        *,
        size: int,
        data_dir: str | None = None,
        builder: Mapping[str, Any] | None = None,
        cache: bool = False,
        fingerprint: str = "",
        caption: str = "",
        limit: int | None = None,
        max_fit_records: int = 0,
        num_prior_records: int = 0,
        prompt_set: str = "",
        seed: int = 0,
    ) -> None:
        """Notes where the data are; nothing is read yet.

        Args:
          name: the dataset, `phantom` or `pairs`.
          split: the evaluated split, as `test` or `val[:50%]`.
          size: side of the square that images and annotations are fitted to, in pixels.
          data_dir: folder of the prepared datasets.
          builder: settings of the dataset's builder.
          cache: keep decoded training rows in memory.
          fingerprint: digest that manifest and files must have; "" accepts any.
          caption: rule of `sections.captions`; "" for the stored text.
          limit: number of records that are evaluated, and of those in `validation`; None: all.
          max_fit_records: number of training records that heads are fitted to; 0: all.
          num_prior_records: number of training records for mean masks; 0: none.
          prompt_set: a name of `prompts.PROMPT_SETS`, or empty for the dataset's own prompts.
          seed: selects the patients that validate where no split does.
        """
        self.name = name
        self.split = split
        self.size = size
        self.limit = limit
        self.max_fit_records = max_fit_records
        self.num_prior_records = num_prior_records
        self.prompt_set = prompt_set
        self.seed = seed
        self._location = {"data_dir": data_dir, **(builder or {})}
        self._cache = cache
        self._fingerprint = fingerprint
        self.caption = caption

    def open(self, split: str) -> Dataset:
        """Returns a split of the dataset, which is prepared first if it is not on disk yet."""
        return open_dataset(
            self.name,
            split,
            cache=self._cache,
            fingerprint=self._fingerprint,
            caption=self.caption,
            **self._location,
        )

    def _records(self, split: str, limit: int | None) -> DatasetRecords:
        return open_records(self.open(split), limit, self.size)

    @cached_property
    def dataset(self) -> Dataset:
        """The evaluated split."""
        return self.open(self.split)

    @cached_property
    def findings(self) -> tuple[str, ...]:
        """Names of the labels, and of the indices in phrases."""
        return self.dataset.findings

    @cached_property
    def test(self) -> Sequence[Record]:
        """The evaluated records: the first `limit` of the split."""
        return open_records(self.dataset, self.limit, self.size)

    @property
    def train(self) -> Sequence[Record]:
        """The records that heads are fitted to."""
        return self._fit_and_select[0]

    @property
    def val(self) -> Sequence[Record]:
        """The records that heads are selected on."""
        return self._fit_and_select[1]

    @cached_property
    def validation(self) -> Sequence[Record] | None:
        """The first `limit` records of the split `val`; None if there is none or it is evaluated.

        Thresholds that were chosen on the evaluated records would flatter a model.
        """
        is_evaluated = self.split.partition("[")[0] == "val"
        if is_evaluated or "val" not in list_splits(self.name, **self._location):
            return None
        return self._records("val", self.limit)

    @cached_property
    def _fit_and_select(self) -> tuple[Sequence[Record], Sequence[Record]]:
        if self.split.partition("[")[0] == "train":
            raise UserError(
                f"config.eval.split is {self.split}, and heads are fitted to train; use val or test"
            )
        # Patients are divided after the limit, so that the limit bounds what is read.
        train = self._records("train", self.max_fit_records or None)
        if self.validation is not None:
            return train, self.validation
        return split_by_patient(train, self.seed)

    @cached_property
    def prior_records(self) -> Sequence[Record]:
        """The first `num_prior_records` training records."""
        if not self.num_prior_records:
            return []
        return self._records("train", self.num_prior_records)

    @cached_property
    def prompts(self) -> Mapping[str, tuple[Sequence[str], Sequence[str]]]:
        """The prompts of `prompt_set`; without it the phantoms' own, or one plain pair."""
        if self.prompt_set:
            return prompts.PROMPT_SETS[self.prompt_set]()
        if self.name == "phantom":
            return phantom.PROMPTS
        return prompts.build_plain(self.findings)


def split_by_patient(
    records: Sequence[Record], seed: int, share: float = VALIDATION_SHARE
) -> tuple[Sequence[Record], Sequence[Record]]:
    """Returns the records to fit to and those of a random `share` of the patients to select on.

    All records of a patient are on one side, so that no head is selected on a patient it saw.

    Raises:
      UserError: if there are too few patients for two sides.
    """
    # Sorted, since the order of a set differs between processes.
    patients = read_column(records, "patient_id")
    names = sorted(set(patients))
    order = np.random.default_rng(seed).permutation(names)
    selected = set(order[: max(1, round(share * len(names)))].tolist())
    fit = [i for i, patient in enumerate(patients) if patient not in selected]
    select = [i for i, patient in enumerate(patients) if patient in selected]
    if not fit or not select:
        raise UserError(
            f"{len(names)} patients are too few to fit and to validate; add a split val"
        )
    return select_records(records, fit), select_records(records, select)


def report_labeller(findings: Sequence[str]) -> Callable[[str], Mapping[str, int]]:
    """Returns a function from a report to the findings that it states (1) or denies (0).

    Reports are read by `report_parser`. Findings that it has no name for are omitted; for data
    without findings it labels all findings that it knows.
    """
    names = (
        tuple(name for name in findings if report_parser.is_known_finding(name))
        or report_parser.FINDINGS
    )
    return lambda text: dict(
        zip(names, report_parser.label_findings(text, names).tolist(), strict=True)
    )
