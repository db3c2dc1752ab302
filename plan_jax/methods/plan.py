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
(2) word importance     `a_n = gate_n(softmax-mean_p S_np)`, gate = sigmoid of the standardised value
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

What failed in trials and is therefore not done: word-region contrast with regions of the word's own
image only (solved without looking), and choosing words by the importance (2) of their own pair
(gives the pairing away). In round 0 all images of the batch are candidates; in later rounds
`candidates` of them, since a fine map costs more.
`progress="ema"` is the other reading of "iteration", over training time: S is mixed with that of a
moving average of the whole model (config.ema), with a share that grows to `share`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from plan_jax import align
from plan_jax.types import Features, Memory, Metrics, Params

PAPER = "arXiv 2502.18047"
NEEDS: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hyper:
    """All constants; every one is ours, since the paper's are not public."""

    rounds: int = 1  # T, of refinement; 0 is one soft attention
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
    negatives: str = "token"  # "token": same word, no negative; "all"
    progress: str = "rounds"  # or "ema"
    share: float = 0.5  # of the averaged model's S at the end of the ramp
    ramp: int = 1000  # steps of the ramp
    weight_global: float = 2.0
    weight_report: float = 1.0
    weight_word: float = 1.0
    tile: int = 4  # texts (round 0) or images (later rounds) at a time


class Look(NamedTuple):
    """What one look at a similarity map gives: equations 2-5."""

    word: Float[Array, " K"]
    pixel: Float[Array, " P"]
    region: Float[Array, "K P"]
    found: Float[Array, "K D"]
    match: Float[Array, " K"]


class Sight(NamedTuple):
    """The pixels of one image, unit length, coarse and fine, and those of the averaged model."""

    pixels: Float[Array, "P D"]
    fine: Float[Array, "Q D"] | None = None
    past: Float[Array, "P D"] | None = None


class Words(NamedTuple):
    """The words of one text, unit length, with their ids, and those of the averaged model."""

    words: Float[Array, "K D"]
    word_id: Int[Array, " K"]
    past: Float[Array, "K D"] | None = None


def init(key: PRNGKeyArray, dim: int, hyper: Hyper) -> tuple[Params, Memory]:
    """Make the learned temperature, and an empty history of words: Float[table] each."""
    memory = {"gap": jnp.zeros(hyper.table), "seen": jnp.zeros(hyper.table)}
    return {"log_scale": jnp.log(1 / hyper.tau)}, memory


def importance(
    maps: Float[Array, "K P"], mask: Bool[Array, " K"], hyper: Hyper
) -> tuple[Float[Array, " K"], Float[Array, " P"]]:
    """Gate words and pixels by how strongly they fire: *equations 2, 3*; no gradient."""
    if not hyper.gates:
        return 0.5 * mask, jnp.full(maps.shape[-1], 0.5)
    maps = lax.stop_gradient(maps)
    word = align.soft_max(maps, hyper.tau_importance)
    pixel = align.soft_max(maps, hyper.tau_importance, mask[:, None], 0)
    everywhere = jnp.ones(pixel.shape, bool)
    return align.gate(word, mask, hyper.kappa), align.gate(pixel, everywhere, hyper.kappa)


def look(
    maps: Float[Array, "K P"], pixels: Float[Array, "P D"], words: Float[Array, "K D"],
    mask: Bool[Array, " K"], hyper: Hyper,
) -> Look:  # fmt: skip
    """Find each word's soft region and how well it matches: *equations 2-5*."""
    word, pixel = importance(maps, mask, hyper)
    damped = maps * (4 * word[:, None] * pixel)
    region = jax.nn.softmax(damped / hyper.tau_region, -1)
    found = align.unit(region @ pixels)
    return Look(word, pixel, region, found, jnp.sum(words * found, -1) * mask)


def read(
    image: Sight, text: Words, grids: tuple, hyper: Hyper, rounds: int, share: Array | float = 0.0
) -> tuple[Float[Array, "N K"], Float[Array, "K Q"], Look]:
    """Read one text on one image: matches of rounds 0..T, the last map and the last look.

    `grids` are the coarse and the fine one (None: rounds stay on the coarse map, and Q is P);
    `share` is how much the averaged model's map counts.
    """
    words, mask = text.words, text.word_id > 0
    maps = words @ image.pixels.T
    if image.past is not None:
        maps = (1 - share) * maps + share * (text.past @ image.past.T)
    maps = maps * mask[:, None]
    pixels = image.pixels
    first = look(maps, pixels, words, mask, hyper)
    if image.fine is not None:
        maps, pixels = enlarge(maps, *grids), image.fine
    if not rounds:
        return first.match[None], maps, first

    def step(carry: tuple, _: None) -> tuple[tuple, Array]:
        maps, last = carry
        query = align.unit(words + hyper.eta * last.word[:, None] * last.found)
        seen = query @ pixels.T * mask[:, None]
        maps = (1 - hyper.rho) * seen + hyper.rho * maps
        now = look(maps, pixels, words, mask, hyper)
        return (maps, now), now.match

    start = first._replace(
        pixel=jnp.zeros(maps.shape[-1]), region=jnp.zeros(maps.shape, first.region.dtype)
    )
    (maps, last), later = lax.scan(step, (maps, start), None, rounds)
    return jnp.concatenate([first.match[None], later]), maps, last


def enlarge(
    maps: Float[Array, "K P"], grid: tuple[int, int], fine_grid: tuple[int, int]
) -> Float[Array, "K Q"]:
    """Resize maps bilinearly from one grid to a finer one."""
    shape = (maps.shape[0], *fine_grid)
    return jax.image.resize(maps.reshape(-1, *grid), shape, "bilinear").reshape(shape[0], -1)


def word_weight(
    memory: Memory, word_id: Int[Array, "B W"], hyper: Hyper
) -> Float[Array, "B W"]:
    """Weigh words by their history: *equation 7*; in [floor, 1], 1/2 if never seen, 0 if masked."""
    real = word_id > 0
    if not hyper.history:
        return real.astype(jnp.float32)
    gap, seen = memory["gap"], memory["seen"] > 0
    mean = align.masked_mean(gap, seen)
    spread = jnp.sqrt(align.masked_mean((gap - mean) ** 2, seen) + 1e-6)
    weight = jnp.where(seen, jax.nn.sigmoid((gap - mean) / spread), 0.5)
    return jnp.maximum(weight, hyper.floor)[word_id % hyper.table] * real


def choose(
    weight: Float[Array, "B W"], key: PRNGKeyArray, hyper: Hyper
) -> Int[Array, "B K"]:
    """Draw K words of each text without replacement, the likelier the more they weigh.

    By Gumbel's trick (*Kool et al., arXiv 1903.06059*). Only the text decides: what an image shows
    must not, or the choice would give the pairing away.
    """
    noisy = jnp.log(jnp.maximum(weight, 1e-9)) + jax.random.gumbel(key, weight.shape)
    count = min(hyper.words, weight.shape[1])
    return lax.top_k(jnp.where(weight > 0, noisy, align.NEG), count)[1]


def remember(
    memory: Memory, gap: Float[Array, "B K"], word_id: Int[Array, "B K"], hyper: Hyper
) -> Memory:
    """Move each word's entry towards the mean gap of this batch; words not drawn stay."""
    slot, real = (word_id % hyper.table).ravel(), (word_id > 0).astype(jnp.float32).ravel()
    empty = jnp.zeros(hyper.table)
    count = empty.at[slot].add(real)
    mean = empty.at[slot].add(real * gap.ravel()) / jnp.maximum(count, 1)
    moved = hyper.decay * memory["gap"] + (1 - hyper.decay) * mean
    moved = jnp.where(memory["seen"] > 0, moved, mean)
    gap = jnp.where(count > 0, moved, memory["gap"])
    return lax.stop_gradient({"gap": gap, "seen": memory["seen"] + count})


def scale_of(params: Params) -> Float[Array, ""]:
    """Give the factor on global cosines: 1 / temperature, at most 50."""
    return jnp.exp(jnp.minimum(params["log_scale"], jnp.log(50.0)))


def similarity(
    params: Params, memory: Memory, images: Features, texts: Features, hyper: Hyper,
    axis: str | None = None,
) -> dict[str, Float[Array, "I T"]]:  # fmt: skip
    """Compare all images with all texts.

    `global` is the cosine; `local` the weighted match of all words (*equation 8*, round 0); `both`
    the sum of the two at the temperatures of the loss.
    """
    weight = word_weight(memory, texts.word_id, hyper)

    def score(pixels: Array, words: Words) -> Array:
        return read(Sight(pixels), words, (), hyper, 0)[0][0]

    words = Words(align.unit(texts.local), texts.word_id)
    match = align.all_pairs(score, align.unit(images.local), words, hyper.tile)
    local = align.masked_mean(match, weight, -1)
    cosines = align.cosines(images.pooled, texts.pooled)
    both = scale_of(params) * cosines + local / hyper.tau_local
    return {"global": cosines, "local": local, "both": both}


def heatmap(
    params: Params, memory: Memory, images: Features, texts: Features, hyper: Hyper
) -> tuple[Float[Array, "B W Q"], Float[Array, "B W"]]:
    """Map each word on its image after all rounds (on the fine grid if there is one), with `a_n`."""
    fine = None if images.fine is None else align.unit(images.fine)
    sights = Sight(align.unit(images.local), fine)
    words = Words(align.unit(texts.local), texts.word_id)
    grids = (images.grid, images.fine_grid)
    _, maps, last = jax.vmap(lambda s, w: read(s, w, grids, hyper, hyper.rounds))(sights, words)
    return maps, last.word


def contrast(
    match: Float[Array, "T C K"], allowed: Bool[Array, "T C K"], own: Int[Array, " T"],
    to_image: Int[Array, "I C"], weight: Float[Array, "T K"], hyper: Hyper,
) -> tuple[Float[Array, ""], Float[Array, ""]]:  # fmt: skip
    """Contrast reports and words over C candidate images each: *equations 8, 9*.

    `own` is the place of a text's own image among its candidates; entry [i, c] of `to_image` the
    flat place in [T C] of the c-th text that image i is a candidate of, its own at `own[i]`.
    """
    share = weight / jnp.maximum(weight.sum(-1, keepdims=True), 1e-6)
    report = jnp.sum(match * share[:, None], -1) / hyper.tau_local
    by_text = align.cross_entropy(report, own)
    by_image = align.cross_entropy(report.ravel()[to_image], own)
    logits = jnp.moveaxis(match, 1, 2) / hyper.tau_local
    target = jnp.broadcast_to(own[:, None], logits.shape[:2])
    by_word = align.cross_entropy(logits, target, jnp.moveaxis(allowed, 1, 2))
    return by_text.mean() + by_image.mean(), jnp.sum(by_word * share, -1).mean()


def negatives(own: Bool[Array, "T C"], same: Bool[Array, "T C K"], hyper: Hyper) -> Array:
    """Say which candidates a word is contrasted with, Bool[T C K]: its own and true negatives."""
    return own[..., None] | ~same if hyper.negatives == "token" else jnp.ones_like(same)


def loss(
    params: Params, memory: Memory, images: Features, texts: Features, extra: dict[str, Array], *,
    key: PRNGKeyArray, step: Array, hyper: Hyper, axis: str | None = None,
) -> tuple[Float[Array, ""], tuple[Metrics, Memory]]:  # fmt: skip
    """Contrast the pairs of the whole batch globally and locally, round by round: *equation 10*."""
    every = align.gather(texts, axis)
    weight = word_weight(memory, every.word_id, hyper)
    chosen = choose(weight, key, hyper)
    weight = jnp.take_along_axis(weight, chosen, 1)
    sights, words, share = prepare(images, every, texts, chosen, extra, step, hyper, axis)
    size, (own, same, match) = len(weight), first_round(sights, words, share, hyper, axis)
    allowed = negatives(own, same, hyper)
    place = jnp.arange(size)
    flat = place[None, :] * size + place[:, None]
    omega = hyper.gamma ** jnp.arange(hyper.rounds, -1, -1)
    omega = omega / omega.mean()
    report, word = contrast(match, allowed, place, flat, weight, hyper)
    metrics = {"loss_report": report, "loss_word": word}
    local = omega[0] * (hyper.weight_report * report + hyper.weight_word * word)
    if hyper.rounds:
        reports, words_ = later_rounds(sights, words, images, weight, hyper, axis)
        metrics |= {"loss_report_last": reports[-1], "loss_word_last": words_[-1]}
        local += omega[1:] @ (hyper.weight_report * reports + hyper.weight_word * words_)
    others = (allowed & ~own[..., None]).astype(jnp.float32)
    mine = jnp.take_along_axis(match, place[:, None, None], 1)[:, 0]
    memory = remember(memory, mine - align.masked_mean(match, others, 1), words.word_id, hyper)
    cosines = align.cosines(align.gather(images.pooled, axis), every.pooled)
    total = sum(align.info_nce(scale_of(params) * cosines)) / 2
    metrics |= {"loss_global": total}
    return hyper.weight_global * total + local, (metrics, memory)


def prepare(
    images: Features, every: Features, texts: Features, chosen: Int[Array, "T K"],
    extra: dict[str, Array], step: Array, hyper: Hyper, axis: str | None,
) -> tuple[tuple[Sight, Int[Array, "b W"]], Words, Float[Array, ""]]:  # fmt: skip
    """Take what the rounds need: this device's images with the words of their reports, and of all
    texts the chosen words, [T K D]; and the share of the averaged model.
    """
    pick = chosen[..., None]
    fine = None if images.fine is None else align.unit(images.fine)
    sight = Sight(align.unit(images.local), fine)
    local = jnp.take_along_axis(align.unit(every.local), pick, 1)
    words = Words(local, jnp.take_along_axis(every.word_id, chosen, 1))
    share = jnp.zeros(())
    if hyper.progress == "ema":
        seen, said = extra["teacher"]
        past = jnp.take_along_axis(align.unit(align.gather(said.local, axis)), pick, 1)
        sight, words = sight._replace(past=align.unit(seen.local)), words._replace(past=past)
        share = hyper.share * jnp.minimum(step / hyper.ramp, 1.0)
    return (sight, texts.word_id), words, share


def first_round(
    sights: tuple[Sight, Array], words: Words, share: Array, hyper: Hyper, axis: str | None
) -> tuple[Bool[Array, "T I"], Bool[Array, "T I K"], Float[Array, "T I K"]]:
    """Try every word on every image: whether it is its own, has the same word, and the match."""

    def score(image: tuple[Sight, Array], text: Words) -> tuple[Array, Array]:
        sight, ids = image
        same = (text.word_id[:, None] == ids[None, :]).any(-1)
        return same, read(sight._replace(fine=None), text, (), hyper, 0, share)[0][0]

    same, match = align.gather(align.all_pairs(score, sights, words, hyper.tile), axis)
    own = jnp.eye(len(match), dtype=bool)
    return own, jnp.swapaxes(same, 0, 1), jnp.swapaxes(match, 0, 1)


def later_rounds(
    sights: tuple[Sight, Array], words: Words, images: Features, weight: Float[Array, "T K"],
    hyper: Hyper, axis: str | None,
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:  # fmt: skip
    """Contrast rounds 1..T over a few candidates each: report and word loss of each round."""
    size, here = len(weight), sights[1].shape[0]
    count = min(hyper.candidates, size)
    first = 0 if axis is None else lax.axis_index(axis) * here
    grids = (images.grid, images.fine_grid)

    def score(image: tuple[Sight, Array], text: Words) -> tuple[Array, Array]:
        sight, ids = image
        same = (text.word_id[:, None] == ids[None, :]).any(-1)
        sight = sight._replace(past=None)
        return same, read(sight, text._replace(past=None), grids, hyper, hyper.rounds)[0][1:]

    near = align.near_pairs(
        score, sights, words, candidates=count, first=first, tile=hyper.tile
    )
    place, back = jnp.arange(size)[:, None], jnp.arange(count)[None, :]
    image_of = (place + back) % size  # candidate c of text j is image j + c
    same, match = align.gather(near, axis)  # by image: entry c is text i - c
    same, match = same[image_of, back], match[image_of, back]
    allowed = negatives(jnp.broadcast_to(back == 0, (size, count)), same, hyper)
    flat = (place - back) % size * count + back
    own = jnp.zeros(size, jnp.int32)

    def one(match: Array) -> tuple[Array, Array]:
        return contrast(match, allowed, own, flat, weight, hyper)

    return jax.vmap(one, 2)(match)
