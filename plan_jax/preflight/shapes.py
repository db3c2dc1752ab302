"""Shapes of a training step from its config alone: no data, no published weights, no network."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from plan_jax import parallel
from plan_jax.config import BY_WEIGHTS, Config, WeightsConfig
from plan_jax.data.phantom import ANATOMY, FINDINGS
from plan_jax.data.preparation import BUILDERS
from plan_jax.data.public.builder import PublicBuilder
from plan_jax.model import Components, build_components
from plan_jax.state import State, init_state
from plan_jax.types import Batch, TextBatch, UserError

# Pieces of the tokenizers that configs name, so that they need not be fetched. Bio_ClinicalBERT has
# the vocabulary of bert-base-cased; the others have as many pieces as bert-base-uncased.
VOCABULARIES = {
    "emilyalsentzer/Bio_ClinicalBERT": 28996,
    "bert-base-cased": 28996,
    "bert-base-uncased": 30522,
    "google-bert/bert-base-cased": 28996,
    "google-bert/bert-base-uncased": 30522,
    "microsoft/BiomedVLP-CXR-BERT-general": 30522,
    "microsoft/BiomedVLP-CXR-BERT-specialized": 30522,
    "microsoft/BiomedVLP-BioViL-T": 30522,
    "sentence-transformers/all-MiniLM-L6-v2": 30522,
}
# Of a manifest of one's own, whose columns are not read: as in CheXpert, and the 29 anatomical
# regions that works on Chest ImaGenome use.
_PAIRS_FINDINGS, _PAIRS_REGIONS = 14, 29


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Arguments of a step, as `jax.ShapeDtypeStruct`.

    Attributes:
      config: the config, with what it leaves to published weights or data filled in.
      components: encoders and method.
      optimiser: the optimiser.
      state: the state, which is on each device.
      batch: the batch of all devices.
      assumptions: what was assumed without looking at files, in sentences.
    """

    config: Config
    components: Components
    optimiser: optax.GradientTransformation
    state: State
    batch: Batch
    assumptions: tuple[str, ...]


def make_shapes(config: Config, axis: str | None = parallel.AXIS) -> Shapes:
    """Returns the shapes of the training step of a config, written for the device axis `axis`.

    Raises:
      UserError: the tokenizer is not on this machine and its size is not known, the dataset lacks
        what the method needs, or the method cannot be used with this config.
    """
    assumptions = []
    if config.normalisation == BY_WEIGHTS:  # all of them cost the same
        config = dataclasses.replace(config, normalisation="fixed")
    config = dataclasses.replace(config, weights=WeightsConfig())
    components, size = _build_components(config, axis)
    if size:
        assumptions.append(
            f"tokenizer {config.data.tokenizer} is taken to have {size} pieces, without fetching it"
        )
    findings, regions = _list_names(config, components.method.REQUIRES)
    if components.method.REQUIRES:
        assumptions.append(
            f"dataset {config.data.name} is taken to have {len(findings)} findings and {regions}"
            " regions, without reading it"
        )
    batch = _make_batch(config, components.method.REQUIRES, len(findings), regions)
    optimisers = []

    def init(batch: Batch) -> State:
        state, optimiser = init_state(components, config, batch, findings, load_weights=False)
        optimisers.append(optimiser)
        return state

    # Parameters do not depend on the batch size, and two pairs are traced sooner.
    pair = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype), batch)
    state = jax.eval_shape(init, pair)
    return Shapes(config, components, optimisers[-1], state, batch, tuple(assumptions))


def local_batch(batch: Batch, devices: int) -> Batch:
    """Returns the shapes of the part of a batch that one device has."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((x.shape[0] // devices, *x.shape[1:]), x.dtype), batch
    )


def _build_components(config: Config, axis: str | None) -> tuple[Components, int]:
    """Returns the components, and the assumed number of pieces of a tokenizer or 0."""
    size = VOCABULARIES.get(config.data.tokenizer, 0)
    if not size:
        return build_components(config, axis), 0
    # Names of findings become tokens of the small vocabulary, whose ids are among the others.
    data = dataclasses.replace(config.data, tokenizer="phantom")
    components = build_components(dataclasses.replace(config, data=data), axis)
    encoder = components.encoder.clone(vocab_size=size)
    tokenizer = dataclasses.replace(components.tokenizer, vocab_size=size)
    return components._replace(encoder=encoder, tokenizer=tokenizer), size


def _list_names(config: Config, requires: Sequence[str]) -> tuple[list[str], int]:
    """Returns names of findings, and how many regions there are.

    Raises:
      UserError: the dataset has none, and the method needs them.
    """
    data = config.data
    builder, _ = BUILDERS[data.name]
    if issubclass(builder, PublicBuilder):
        findings = list(builder.facts.findings)
        regions = int(builder.facts.counts.get("regions", 0))
    elif data.name == "phantom":
        findings = list(data.builder.get("findings", FINDINGS))
        regions = len(ANATOMY)
    else:
        findings = [f"finding {number}" for number in range(_PAIRS_FINDINGS)]
        regions = _PAIRS_REGIONS
    for name in requires:
        if not (findings if name == "labels" else regions):
            raise UserError(
                f"method {config.method} needs {name}, which dataset {data.name} does not have; use"
                " another dataset or method"
            )
    return findings, regions


def _make_batch(config: Config, requires: Sequence[str], findings: int, regions: int) -> Batch:
    data, pairs = config.data, config.batch

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((pairs, *shape), dtype)

    length, words = data.max_tokens, data.max_words
    extra = {
        "labels": array(findings, dtype=jnp.int8),
        "regions": array(regions, 4, dtype=jnp.float32),
        "region_words": array(regions, words, dtype=jnp.bool_),
    }
    text = TextBatch(
        tokens=array(length), word_index=array(length), word_id=array(words), sentence=array(words)
    )
    image = array(data.size, data.size, 1, dtype=jnp.uint8)
    variant = text if config.hard_negatives.kinds else None
    return Batch(image, text, {name: extra[name] for name in requires}, variant)
