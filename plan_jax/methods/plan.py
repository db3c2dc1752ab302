"""PLAN: progressive local alignment of words and pixels.

PAPER: Yan, Yang, Bai, Liang, Progressive Local Alignment for Medical Multimodal Pre-training,
arXiv 2502.18047. Only its abstract and summaries by others are public, so this is a PLAN-style
reconstruction, not a re-implementation checked against the authors' code.

Established (abstract): soft regions instead of hard boundaries; a contrast of word-pixel relations;
a progressive strategy that refines these relations over iterations. Established by summaries only:
a learnable map g of pixels to the words' space; a word-pixel similarity matrix S; importance of
words and of pixels, from the rows and columns of S, to damp noise; a region feature for each word,
contrasted with selected words; S updated in each iteration with its history.

Ours, equation by equation (z unit pixels after g, u unit words, n word, p pixel, i image, j text):
(1) first look          `S0_np = <u_n, z_p>` on the coarse map
(2) word importance     `a_n = gate_n(softmax-mean_p S_np)`, gate = standardise, then sigmoid
(3) pixel importance    `b_p = gate_p(softmax-mean_n S_np)`; both without gradient
(4) soft region         `A_np = softmax_p(4 a_n b_p S_np / tau_region)`: no boundary anywhere
(5) region feature      `r_n = unit(sum_p A_np z_p)`, match `C_n = <u_n, r_n>`
(6) refinement, round t `q_n = unit(u_n + eta a_n r_n)`, `S_np <- (1 - rho) <q_n, f_p> + rho S_np`,
    on the finer map f if the tower gives one: a radiologist glances, then looks closer. S carries
    the history; then (2)-(5) again. A `lax.scan` over the rounds.
(7) history of words    `w_v`: how much better word v matched its own images than others, a moving
    average over training, squashed and kept above a floor; words are drawn for the contrast, and
    weighted in it, by w
(8) report contrast     InfoNCE of `sum_n w_n C_ijn / sum_n w_n / tau`, both directions
(9) word contrast       `- log softmax_i(C_ijn / tau)[i = j]`; images whose report has the same word
    are no negatives
(10) loss               global InfoNCE + sum over rounds t of `omega_t ((8) + (9))`, omega growing

Failed in trials: word-region contrast with regions of the word's own image only (solved without
looking); choosing words by the importance (2) of their own pair (gives the pairing away).
In round 0 all images are candidates, in later ones `candidates`, since a fine map costs more.
`progress="ema"` is the other reading of "iteration", over training time: S is mixed with that of a
moving average of the whole model (config.ema), with a share growing to `share`.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from plan_jax.methods import contrastive
from plan_jax.types import Features, Memory, MethodContext, Metrics, Params, UserError

PAPER = "arXiv 2502.18047"
REQUIRES: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hyper:
    """All constants; every one is ours, since the paper's are not public."""

    rounds: int = 1  # T, of refinement; 0 is one soft attention
    start: int = 0  # step from which rounds >= 1 count in the loss
    tau: float = 0.1  # temperature of the global contrast at the start; it is learned
    tau_local: float = 0.1
    tau_region: float = 0.1
    tau_importance: float = 0.1
    kappa: float = 1.0  # softness of the gates
    gates: bool = True  # importance of words and pixels; False: neutral
    eta: float = 0.0  # pull of a word towards its region
    rho: float = 0.5  # share of the history in S
    gamma: float = 0.5  # round t weighs gamma ** (T - t)
    candidates: int = 8  # images a word is tried on in rounds >= 1
    words: int = 12  # drawn from a report for the contrast
    history: bool = True  # word importance from training so far; False: all words alike
    decay: float = 0.99
    floor: float = 0.25
    table: int = 8192  # slots of the history; word ids are folded into it
    negatives: Literal["token", "all"] = "token"  # "token": the same word is no negative
    progress: Literal["rounds", "ema"] = "rounds"
    share: float = 0.5  # of the averaged model's S at the end of the ramp
    ramp: int = 1000  # steps of the ramp
    weight_global: float = 2.0
    weight_report: float = 1.0
    weight_word: float = 1.0
    tile: int = 4  # texts (round 0) or images (later rounds) at a time


class ImageSide(NamedTuple):
    """The pixels of one image, unit length, coarse and fine, and those of the averaged model."""

    pixels: Float[Array, "P D"]
    fine: Float[Array, "Q D"] | None = None
    past: Float[Array, "P D"] | None = None


class Words(NamedTuple):
    """The words of one text, unit length, with their ids, and those of the averaged model."""

    words: Float[Array, "K D"]
    word_id: Int[Array, " K"]
    past: Float[Array, "K D"] | None = None


def image_side(images: Features) -> ImageSide:
    """Take the pixels of images, [B P D] and [B Q D], to unit length."""
    fine = None if images.fine is None else contrastive.l2_normalise(images.fine)
    return ImageSide(contrastive.l2_normalise(images.local), fine)


def init(key: PRNGKeyArray, setting: MethodContext, hyper: Hyper) -> tuple[Params, Memory]:
    """Make the learned temperature, and an empty history of words: Float[table] each."""
    if hyper.progress == "ema" and not setting.ema_decay:
        raise UserError(
            "hyper.progress is ema, and config.ema_decay is 0; set config.ema_decay, to 0.99 say"
        )
    memory = {"gap": jnp.zeros(hyper.table), "seen": jnp.zeros(hyper.table)}
    return {"log_scale": jnp.log(1 / hyper.tau)}, memory


def importance(
    maps: Float[Array, "K P"], mask: Bool[Array, " K"], hyper: Hyper
) -> tuple[Float[Array, " K"], Float[Array, " P"]]:
    """Gate words and pixels by how strongly they fire: *equations 2, 3*; no gradient."""
    if not hyper.gates:
        return 0.5 * mask, jnp.full(maps.shape[-1], 0.5)
    maps = lax.stop_gradient(maps)
    word = contrastive.soft_maximum(maps, hyper.tau_importance)
    pixel = contrastive.soft_maximum(maps, hyper.tau_importance, mask[:, None], 0)
    everywhere = jnp.ones(pixel.shape, bool)
    return contrastive.gate(word, mask, hyper.kappa), contrastive.gate(
        pixel, everywhere, hyper.kappa
    )


def look(
    maps: Float[Array, "K P"],
    pixels: Float[Array, "P D"],
    words: Float[Array, "K D"],
    mask: Bool[Array, " K"],
    hyper: Hyper,
) -> tuple[Float[Array, " K"], Float[Array, "K D"], Float[Array, " K"]]:
    """Give each word's importance, its region's feature and their match: *equations 2-5*."""
    word, pixel = importance(maps, mask, hyper)
    damped = maps * (4 * word[:, None] * pixel)
    region = jax.nn.softmax(damped / hyper.tau_region, -1)
    found = contrastive.l2_normalise(region @ pixels)
    return word, found, jnp.sum(words * found, -1) * mask


def read(
    image: ImageSide,
    text: Words,
    grids: tuple,
    hyper: Hyper,
    rounds: int,
    share: Array | float = 0.0,
) -> tuple[Float[Array, "N K"], Float[Array, "K Q"], Float[Array, " K"]]:
    """Read one text on one image: matches of rounds 0..T, the last map, and word importance.

    `grids` are the coarse and the fine one (no fine pixels: rounds stay on the coarse map, and Q is
    P); `share` is how much the averaged model's map counts.
    """
    words, mask, pixels = text.words, text.word_id > 0, image.pixels
    maps = words @ pixels.T
    if image.past is not None:
        maps = (1 - share) * maps + share * (text.past @ image.past.T)
    maps = maps * mask[:, None]
    word, found, first = look(maps, pixels, words, mask, hyper)
    if image.fine is not None:
        maps, pixels = contrastive.upsample_maps(maps, *grids), image.fine

    def step(carry: tuple[Array, Array, Array], _: None) -> tuple[tuple, Array]:
        maps, word, found = carry
        query = contrastive.l2_normalise(words + hyper.eta * word[:, None] * found)
        seen = query @ pixels.T * mask[:, None]
        maps = (1 - hyper.rho) * seen + hyper.rho * maps
        word, found, match = look(maps, pixels, words, mask, hyper)
        return (maps, word, found), match

    (maps, word, _), later = lax.scan(step, (maps, word, found), None, rounds)
    return jnp.concatenate([first[None], later]), maps, word


def word_weight(memory: Memory, word_id: Int[Array, "B W"], hyper: Hyper) -> Float[Array, "B W"]:
    """Weigh words by their history: *equation 7*; in [floor, 1], 1/2 if never seen, 0 if masked."""
    real = (word_id > 0).astype(jnp.float32)
    if not hyper.history:
        return real
    gap, seen = memory["gap"], memory["seen"] > 0
    mean = contrastive.masked_mean(gap, seen)
    spread = jnp.sqrt(contrastive.masked_mean((gap - mean) ** 2, seen) + 1e-6)
    weight = jnp.where(seen, jax.nn.sigmoid((gap - mean) / spread), 0.5)
    return jnp.maximum(weight, hyper.floor)[word_id % hyper.table] * real


def remember(
    memory: Memory, gap: Float[Array, "B K"], word_id: Int[Array, "B K"], hyper: Hyper
) -> Memory:
    """Move each word's entry towards the mean gap of this batch; words not drawn stay."""
    slot, real = (word_id % hyper.table).ravel(), (word_id > 0).astype(jnp.float32).ravel()
    empty = jnp.zeros(hyper.table)
    count = empty.at[slot].add(real)
    mean = empty.at[slot].add(real * gap.ravel()) / jnp.maximum(count, 1)
    moved = hyper.decay * memory["gap"] + (1 - hyper.decay) * mean
    gap = jnp.where(count > 0, jnp.where(memory["seen"] > 0, moved, mean), memory["gap"])
    return lax.stop_gradient({"gap": gap, "seen": memory["seen"] + count})


def similarity(
    params: Params,
    memory: Memory,
    images: Features,
    texts: Features,
    hyper: Hyper,
    axis: str | None = None,
) -> dict[str, Float[Array, "I T"]]:
    """Compare all images with all texts.

    `global` is the cosine; `local` the weighted match of all words (*equation 8*, round 0); `both`
    the sum of the two at the temperatures of the loss.
    """

    def score(pixels: Array, text: tuple[Words, Array]) -> Array:
        return contrastive.masked_mean(
            read(ImageSide(pixels), text[0], (), hyper, 0)[0][0], text[1]
        )

    words = Words(contrastive.l2_normalise(texts.local), texts.word_id)
    said = words, word_weight(memory, texts.word_id, hyper)
    local = contrastive.score_all_pairs(
        score, contrastive.l2_normalise(images.local), said, hyper.tile
    )
    cosines = contrastive.cosine_similarity(images.pooled, texts.pooled)
    both = contrastive.logit_scale(params["log_scale"]) * cosines + local / hyper.tau_local
    return {"global": cosines, "local": local, "both": both}


def heatmap(
    params: Params, memory: Memory, images: Features, texts: Features, hyper: Hyper
) -> tuple[Float[Array, "B W Q"], Float[Array, "B W"]]:
    """Map each word on its image after all rounds, on the fine grid if there is one; with `a_n`."""
    words = Words(contrastive.l2_normalise(texts.local), texts.word_id)
    grids = (images.grid, images.fine_grid)
    every = jax.vmap(lambda image, text: read(image, text, grids, hyper, hyper.rounds)[1:])
    return every(image_side(images), words)


def loss(
    params: Params,
    memory: Memory,
    images: Features,
    texts: Features,
    extra: dict[str, Any],
    *,
    key: PRNGKeyArray,
    step: Array,
    hyper: Hyper,
    axis: str | None = None,
) -> tuple[Float[Array, ""], tuple[Metrics, Memory]]:
    """Contrast the pairs of the whole batch globally and locally, round by round: *equation 10*."""
    every = contrastive.all_gather(texts, axis)
    weight = word_weight(memory, every.word_id, hyper)
    chosen = contrastive.sample_without_replacement(weight, key, min(hyper.words, weight.shape[1]))
    weight = jnp.take_along_axis(weight, chosen, 1)
    part = weight / jnp.maximum(weight.sum(-1, keepdims=True), 1e-6)
    sights, words, share = prepare(images, every, texts, chosen, extra, step, hyper, axis)
    begun = (jnp.arange(hyper.rounds + 1) == 0) | (step >= hyper.start)
    omega = begun * hyper.gamma ** jnp.arange(hyper.rounds, -1, -1)
    omega = omega * begun.sum() / omega.sum()
    report, word, gap = first_round(sights, words, share, part, hyper, axis)
    metrics = {"loss_report": report, "loss_word": word}
    local = omega[0] * (hyper.weight_report * report + hyper.weight_word * word)
    if hyper.rounds:
        reports, words_ = later_rounds(sights, words, images, part, hyper, axis)
        metrics |= {"loss_report_last": reports[-1], "loss_word_last": words_[-1]}
        local += omega[1:] @ (hyper.weight_report * reports + hyper.weight_word * words_)
    memory = remember(memory, gap, words.word_id, hyper)
    cosines = contrastive.cosine_similarity(
        contrastive.all_gather(images.pooled, axis), every.pooled
    )
    total = sum(contrastive.info_nce(contrastive.logit_scale(params["log_scale"]) * cosines)) / 2
    return hyper.weight_global * total + local, (metrics | {"loss_global": total}, memory)


def prepare(
    images: Features,
    every: Features,
    texts: Features,
    chosen: Int[Array, "T K"],
    extra: dict[str, Any],
    step: Array,
    hyper: Hyper,
    axis: str | None,
) -> tuple[tuple[ImageSide, Int[Array, "b W"]], Words, Float[Array, ""]]:
    """Take this device's images with the words of their reports, of all texts the chosen words
    [T K D], and the share of the averaged model.
    """
    pick = chosen[..., None]
    sight = image_side(images)
    local = jnp.take_along_axis(contrastive.l2_normalise(every.local), pick, 1)
    words = Words(local, jnp.take_along_axis(every.word_id, chosen, 1))
    share = jnp.zeros(())
    if hyper.progress == "ema":
        seen, said = extra["teacher"]
        past = jnp.take_along_axis(
            contrastive.l2_normalise(contrastive.all_gather(said.local, axis)), pick, 1
        )
        sight, words = (
            sight._replace(past=contrastive.l2_normalise(seen.local)),
            words._replace(past=past),
        )
        share = hyper.share * jnp.minimum(step / hyper.ramp, 1.0)
    return (sight, texts.word_id), words, share


def has_word(ids: Int[Array, " W"], text: Words) -> Bool[Array, " K"]:
    """Say which words of a text are among the words `ids` of an image's report."""
    return (text.word_id[:, None] == ids[None, :]).any(-1)


def first_round(
    sights: tuple[ImageSide, Int[Array, "b W"]],
    words: Words,
    share: Float[Array, ""],
    part: Float[Array, "T K"],
    hyper: Hyper,
    axis: str | None,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, "T K"]]:
    """Contrast every word over all images: report loss, word loss, and by how much each word fits
    its own image better than the others. There is no [T I K] anywhere.
    """
    number = contrastive.global_indices(len(sights[1]), axis)

    def score(image: tuple[ImageSide, Array], text: Words) -> tuple[Array, Array]:
        match = read(image[0]._replace(fine=None), text, (), hyper, 0, share)[0][0]
        return has_word(image[1], text), match

    def block(some: tuple[Words, Array, Array]) -> tuple[Array, ...]:
        text, which, part = some
        same, match = jax.vmap(jax.vmap(score, (0, None)), (None, 0))(sights, text)  # [t b K]
        own = (which[:, None] == number)[..., None]
        allowed = own | ~same | (hyper.negatives == "all")
        total = contrastive.masked_logsumexp(match / hyper.tau_local, allowed, 1)
        sums = [jnp.sum(match * which, 1) for which in (own, allowed & ~own)]
        return jnp.einsum("tbk,tk->tb", match, part), total, *sums, jnp.sum(allowed & ~own, 1)

    scores, *parts = contrastive.map_tiles(block, (words, jnp.arange(len(part)), part), hyper.tile)
    scores = contrastive.all_gather(scores.T, axis)
    total, mine, rest, count = contrastive.all_gather(
        [x[None] for x in parts], axis
    )  # [N T K], by device
    mine, total = mine.sum(0), jax.nn.logsumexp(total, 0)
    word = jnp.sum((total - mine / hyper.tau_local) * part, -1).mean()
    gap = mine - rest.sum(0) / jnp.maximum(count.sum(0), 1)
    return sum(contrastive.info_nce(scores / hyper.tau_local)), word, gap


def later_rounds(
    sights: tuple[ImageSide, Int[Array, "b W"]],
    words: Words,
    images: Features,
    part: Float[Array, "T K"],
    hyper: Hyper,
    axis: str | None,
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Contrast rounds 1..T over a few candidates each: report and word loss of each round."""
    count, first = (
        min(hyper.candidates, len(part)),
        contrastive.global_indices(len(sights[1]), axis)[0],
    )
    grids = (images.grid, images.fine_grid)

    def score(image: tuple[ImageSide, Array], text: Words) -> tuple[Array, Array]:
        sight, text = image[0]._replace(past=None), text._replace(past=None)
        match = read(sight, text, grids, hyper, hyper.rounds)[0][1:]
        return has_word(image[1], text), match.T

    near = contrastive.score_nearby_pairs(
        score, sights, words, candidates=count, first=first, tile=hyper.tile
    )
    same, match = contrastive.by_text(
        contrastive.all_gather(near, axis)
    )  # candidate 0 of a text is its own image
    allowed = (jnp.arange(count) == 0)[:, None] | ~same | (hyper.negatives == "all")
    return contrastive.contrast_near(match / hyper.tau_local, allowed, part)
