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

What failed in trials and is therefore not done: word-region contrast with regions of the word's own
image only (solved without looking), and choosing words by the importance (2) of their own pair
(gives the pairing away). In round 0 all images of the batch are candidates; in later rounds
`candidates` of them, since a fine map costs more.
`progress="ema"` is the other reading of "iteration", over training time: S is mixed with that of a
moving average of the whole model (config.ema), with a share that grows to `share`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

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
) -> tuple[Float[Array, " K"], Float[Array, "K D"], Float[Array, " K"]]:  # fmt: skip
    """Give each word's importance, its region's feature and their match: *equations 2-5*."""
    word, pixel = importance(maps, mask, hyper)
    damped = maps * (4 * word[:, None] * pixel)
    region = jax.nn.softmax(damped / hyper.tau_region, -1)
    found = align.unit(region @ pixels)
    return word, found, jnp.sum(words * found, -1) * mask


def read(
    image: Sight, text: Words, grids: tuple, hyper: Hyper, rounds: int, share: Array | float = 0.0
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
        maps, pixels = align.enlarge(maps, *grids), image.fine

    def step(carry: tuple[Array, Array, Array], _: None) -> tuple[tuple, Array]:
        maps, word, found = carry
        query = align.unit(words + hyper.eta * word[:, None] * found)
        seen = query @ pixels.T * mask[:, None]
        maps = (1 - hyper.rho) * seen + hyper.rho * maps
        word, found, match = look(maps, pixels, words, mask, hyper)
        return (maps, word, found), match

    (maps, word, _), later = lax.scan(step, (maps, word, found), None, rounds)
    return jnp.concatenate([first[None], later]), maps, word


def word_weight(memory: Memory, word_id: Int[Array, "B W"], hyper: Hyper) -> Float[Array, "B W"]:
    """Weigh words by their history: *equation 7*; in [floor, 1], 1/2 if never seen, 0 if masked."""
    real = word_id > 0
    if not hyper.history:
        return real.astype(jnp.float32)
    gap, seen = memory["gap"], memory["seen"] > 0
    mean = align.masked_mean(gap, seen)
    spread = jnp.sqrt(align.masked_mean((gap - mean) ** 2, seen) + 1e-6)
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
    """Map each word on its image after all rounds, on the fine grid if there is one; with `a_n`."""
    fine = None if images.fine is None else align.unit(images.fine)
    sights = Sight(align.unit(images.local), fine)
    words = Words(align.unit(texts.local), texts.word_id)
    grids = (images.grid, images.fine_grid)
    _, maps, word = jax.vmap(lambda s, w: read(s, w, grids, hyper, hyper.rounds))(sights, words)
    return maps, word


def loss(
    params: Params, memory: Memory, images: Features, texts: Features, extra: dict[str, Any], *,
    key: PRNGKeyArray, step: Array, hyper: Hyper, axis: str | None = None,
) -> tuple[Float[Array, ""], tuple[Metrics, Memory]]:  # fmt: skip
    """Contrast the pairs of the whole batch globally and locally, round by round: *equation 10*."""
    every = align.gather(texts, axis)
    weight = word_weight(memory, every.word_id, hyper)
    chosen = align.draw(weight, key, min(hyper.words, weight.shape[1]))
    weight = jnp.take_along_axis(weight, chosen, 1)
    sights, words, share = prepare(images, every, texts, chosen, extra, step, hyper, axis)
    size, (own, same, match) = len(weight), first_round(sights, words, share, hyper, axis)
    allowed = own[..., None] | ~same | (hyper.negatives == "all")
    place = jnp.arange(size)
    flat = place[None, :] * size + place[:, None]
    omega = hyper.gamma ** jnp.arange(hyper.rounds, -1, -1)
    omega = omega / omega.mean()
    report, word = align.contrast(match, allowed, place, flat, weight, hyper.tau_local)
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
    return hyper.weight_global * total + local, (metrics | {"loss_global": total}, memory)


def prepare(
    images: Features, every: Features, texts: Features, chosen: Int[Array, "T K"],
    extra: dict[str, Any], step: Array, hyper: Hyper, axis: str | None,
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
    sights: tuple[Sight, Int[Array, "b W"]], words: Words, share: Float[Array, ""], hyper: Hyper,
    axis: str | None,
) -> tuple[Bool[Array, "T I"], Bool[Array, "T I K"], Float[Array, "T I K"]]:  # fmt: skip
    """Try every word on every image: whether it is its own, has the same word, and the match."""

    def score(image: tuple[Sight, Array], text: Words) -> tuple[Array, Array]:
        sight, ids = image
        same = (text.word_id[:, None] == ids[None, :]).any(-1)
        return same, read(sight._replace(fine=None), text, (), hyper, 0, share)[0][0]

    same, match = align.gather(align.all_pairs(score, sights, words, hyper.tile), axis)
    own = jnp.eye(len(match), dtype=bool)
    return own, jnp.swapaxes(same, 0, 1), jnp.swapaxes(match, 0, 1)


def later_rounds(
    sights: tuple[Sight, Int[Array, "b W"]], words: Words, images: Features,
    weight: Float[Array, "T K"], hyper: Hyper, axis: str | None,
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

    near = align.near_pairs(score, sights, words, candidates=count, first=first, tile=hyper.tile)
    place, back = jnp.arange(size)[:, None], jnp.arange(count)[None, :]
    image_of = (place + back) % size  # candidate c of text j is image j + c
    same, match = align.gather(near, axis)  # by image: entry c is text i - c
    same, match = same[image_of, back], match[image_of, back]
    allowed = (back == 0)[..., None] | ~same | (hyper.negatives == "all")
    flat = (place - back) % size * count + back
    own = jnp.zeros(size, jnp.int32)

    def one(match: Array) -> tuple[Array, Array]:
        return align.contrast(match, allowed, own, flat, weight, hyper.tau_local)

    return jax.vmap(one, 2)(match)
