"""The builder that all public datasets share."""

import abc
import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from plan_jax.data import schema
from plan_jax.data.public import shards, summary
from plan_jax.data.public.config import PublicConfig
from plan_jax.data.public.facts import Facts
from plan_jax.data.public.items import Item
from plan_jax.data.public.plan import Plan, make_plan
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.data.sections.captions import CAPTIONS, DEFAULT_RULE, name_text_list
from plan_jax.data.sources import MESSAGES_FILE, SourceFiles
from plan_jax.data.tfds import tfds
from plan_jax.logger import encode_json, write_atomically
from plan_jax.types import UserError

PARTS_FOLDER = "parts"  # next to the versions of a dataset, while it is prepared


class PublicBuilder(tfds.core.dataset_builder.FileReaderBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Builds a public dataset from the folder that it was downloaded to.

    A subclass has a table of facts, and yields the images of a folder. First all tables are read.
    Then several processes read the images and write one shard of records at a time. A preparation
    that was killed goes on where it was.
    """

    facts: ClassVar[Facts]
    builder_config: PublicConfig
    summary: Sequence[str] = ()  # lines on the records that were prepared

    @abc.abstractmethod
    def read_items(self, source: SourceFolder) -> Iterator[Item]:
        """Yields the images that the tables list, in any order.

        Rows that cannot be used are dropped by `source.drop`.

        Raises:
          UserError: the tables cannot be read, or hold what they cannot mean.
        """

    def check(self) -> list[str]:
        """Reads all but the images; returns the lines of the summary.

        Raises:
          UserError: the tables cannot be read, or hold what they cannot mean.
        """
        source = self._open_source()
        with tempfile.TemporaryDirectory() as folder:
            plan = self._make_plan(source, Path(folder), needs_images=False)
            tally = summary.Tally(self._list_findings(plan))
            for split in plan.offsets:
                tally.add(split, plan.read_items(split))
        content = summary.summarise(tally, plan, source, self.builder_config, str(self.version))
        lines = summary.describe(content, source.dropped, self.builder_config)
        if plan.missing:
            lines.append(f"{len(plan.missing)} of {len(plan)} images are missing or empty")
        return lines

    # Methods of TFDS --------------------------------------------------------------------------

    def download_and_prepare(self, **options: Any) -> None:
        """Prepares the records; what a kill would need to go on is deleted last."""
        super().download_and_prepare(**options)
        location = Path(self.data_dir).parent
        for name in (PARTS_FOLDER, f"{PARTS_FOLDER}-{os.getpid()}"):
            shutil.rmtree(location / name, ignore_errors=True)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.facts.content,
            features=schema.record_features(),
            homepage=f"https://{self.facts.page}",
            metadata=tfds.core.MetadataDict(
                {
                    "findings": [],
                    "anatomy": [],
                    "regions": [],
                    "num_patients": 0,
                    "split_column": self.builder_config.split_rule,
                }
            ),
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        config, source = self.builder_config, self._open_source()
        folder = Path(self.data_dir)  # TFDS renames it when everything is written
        with _lock_parts(folder.parent) as parts:
            plan = self._make_plan(source, parts)
            findings = self._list_findings(plan)
            settings = {
                "folder": str(config.image_root),
                "size": config.size,
                "findings": findings,
                "regions": list(plan.regions),
                "anatomy": list(plan.anatomy),
            }
            written = shards.write_shards(plan, parts, settings, config.workers, self.name)
            self._check_broken(written, len(plan))
            for reason, path in (x for part in written.values() for s in part for x in s.dropped):
                source.drop(reason, path)
            self._write_summary(plan, written, findings, source, folder)
            self._place_shards(written)
            metadata = self.info.metadata
            metadata["findings"] = findings
            metadata["regions"], metadata["anatomy"] = list(plan.regions), list(plan.anatomy)
            metadata["num_patients"] = sum(size["patients"] for size in plan.sizes.values())

    # Parts of a preparation -------------------------------------------------------------------

    def _open_source(self) -> SourceFolder:
        if not self.builder_config.source:
            self._expect_no_others()
            raise UserError(
                f"dataset {self.facts.name} is not prepared yet; download it from "
                f"{self.facts.page} and name its folder with --config.data.source=DIR, or "
                f"prepare it with python -m plan_jax.prepare {self.facts.name} --source DIR"
            )
        return SourceFolder(self.builder_config.root, self.facts.page)

    def _expect_no_others(self) -> None:
        """Raises UserError if the dataset is prepared with other options; names the nearest."""
        options_now = json.loads(encode_json(self.builder_config.identity()))
        candidates: list[tuple[dict[str, Any], Path]] = []
        for path in sorted(Path(self.data_dir).parents[1].glob(f"*/*/{summary.SUMMARY_FILE}")):
            with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
                options = json.loads(path.read_text("utf-8"))["options"]
                stored_options = {name: options.get(name) for name in options_now}
                candidates.append(
                    ({k: v for k, v in stored_options.items() if v != options_now[k]}, path.parent)
                )
        differing, folder = min(
            candidates, key=lambda candidate: len(candidate[0]), default=({}, Path())
        )
        if differing:
            there, here = (
                ", ".join(_describe_option(name, values[name]) for name in differing)
                for values in (differing, options_now)
            )
            raise UserError(
                f"dataset {self.facts.name} is prepared in {folder} with {there}, not with {here}; "
                "set these fields of config.data.builder, or name the downloaded folder with "
                "--config.data.source=DIR"
            )

    def _make_plan(self, source: SourceFolder, folder: Path, *, needs_images: bool = True) -> Plan:
        with tqdm(
            unit="row",
            desc=f"{self.facts.name}: tables",
            total=self.facts.counts.get("images"),
            dynamic_ncols=True,
            mininterval=shards.refresh_interval(),
            delay=2,
            leave=False,
        ) as bar:
            return make_plan(
                self.read_items(source),
                source,
                self.builder_config,
                folder,
                bar.update,
                needs_images=needs_images,
            )

    def _list_findings(self, plan: Plan) -> list[str]:
        """Returns the published names of findings, and others that occur."""
        return list(dict.fromkeys([*self.facts.findings, *plan.labels]))

    def _check_broken(self, written: Mapping[str, Sequence[shards.Shard]], total: int) -> None:
        """Raises UserError if too many images cannot be used, or none of a split can."""
        all_shards = [shard for part in written.values() for shard in part]
        dropped = [entry for shard in all_shards for entry in shard.dropped]
        limit = self.builder_config.max_bad
        if len(dropped) > limit * total:
            reason, path = dropped[0]
            raise UserError(
                f"{len(dropped)} of {total} images of dataset {self.facts.name} cannot be used, "
                f"more than the fraction max_bad {limit:g}, as {path} ({reason}); download them "
                "again or raise max_bad"
            )
        for split, part in written.items():
            if not any(shard.record_places for shard in part):
                reason, path = part[0].dropped[0]
                raise UserError(
                    f"split {split!r} of dataset {self.facts.name} has no usable image, as {path} "
                    f"({reason}); download them again"
                )

    def _write_summary(
        self,
        plan: Plan,
        written: Mapping[str, Sequence[shards.Shard]],
        findings: Sequence[str],
        source: SourceFolder,
        folder: Path,
    ) -> None:
        """Writes the files beside the records: summary, what was left out, sources, messages."""
        config = self.builder_config
        tally = summary.Tally(findings)
        faults: dict[str, list[str]] = {}
        notes: dict[str | int, list[str]] = {}
        for split, part in written.items():
            tally.add(split, _keep(plan.read_items(split), plan.offsets[split], part))
            for shard in part:
                for fault, names in shard.faults.items():
                    faults.setdefault(fault, []).extend(names)
                for note, names in shard.notes.items():
                    notes.setdefault(note, []).extend(names)
        content = summary.summarise(tally, plan, source, config, str(self.version))
        content["faults"] = {fault: len(names) for fault, names in faults.items()}
        write_atomically(folder / summary.SUMMARY_FILE, encode_json(content, indent=2))
        write_atomically(folder / summary.DROPPED_FILE, summary.list_dropped(source.dropped))
        self.summary = summary.describe(content, source.dropped, config, faults, notes)
        lines = summary.remark(content, source.dropped, config, faults, notes)
        write_atomically(folder / MESSAGES_FILE, "\n".join(lines) + "\n")
        for split, part in written.items():
            _list_textless(folder, split, part)
        files = SourceFiles()
        for table in map(source.resolve, source.tables):
            (files.add_folder if table.is_dir() else files.add)(config.root, table)
        broken = [path for part in written.values() for shard in part for path in shard.broken]
        for path in (*plan.missing, *broken):  # one that is mended must be noticed
            files.add(config.root, config.image_root / path)
        files.save(folder)

    def _place_shards(self, written: Mapping[str, Sequence[shards.Shard]]) -> None:
        """Puts the shards where TFDS reads them, and tells it their lengths.

        Until TFDS has renamed its folder, they are also where a kill would need them.
        """
        splits = []
        for split, part in written.items():
            full = [shard for shard in part if shard.record_places]
            template = tfds.core.ShardedFileTemplate(
                data_dir=self.data_path,
                dataset_name=self.name,
                split=split,
                filetype_suffix="array_record",
            )
            for index, shard in enumerate(full):
                name = template.sharded_filepath(shard_index=index, num_shards=len(full))
                try:
                    os.link(shard.path, name)
                except OSError:  # a drive without links
                    os.replace(shard.path, name)
            splits.append(
                tfds.core.splits.SplitInfo(
                    name=split,
                    shard_lengths=[len(shard.record_places) for shard in full],
                    num_bytes=sum(shard.num_bytes for shard in full),
                    filename_template=template,
                )
            )
        self.info.set_splits(tfds.core.splits.SplitDict(splits))


def _describe_option(name: str, value: Any) -> str:
    """Returns an option of prepared records as messages show it.

    >>> _describe_option("size", 256), _describe_option("has_images", True)
    ('size 256', 'images given')
    """
    field = name.removeprefix("has_")
    return f"{name} {value!r}" if field == name else f"{field} {'given' if value else 'not given'}"


def _list_textless(folder: Path, split: str, part: Sequence[shards.Shard]) -> None:
    """Writes for each caption rule which records of a split have no text under it."""
    total = sum(len(shard.record_places) for shard in part)
    for rule in ("", *CAPTIONS):
        start, places = 0, list[int]()
        for shard in part:
            places += [start + place for place in shard.textless[rule or DEFAULT_RULE]]
            start += len(shard.record_places)
        write_atomically(folder / name_text_list(split, rule), json.dumps([total, places]))


def _keep(
    items: Iterator[Item], offsets: Sequence[int], part: Sequence[shards.Shard]
) -> Iterator[Item]:
    """Yields the items of a split that have become records."""
    start = 0
    record_places = set[int]()
    for shard in part:
        record_places.update(start + place for place in shard.record_places)
        start += len(shard.record_places) + len(shard.dropped)
    assert start == len(offsets)
    for index, item in enumerate(items):
        if index in record_places:
            yield item


@contextlib.contextmanager
def _lock_parts(location: Path) -> Iterator[Path]:
    """Yields the folder of the shards while they are written, for this process alone.

    On a drive without locks it is one of this process, which no other continues.
    """
    parts = location / PARTS_FOLDER
    parts.mkdir(parents=True, exist_ok=True)
    with (parts / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            parts = location / f"{PARTS_FOLDER}-{os.getpid()}"
            parts.mkdir(exist_ok=True)
        for stale in parts.glob("*.[0-9]*"):  # what a process that was killed had begun
            stale.unlink(missing_ok=True)
        yield parts
