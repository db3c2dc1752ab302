"""Opening a dataset: random access to the records of a split, and to what training needs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from plan_jax.data import schema
from plan_jax.data.prepare import prepared
from plan_jax.types import Record, UserError

DATA_DIR = "~/.cache/plan_jax"


class Dataset(Sequence):
    """Studies of one split with random access.

    `findings` name the labels, `anatomy` the masks, `regions` the boxes of regions.

    `source` holds serialised examples; a list of `schema.serialize(record)` will do. `dataset[i]`
    decodes a whole `Record`, `image_text(i)` only what training reads; `keep` remembers the latter,
    decoded, for the life of the process.
    """

    def __init__(
        self,
        source: Sequence[bytes],
        findings: Sequence[str] = (),
        anatomy: Sequence[str] = (),
        regions: Sequence[str] = (),
        *,
        name: str = "",
        keep: bool = False,
    ):
        self.source = source
        self.findings = tuple(findings)
        self.anatomy_names = tuple(anatomy)
        self.region_names = tuple(regions)
        self.name = name
        self._kept: dict[int, schema.Row] | None = {} if keep else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Record:
        if not -len(self) <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        return schema.deserialize(self.source[i], self.anatomy_names)

    def image_text(self, i: int) -> schema.Row:
        """Decode image, text, labels and regions of study i, and nothing else."""
        if self._kept is not None and i in self._kept:
            return self._kept[i]
        row = schema.deserialize_row(self.source[i])
        if self._kept is not None:
            row.image.setflags(write=False)
            self._kept[i] = row
        return row

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None if self._kept is None else {}}


def open_dataset(
    name: str, split: str, *, data_dir: str | None = None, cache: bool = False, **builder_config
) -> Dataset:
    """Open a split of a dataset, `phantom` or `pairs`; prepare it first where it is not yet.

    It lies in `data_dir/name/<hash of the builder's configuration>/<version>` (data_dir: by default
    ~/.cache/plan_jax), so another configuration is another folder. Preparing happens beside it
    under a lock, and a rename ends it: one that was killed leaves nothing that is taken for whole.
    `cache` keeps decoded images and texts in memory.

    Raises:
      UserError: for an unknown name, split or field of the configuration, and what the builder
        finds wrong with its input.
    """
    builder = prepared(name, Path(data_dir or DATA_DIR).expanduser(), builder_config)
    known = tuple(builder.info.splits)
    if split.split("[")[0] not in known:
        raise UserError(f"split {split!r} is not in dataset {name}; choose from {', '.join(known)}")
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    try:
        source = builder.as_data_source(split, deserialize_method=raw)
    except (AssertionError, ValueError):
        raise UserError(
            f"split {split!r} cannot be read; write {known[0]} or {known[0]}[:50%]"
        ) from None
    metadata = builder.info.metadata
    names = (metadata[kind] for kind in ("findings", "anatomy", "regions"))
    return Dataset(source, *names, name=name, keep=cache)


def split_names(name: str, *, data_dir: str | None = None, **builder_config) -> tuple[str, ...]:
    """Name the splits of a dataset, which is prepared first where it is not yet.

    Raises:
      UserError: as `open_dataset`.
    """
    builder = prepared(name, Path(data_dir or DATA_DIR).expanduser(), builder_config)
    return tuple(builder.info.splits)
