"""Datasets on disk: random access to the records of a split."""

import contextlib
import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from plan_jax.data import schema
from plan_jax.data.faults import name_damage
from plan_jax.data.preparation import BUILDERS, METADATA_FILE, explain_difference, prepare_dataset
from plan_jax.data.public.config import PublicConfig
from plan_jax.data.sections.captions import CAPTIONS, choose_text, name_text_list
from plan_jax.data.tfds import tfds
from plan_jax.logger import write_atomically
from plan_jax.types import Record, UserError


class Dataset(Sequence):
    """Random access to the studies of one split.

    `dataset[i]` decodes a whole `Record`. `read_pair(i)` decodes only what training reads. The text
    of both is made from the sections of the report by `caption`, a rule of `sections.captions`; it
    is "" where the report has no caption under the rule.
    """

    def __init__(
        self,
        source: Sequence[bytes],
        findings: Sequence[str] = (),
        anatomy_names: Sequence[str] = (),
        region_names: Sequence[str] = (),
        *,
        name: str = "",
        folder: Path | None = None,
        fingerprint: str = "",
        cache: bool = False,
        split: str = "",
        caption: str = "",
        may_lack_text: bool = False,
    ):
        """Initialises a dataset.

        Args:
          source: serialised examples, or a list of `schema.serialize(record)`.
          findings: names of the labels.
          anatomy_names: names of the anatomy masks.
          region_names: names of the boxes of regions.
          name: name of the dataset in messages.
          folder: where the records are stored, for messages.
          fingerprint: digest of what the records were made from, see `open_dataset`.
          cache: keep decoded pairs in memory for the life of the process.
          split: name of the split, or of a part of it.
          caption: a name of `CAPTIONS`, or "" for the stored text.
          may_lack_text: whether there can be records without a text.
        """
        self.source = source
        self.findings = tuple(findings)
        self.anatomy_names = tuple(anatomy_names)
        self.region_names = tuple(region_names)
        self.name = name
        self.folder = folder
        self.fingerprint = fingerprint
        self.split = split
        self.caption = caption
        self.may_lack_text = may_lack_text
        self._cache: dict[int, schema.Pair] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]  # no slices
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self._read_record(index)

    def _read_record(self, index: int, with_image: bool = True) -> Record:
        with name_damage(self.folder):
            data = self.source[index]
            record = schema.deserialize(data, self.anatomy_names, with_image=with_image)
        text = choose_text(self.caption, record.text, record.sections)
        return record if text == record.text else dataclasses.replace(record, text=text)

    def read_pair(self, index: int, rng: np.random.Generator | None = None) -> schema.Pair:
        """Returns image, text, labels, regions and sections of a study; decodes nothing else.

        Args:
          index: number of the study.
          rng: generator of caption rules that draw a sentence (None: all of them, in order).
        """
        pair = self._read_stored_pair(index)
        text = choose_text(self.caption, pair.text, pair.sections, rng)
        return pair if text == pair.text else pair._replace(text=text)

    def _read_stored_pair(self, index: int) -> schema.Pair:
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        with name_damage(self.folder):
            pair = schema.deserialize_pair(self.source[index])
        if self._cache is not None:
            # A change in place would be part of every later epoch.
            pair.image.setflags(write=False)
            self._cache[index] = pair
        return pair

    def read_text(self, index: int) -> str:
        """Returns the text of a study, of which nothing is drawn; decodes nothing else."""
        with name_damage(self.folder):
            return choose_text(self.caption, *schema.deserialize_report(self.source[index]))

    def read_field(self, index: int, name: str) -> Any:
        """Returns a text or the labels Int8[F] of a study by name; decodes nothing else."""
        if name == "text":
            return self.read_text(index)
        with name_damage(self.folder):
            return schema.deserialize_field(self.source[index], name)

    def read_image(self, index: int) -> UInt8[np.ndarray, "Y X 1"]:
        """Returns the image [Y X 1] of a study; decodes nothing else."""
        with name_damage(self.folder):
            return schema.deserialize_image(self.source[index])

    def read_annotations(self, index: int) -> Record:
        """Returns a study with a black image of the right shape, and decodes no image."""
        return self._read_record(index, with_image=False)

    def read_bytes(self, index: int) -> bytes:
        """Returns a study as it is stored."""
        with name_damage(self.folder):
            return self.source[index]

    def select_texts(self) -> "Dataset":
        """Returns the dataset without the records that have no text under its caption rule.

        Which those are is written when public data are prepared. For a part of a split, and for
        rules that are newer than the records, it is read from all records.

        Raises:
          UserError: none has a text.
        """
        if not self.may_lack_text:
            return self
        indices = self._find_texts()
        if not len(indices):
            rule = f" under caption rule {self.caption}" if self.caption else ""
            raise UserError(
                f"none of the {len(self)} records of split {self.split} of dataset {self.name} has "
                f"a text{rule}; choose another config.data.caption, or a dataset with reports"
            )
        if len(indices) == len(self):
            return self
        selection = copy.copy(self)
        selection.source = _Selection(self.source, indices)
        selection._cache = None if self._cache is None else {}
        return selection

    def _find_texts(self) -> Int[np.ndarray, " n"]:
        """Returns the numbers of the records that have a text."""
        path = None
        if self.folder is not None and "[" not in self.split:
            path = self.folder / name_text_list(self.split, self.caption)
            # A broken list is written again.
            with contextlib.suppress(OSError, ValueError, TypeError):
                count, left_out = json.loads(path.read_bytes())
                if count == len(self):
                    return np.setdiff1d(np.arange(count), np.asarray(left_out, np.int64))
        has_text = np.asarray([bool(self.read_text(i).strip()) for i in range(len(self))], bool)
        if path is not None:
            # Records may be on a read-only drive.
            with contextlib.suppress(UserError):
                left_out = np.flatnonzero(~has_text).tolist()
                write_atomically(path, json.dumps([len(self), left_out]))
        return np.flatnonzero(has_text)

    def __getstate__(self) -> dict[str, Any]:
        # A worker process fills a cache of its own.
        return self.__dict__ | {"_cache": None if self._cache is None else {}}


@dataclasses.dataclass(frozen=True)
class _Selection(Sequence):
    """The items of a sequence at some indices."""

    source: Sequence[bytes]
    indices: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]  # no slices
        return self.source[int(self.indices[index])]


def open_dataset(
    name: str,
    split: str,
    /,  # builders have fields of these names
    *,
    data_dir: str | None = None,
    cache: bool = False,
    fingerprint: str = "",
    caption: str = "",
    **builder_config,
) -> Dataset:
    """Opens a split of a dataset; prepares the dataset first if necessary.

    The dataset is in `data_dir/name/<hash of the builder's configuration>/<version>`, so another
    configuration is another folder. If the files that records were made from have another content
    now, they are prepared again in a folder of their own.

    Args:
      name: `phantom` or `pairs`.
      split: name of a split, or a part of one, as `train[:50%]`.
      data_dir: folder of all datasets (None: ~/.cache/plan_jax).
      cache: keep decoded images and texts in memory.
      fingerprint: digest that manifest and files must have; "" accepts any.
      caption: rule of `sections.captions` by which texts are made from the sections of reports; "":
        the stored text or, where there is none, findings and impression.
      **builder_config: fields of the builder's configuration.

    Raises:
      UserError: for an unknown name, split, caption rule or field of the configuration, for
        mistakes in the builder's input, for a caption rule where no report has sections, and for
        records that are damaged.
    """
    if caption and caption not in CAPTIONS:
        raise UserError(f"caption rule {caption!r} is unknown; use one of {', '.join(CAPTIONS)}")
    facts = getattr(BUILDERS[name][0], "facts", None) if name in BUILDERS else None
    if caption and name in BUILDERS and (facts is None or "reports" not in facts.provides):
        raise UserError(
            f"config.data.caption is {caption!r}, and dataset {name} has no sections of reports to "
            "make captions of; leave it empty"
        )
    builder, actual_fingerprint = prepare_dataset(name, data_dir, builder_config)
    folder = Path(builder.data_dir)
    if fingerprint and fingerprint != actual_fingerprint:
        raise UserError(
            "the data are not those that the model was trained on: "
            f"{explain_difference(builder, fingerprint)}; restore them, pass "
            "another --workdir for a new run, or accept them with --config.data.fingerprint=''"
        )
    with name_damage(folder):
        # Without this file TFDS takes the names that are in the code, which are none.
        metadata = json.loads((folder / METADATA_FILE).read_text("utf-8"))
        names = [metadata[field] for field in ("findings", "anatomy", "regions")]
    counts = {name: info.num_examples for name, info in builder.info.splits.items()}
    listed_counts = ", ".join(f"{name} {count}" for name, count in counts.items())
    base = split.split("[")[0]
    if base not in counts:
        fraction = f"{base}_fraction"
        share = getattr(builder.builder_config, fraction, None)
        remedy = f"use one of {', '.join(counts)}"
        if isinstance(builder.builder_config, PublicConfig):
            remedy += f", or raise data.builder.{fraction}" if share == 0 else ""
        elif share is not None and metadata["split_column"]:
            remedy = "add rows of that split, or evaluate another one"
        elif share is not None:
            remedy = (
                f"none of its {metadata['num_patients']} patients fell into {base} "
                f"with {fraction} {share:g}; add rows of that split in a column `split`, or raise "
                f"{fraction}"
            )
        raise UserError(
            f"split {split!r} is not in dataset {name}, which has {listed_counts}; {remedy}"
        )
    try:
        is_empty = builder.info.splits[split].num_examples == 0
    except (AssertionError, ValueError):  # of TFDS's parser of `[...]`
        raise UserError(f"split {split!r} cannot be read; write {base} or {base}[:50%]") from None
    if is_empty:
        raise UserError(f"split {split!r} has no rows; {base} of dataset {name} has {counts[base]}")
    # `Dataset` decodes by itself: training decodes only a part of a record.
    raw_bytes = tfds.decode.DeserializeMethod.RAW_BYTES
    with name_damage(folder):
        # The reader of bytes alone: a reader process must not build the dataset once more.
        source = builder.as_data_source(split, deserialize_method=raw_bytes).data_source
    return Dataset(
        source,
        *names,
        name=name,
        folder=folder,
        fingerprint=actual_fingerprint,
        cache=cache,
        split=split,
        caption=caption,
        may_lack_text=facts is not None,
    )


def list_splits(name: str, *, data_dir: str | None = None, **builder_config) -> tuple[str, ...]:
    """Returns the names of the splits of a dataset; prepares the dataset first if necessary.

    Raises:
      UserError: as `open_dataset`.
    """
    builder, _ = prepare_dataset(name, data_dir, builder_config)
    return tuple(builder.info.splits)
