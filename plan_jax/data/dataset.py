"""Datasets on disk: random access to the records of a split."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plan_jax.data import schema
from plan_jax.data.faults import name_damage
from plan_jax.data.preparation import METADATA_FILE, explain_difference, prepare_dataset
from plan_jax.data.tfds import tfds
from plan_jax.types import Record, UserError


class Dataset(Sequence):
    """Random access to the studies of one split.

    `dataset[i]` decodes a whole `Record`. `read_pair(i)` decodes only what training reads.
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
        """
        self.source = source
        self.findings = tuple(findings)
        self.anatomy_names = tuple(anatomy_names)
        self.region_names = tuple(region_names)
        self.name = name
        self.folder = folder
        self.fingerprint = fingerprint
        self._cache: dict[int, schema.Pair] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]  # no slices
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        with name_damage(self.folder):
            return schema.deserialize(self.source[index], self.anatomy_names)

    def read_pair(self, index: int) -> schema.Pair:
        """Returns image, text, labels and regions of a study; decodes nothing else."""
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
        """Returns the text of a study; decodes nothing else."""
        with name_damage(self.folder):
            return schema.deserialize_text(self.source[index])

    def __getstate__(self) -> dict[str, Any]:
        # A worker process fills a cache of its own.
        return self.__dict__ | {"_cache": None if self._cache is None else {}}


def open_dataset(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    cache: bool = False,
    fingerprint: str = "",
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
      **builder_config: fields of the builder's configuration.

    Raises:
      UserError: for an unknown name, split or field of the configuration, for mistakes in the
        builder's input, and for records that are damaged.
    """
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
        if share is not None and metadata["split_column"]:
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
    )


def list_splits(name: str, *, data_dir: str | None = None, **builder_config) -> tuple[str, ...]:
    """Returns the names of the splits of a dataset; prepares the dataset first if necessary.

    Raises:
      UserError: as `open_dataset`.
    """
    builder, _ = prepare_dataset(name, data_dir, builder_config)
    return tuple(builder.info.splits)
