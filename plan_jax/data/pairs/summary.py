"""The short summary of what was understood of a manifest; it contains no text of a report."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from plan_jax.data import quoting
from plan_jax.data.pairs.boxes import CORNERS
from plan_jax.data.pairs.studies import Study

MAX_LISTED = 12  # names in a line
MAX_SHARE = 0.3  # of the images that belong to one patient, before it is remarkable
MIN_IMAGES = 10  # below, any share is usual
_KINDS = {CORNERS: "x0, y0, x1, y1", "xywh": "x, y, width, height"}


@dataclasses.dataclass
class Summary:
    """The account of a manifest.

    Attributes:
      manifest: name of the file.
      columns: role -> column.
      label_columns: columns of one label each.
      box_columns: columns of coordinates.
      unused: columns without a role.
      num_missing: role -> number of rows without a value.
      separator: what divides labels, if it is nothing usual.
      num_merged: rows that were merged into another row of the same image.
      num_zero_boxes: boxes of zeros, which are none.
      box_formats: formats of the boxes.
      notes: what else the user should know.
      lines: the summary, after `describe`.
    """

    manifest: str
    columns: Mapping[str, str]
    label_columns: Sequence[str]
    box_columns: Sequence[str]
    unused: Sequence[str]
    num_missing: Mapping[str, int]
    separator: str
    num_merged: int = 0
    num_zero_boxes: int = 0
    box_formats: Sequence[str] = ()
    notes: list[str] = dataclasses.field(default_factory=list)
    lines: list[str] = dataclasses.field(default_factory=list)

    def describe(self, studies: Sequence[Study], findings: Sequence[str]) -> list[str]:
        """Returns the summary in a few lines, and stores it in `lines`."""
        self.lines = [
            self._describe_rows(studies),
            self._describe_columns(),
            *self._describe_findings(studies, findings),
            *self._describe_boxes(studies),
            *(f"note: {note}" for note in [*self._remark_patients(studies), *self.notes]),
        ]
        return self.lines

    def _describe_rows(self, studies: Sequence[Study]) -> str:
        num_patients = len({study.patient_id for study in studies})
        num_images = len({study.path for study in studies})
        rows = quoting.count(self.num_merged, "row")
        merge_note = f" ({rows} merged into others)" if self.num_merged else ""
        return (
            f"{self.manifest}: {quoting.count(len(studies), 'study', 'studies')}{merge_note}, "
            f"{quoting.count(num_images, 'image')}, {quoting.count(num_patients, 'patient')}; "
            f"splits by {self._describe_source()}"
        )

    def _describe_source(self) -> str:
        if "split" in self.columns:
            return f"column {quoting.quote(self.columns['split'])}"
        return "a hash of the patient"

    def _describe_columns(self) -> str:
        items = []
        for role, name in self.columns.items():
            num_missing = self.num_missing.get(role, 0)
            source = "" if name == role else f" {quoting.quote(name)}"
            if role == "labels" and self.separator:
                source += f" divided by {self.separator!r}"
            items.append(f"{role}{source}" + (f" ({num_missing} missing)" if num_missing else ""))
        if self.label_columns:
            items.append(f"one label each: {_list_names(self.label_columns)}")
        if self.box_columns:
            items.append(f"coordinates: {_list_names(self.box_columns)}")
        unused = f"; not used: {_list_names(self.unused)}" if self.unused else ""
        return f"columns: {', '.join(items)}{unused}"

    def _describe_findings(self, studies: Sequence[Study], findings: Sequence[str]) -> list[str]:
        if not findings:
            return []
        items = []
        label_names = {name for study in studies for name in study.labels.values}
        for name in findings[:MAX_LISTED]:
            counts = Counter(
                study.labels.values.get(name, study.labels.default if name in label_names else -1)
                for study in studies
            )
            counts_text = "/".join(str(counts[value]) for value in (1, 0, -1))
            shown_name = quoting.quote_name(name, counts[1] + counts[0])
            items.append(f"{shown_name} {counts_text}")
        num_hidden = len(findings) - MAX_LISTED
        more = f" and {num_hidden} more" if num_hidden > 0 else ""
        return [f"findings (1/0/unknown): {', '.join(items)}{more}"]

    def _describe_boxes(self, studies: Sequence[Study]) -> list[str]:
        counts = [len(study.boxes) for study in studies if study.boxes]
        if not counts and not self.num_zero_boxes:
            return []
        kinds = " and ".join(_KINDS.get(name, name) for name in self.box_formats)
        zeros = f"; {self.num_zero_boxes} of zeros are no box" if self.num_zero_boxes else ""
        images = quoting.count(len(counts), "image")
        return [f"boxes: {sum(counts)} in {images}, as {kinds or 'none'}{zeros}"]

    def _remark_patients(self, studies: Sequence[Study]) -> list[str]:
        """Returns what is remarkable about the patients."""
        num_missing = self.num_missing.get("patient_id", 0)
        if "patient_id" not in self.columns:
            return ["no column of patients, so each image is a patient of its own"]
        rows = quoting.count(num_missing, "row")
        verb = "is one of its own" if num_missing == 1 else "are one each"
        notes = [f"{rows} without a patient {verb}"] if num_missing else []
        counts: dict[str, int] = {}
        for study in studies:
            counts[study.patient_id] = counts.get(study.patient_id, 0) + 1
        name, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
        if count > MAX_SHARE * len(studies) and len(studies) >= MIN_IMAGES and len(counts) > 1:
            notes.append(f"patient {quoting.quote(name)} has {count} of the images")
        return notes


def _list_names(names: Sequence[str]) -> str:
    items = [quoting.quote(name).strip("'") for name in names[:MAX_LISTED]]
    num_hidden = len(names) - len(items)
    return ", ".join(items) + (f" and {num_hidden} more" if num_hidden > 0 else "")
