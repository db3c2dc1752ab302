"""TFDS builder of the phantom dataset: draws every split and stores it with its full truth."""

import base64
import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from plan_jax.data import phantom, schema
from plan_jax.data.phantom.anatomy import Number
from plan_jax.types import UserError

_FEW = 600  # images that are drawn sooner than a second process has started
_MOST = 8  # processes
_WORK = "from plan_jax.data.builders.phantom import serve; serve()"
Job = tuple[int, int, phantom.Difficulty]  # seed, size


@dataclasses.dataclass
class PhantomConfig(tfds.core.BuilderConfig):
    """Which world is drawn: `seed`, `size` in pixels, images a split, and `phantom.Difficulty`."""

    seed: int = 0
    size: int = 96
    train: int = 4096
    val: int = 300
    test: int = 300
    findings: tuple[str, ...] = phantom.FINDINGS
    max_findings: int = 4
    noise: Number = 1.0
    filler: Number = 1.5
    hedged: Number = 0.3
    negated: Number = 1.6
    vague: Number = 0.2

    def difficulty(self) -> phantom.Difficulty:
        """The part that `phantom.draw_study` takes; raises UserError if a value is out of range."""
        names = [field.name for field in dataclasses.fields(phantom.Difficulty)]
        values = {name: getattr(self, name) for name in names}
        return phantom.Difficulty(**values | {"findings": tuple(self.findings)})

    def __post_init__(self):
        self.difficulty()
        for split in phantom.SPLITS:
            phantom.split_range(split, getattr(self, split))
            if getattr(self, split) == 0:
                raise UserError(f"{split} count 0 leaves that split empty; use 1 or more")
        phantom.check_arguments(self.seed, 0, self.size)


class Phantom(tfds.core.GeneratorBasedBuilder):
    """Procedural frontal chest radiographs with reports, masks, boxes and triplets."""

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES = {"1.0.0": "First version.", "1.1.0": "Boxes of regions."}
    BUILDER_CONFIGS = [PhantomConfig(name="default")]

    def _info(self) -> tfds.core.DatasetInfo:
        anatomy = list(phantom.ANATOMY)
        findings = list(self.builder_config.findings)
        names = {"findings": findings, "anatomy": anatomy, "regions": anatomy}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Procedural frontal chest radiographs with reports and full truth.",
            features=schema.feature_dict(),
            metadata=tfds.core.MetadataDict(names),
            disable_shuffling=True,  # record i is the i-th index of its split
        )

    def _split_generators(self, dl_manager):
        counts = {split: getattr(self.builder_config, split) for split in phantom.SPLITS}
        return {split: self._generate_examples(split, count) for split, count in counts.items()}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        job = (config.seed, config.size, config.difficulty())
        indices = phantom.split_range(split, count)
        processes = min(_cores(), _MOST) if count > _FEW else 1
        drawn = _draw_apart(job, indices, processes) if processes > 1 else _draw(job, indices)
        yield from zip(range(count), drawn, strict=True)


def _cores() -> int:
    """Cores that this process may use; not every system can tell."""
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def _draw(job: Job, indices: range) -> Iterator[dict[str, Any]]:
    """Draw the studies of `indices` and turn them into examples, in order."""
    seed, size, difficulty = job
    for index in indices:
        yield schema.to_example(phantom.draw_study(seed, index, size, difficulty))


def _draw_apart(job: Job, indices: range, processes: int) -> Iterator[dict[str, Any]]:
    """The same in several processes: process k draws every `processes`-th study, from the k-th on.

    These are plain child processes that write a JSON line an example, not `multiprocessing`: that
    would import the caller's main module again (or fork a process that may run JAX's threads).
    """
    root = str(Path(__file__).resolve().parents[3])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    started: list[subprocess.Popen] = []
    try:
        for k in range(processes):
            mine = indices[k::processes]
            told = [job[0], job[1], dataclasses.asdict(job[2]), mine.start, mine.stop, mine.step]
            command = [sys.executable, "-c", _WORK, json.dumps(told)]
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=env))
        for i in range(len(indices)):
            line = started[i % processes].stdout.readline()
            if not line:
                raise RuntimeError("a process that drew phantoms ended early; it says why above")
            yield json.loads(line, object_hook=_from_plain)
    finally:
        for child in started:
            child.kill()
            child.wait()
            child.stdout.close()


def serve() -> None:
    """Be a child process of `_draw_apart`: draw what the command line says, write it to stdout."""
    seed, size, difficulty, start, stop, step = json.loads(sys.argv[1])
    difficulty["findings"] = tuple(difficulty["findings"])
    job = seed, size, phantom.Difficulty(**difficulty)
    try:
        for example in _draw(job, range(start, stop, step)):
            print(json.dumps(example, default=_to_plain), flush=True)
    except BrokenPipeError:  # the parent is gone, and there is nobody to tell
        os._exit(1)


def _to_plain(value: io.BytesIO | np.ndarray) -> dict[str, Any]:
    """What JSON has no word for: bytes as {"bytes"}, an array as {"bytes", "dtype", "shape"}."""
    if isinstance(value, io.BytesIO):
        return {"bytes": base64.b64encode(value.getvalue()).decode()}
    data = base64.b64encode(value.tobytes()).decode()
    return {"bytes": data, "dtype": str(value.dtype), "shape": value.shape}


def _from_plain(value: dict[str, Any]) -> io.BytesIO | np.ndarray | dict[str, Any]:
    """Undo `_to_plain`."""
    if "bytes" not in value:
        return value
    data = base64.b64decode(value["bytes"])
    if "dtype" not in value:
        return io.BytesIO(data)
    return np.frombuffer(data, value["dtype"]).reshape(value["shape"])
