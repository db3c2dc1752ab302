"""The card of a model: what it is, what it was trained on, what it scored, and what it is not for.

The card is the README of a model folder. Its front matter is what the Hugging Face Hub reads.
"""

import math
from collections.abc import Mapping
from typing import Any

from plan_jax.config import Config
from plan_jax.methods import METHODS
from plan_jax.metrics import headlines
from plan_jax.page.tables import markdown
from plan_jax.tasks import CATALOGUE, TITLES

# Identifiers of licences that the hub knows, of those that weights and data often have.
KNOWN_LICENCES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0"),
    *("cc-by-nc-nd-4.0", "odc-by", "openrail", "pddl"),
)
NOT_STATED = "not stated by the author of this model"

TEXT = """\
# {title}

A model of {method}, trained with plan_jax. It maps chest radiographs and English text into one
space of {embed_dim} dimensions, scores how well they match, and draws a heat map of a phrase over
an image.{note}

**Not for clinical use.** This is research software. Nothing here has been validated on patients.

## Use

```python
import plan_jax

model = plan_jax.load("{title}")  # this folder, or its name on the hub as owner/name
images = model.encode_image(radiographs)  # uint8 [N Y X 1], grey, {size} x {size}
texts = model.encode_text(["effusion on the left", "no pneumothorax"])
scores = model.similarity(images, texts)  # {{"global": [N T], ...}}
```

## Data

- Trained on: {data_name}
- Licence of the data: {data_licence}
- Licence of the weights: {licence}

The author of the model states these. Whether weights may be shared that were trained on data of
restricted access, such as MIMIC-CXR, is for the author to find out.

## Model

| | |
|---|---|
| method | {method} |
| image encoder | {vision}, images of {size} x {size} pixels |
| text encoder | {text}, at most {max_tokens} word pieces |
| parameters | {num_params:,}, saved as {dtype} |
| training | {step:,} steps of {batch} pairs |
| started from | {weights} |
| plan_jax | {version} |

## Results

{results}

## Limits

- It has learned from the data above and from nothing else; on other devices, patients or ways to
  write a report it may fail without any sign.
- A heat map shows where the model finds a phrase most likely. It is high somewhere in every image,
  whether or not the phrase is true.
- Images are frontal chest radiographs. Others get a score too, which means nothing.

## Citation

{method} is the method of {paper}.
Please cite its authors, and plan_jax.
"""


def write_card(
    config: Config,
    *,
    title: str,
    dtype: str,
    step: int,
    num_params: int,
    version: str,
    params_sha256: str,
    about: Mapping[str, str],
    metrics: Mapping[str, Mapping[str, Any]],
) -> str:
    """Returns the card of a model as Markdown with YAML front matter.

    Args:
      config: the config of the run.
      title: name of the model.
      dtype: in what the parameters are saved.
      step: updates that they have seen.
      num_params: how many numbers they are.
      version: the version of plan_jax.
      params_sha256: the fingerprint of the parameters as they are saved.
      about: `data_name`, `data_licence`, `licence` and `note`, as the user states them; "" if not.
      metrics: what was measured on these parameters, by the name of the evaluation.
    """
    title = _to_line(title)
    method = {"convirt": "ConVIRT", "gloria": "GLoRIA"}.get(config.method, config.method.upper())
    weights = ", ".join(filter(None, (config.weights.vision, config.weights.text)))
    stated = {
        name: _to_line(about.get(name, "")) or NOT_STATED
        for name in ("data_name", "data_licence", "licence")
    }
    note = _to_line(about.get("note", ""))
    # They may have been rounded when their source was saved.
    is_rounded = dtype != "float32" or any(
        values.get("params_sha256", params_sha256) != params_sha256 for values in metrics.values()
    )
    text = TEXT.format(
        title=title,
        method=method,
        paper=METHODS[config.method].PAPER,
        embed_dim=config.embed_dim,
        size=config.data.size,
        vision=config.vision["name"],
        text=config.text["name"],
        max_tokens=config.data.max_tokens,
        num_params=num_params,
        dtype=dtype,
        step=step,
        batch=config.batch,
        weights=weights or "random weights",
        version=version,
        results=_write_results(metrics, is_rounded),
        note=f"\n\n{note}" if note else "",
        **stated,
    )
    return f"---\n{_front_matter(config, title, about, metrics)}\n---\n\n{text}"


def _write_results(metrics: Mapping[str, Mapping[str, Any]], is_rounded: bool) -> str:
    """Returns one table for each evaluation, each metric beside its null baselines."""
    if not metrics:
        return "No evaluation of these weights was saved with them."
    parts = [
        "Each value stands beside baselines that do not look at the image. A model that does not"
        "\nbeat them has learned where findings usually are, and not where this one is."
    ]
    if is_rounded:
        parts.append("Measured on the float32 weights, before they were rounded to float16.")
    for name, values in metrics.items():
        parts.append(f"### {name}\n\n{markdown(values, CATALOGUE, TITLES)}".rstrip())
    return "\n\n".join(parts)


def _front_matter(
    config: Config,
    title: str,
    about: Mapping[str, str],
    metrics: Mapping[str, Mapping[str, Any]],
) -> str:
    """Returns the YAML that the hub reads: licence, tags, and headline metrics."""
    from huggingface_hub import EvalResult, ModelCardData  # 0.3 s to import, for saving only

    data = _to_line(about.get("data_name", "")) or config.data.name
    results = [
        EvalResult(
            task_type=entry.task.replace("_", "-"),
            task_name=TITLES.get(entry.task, entry.task),
            dataset_type=config.data.name,
            dataset_name=data,
            dataset_config=name,  # the hub merges results that differ in nothing but their name
            metric_type=entry.key,
            metric_name=entry.metric.label,
            metric_value=round(entry.value, 4),
        )
        for name, values in metrics.items()
        for entry in headlines(CATALOGUE, values)
        if math.isfinite(entry.value)
    ]
    licence = _to_line(about.get("licence", ""))
    is_known = licence.lower() in KNOWN_LICENCES
    card = ModelCardData(
        language="en",
        library_name="plan_jax",
        license=(licence.lower() if is_known else "other") if licence else None,
        license_name=licence if licence and not is_known else None,
        pipeline_tag="zero-shot-image-classification",
        tags=["plan_jax", "jax", "medical", "radiology", "chest-x-ray", config.method],
        model_name=title,
        eval_results=results or None,
    )
    return card.to_yaml()


def _to_line(text: str) -> str:
    """Returns a text as one line, which ends no table and no list."""
    return " ".join(text.split())
