"""Builds the configs of this folder: what a benchmark changes in the run that it evaluates."""

from ml_collections import ConfigDict


def manifest(
    path: str, *, size: int = 256, has_text: bool = False, **settings: object
) -> dict[str, object]:
    """Returns the `data` section for a manifest of images, one row a study.

    Args:
      path: the manifest, relative to the working directory.
      size: side of the stored square images, in pixels.
      has_text: whether every row has a report.
      **settings: other fields of `PairsConfig`, as `label_columns`.
    """
    builder = {"manifest": path, "size": size, **settings}
    if not has_text:
        builder["text_optional"] = True
    return {"name": "pairs", "builder": builder}


def public(name: str, *, size: int = 256, **settings: object) -> dict[str, object]:
    """Returns the `data` section of a public dataset, which `plan-jax-prepare` prepares.

    Args:
      name: the dataset, see docs/data.md.
      size: longer side of the stored images, in pixels.
      **settings: other fields of its builder, as `split`.
    """
    return {"name": name, "builder": {"size": size, **settings}}


def benchmark(
    task: str,
    data: dict[str, object],
    *,
    limit: int,
    split: str = "test",
    options: dict[str, object] | None = None,
    **evaluation: object,
) -> ConfigDict:
    """Returns the config of a benchmark with one task.

    Args:
      task: the name of the task.
      data: the `data` section, see `manifest`.
      limit: largest number of evaluated records; benchmarks use the size of their test set.
      split: the evaluated split.
      options: fields of the task's `Options` that differ from its defaults.
      **evaluation: other fields of `config.eval`, as `prompts`.
    """
    settings = {"tasks": (task,), "split": split, "limit": limit, **evaluation}
    if options:
        settings[task] = dict(options)
    return ConfigDict({"data": data, "eval": settings})
