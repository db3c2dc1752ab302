"""PLAN: progressive local alignment of words and pixels.

PAPER: Yan, Yang, Bai, Liang, Progressive Local Alignment for Medical Multimodal Pre-training,
arXiv 2502.18047. Only its abstract and summaries by others are public, so this is a PLAN-style
reconstruction, not a re-implementation checked against the authors' code.

Established (abstract): soft regions instead of hard boundaries; a contrast of word-pixel relations;
a progressive strategy that refines these relations over iterations. Established by summaries only:
a learnable map g of pixels to the words' space; a word-pixel similarity matrix S; importance of
words and of pixels, from the rows and columns of S, to damp noise; a region feature for each word,
contrasted with selected words; S updated in each iteration with its history.

Ours: the equations. Each is written out beside the function that computes it:

    (1) first map            align                   (6) refinement in round t   align
    (2) word importance      importance_gates        (7) history of words        history_weights
    (3) pixel importance     importance_gates        (8) report contrast         plan_contrast.py
    (4) soft region          ground_words            (9) word contrast           plan_contrast.py
    (5) region and match     ground_words           (10) loss                    loss
                                                    (11) guided map              compute_affinity

Symbols: z unit pixels after g, f those of a finer map, u unit words; n word, p pixel, i image,
j text, t round of 0..T; S a map of each word over the pixels.

A round refines S as a radiologist reads: a glance at the whole image, then a closer look. Round 0
compares the words with the coarse map; each later round compares them with the finer map, if the
encoder has one, and mixes the result with the map so far.

Failed in trials: a word-region contrast with regions of the word's own image only (solved without
looking at the image); selecting words by the importance (2) of their own pair (gives the pairing
away). `progress="ema"` is the other reading of "iteration", over training time: in round 0, S is
mixed with that of a moving average of the whole model (config.ema_decay).

The journal's ingredients, as options that are off by default, after the abstract of MedAligner
(IEEE TIP 34:7321, 2025), very likely PLAN's journal version. Abstract only, form ours:

    (12) sparse region       ground_words          (14) their loss           concise_loss
    (13) concise reports     plan_concise.py       (15) alike reports        plan_contrast.py
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from plan_jax.layers.resize import resize_bilinear
from plan_jax.layers.sparsemax import sparsemax
from plan_jax.methods import contrastive, plan_concise, plan_contrast
from plan_jax.methods.plan_contrast import PairScores
from plan_jax.methods.ranges import COUNT, FRACTION, STEPS, TEMPERATURE, WEIGHT, Range, check_hyper
from plan_jax.types import Features, Memory, MethodContext, Metrics, Params, TextBatch, UserError

PAPER = (
    "Yan, Yang, Bai, Liang, Progressive Local Alignment for Medical Multimodal Pre-training, arXiv "
    "2502.18047; reconstructed here from what is public, without the authors' code"
)
REQUIRES: tuple[str, ...] = ()
IMAGE_FEATURES = ("pooled", "local", "fine", "guide")
TEXT_FEATURES = ("pooled", "local", "word_id")
GUIDE_ROWS = 4  # rows of cells that are smoothed by one product (11)
MAX_LOGIT_SCALE = 50.0  # of the learned factor on cosines; CLIP's bound is 100


@dataclass(frozen=True)
class Hyper:
    """All constants; every one is ours, since the paper's are not public."""

    rounds: int = 1  # T, of refinement; 0 is one soft attention
    refinement_start_step: int = 0  # step from which rounds >= 1 count in the loss
    tau: float = 0.1  # initial temperature of the global contrast; it is learned
    contrast: Literal["softmax", "sigmoid"] = "softmax"  # global; sigmoid: SigLIP's, without tau
    tau_local: float = 0.1  # of the report and word contrasts (8), (9)
    tau_region: float = 0.1  # of the softmax over pixels (4)
    tau_importance: float = 0.1  # of the soft maxima (2), (3)
    kappa: float = 1.0  # softness of the gates (2), (3)
    use_gates: bool = True  # importance of words and pixels; False: neutral, 1/2 each
    eta: float = 0.0  # pull of a word towards its region (6)
    rho: float = 0.5  # share of the previous map in S (6)
    gamma: float = 0.5  # ratio of the weights of successive rounds (10)
    num_candidates: int = 8  # images that a word is contrasted over in rounds >= 1
    num_sampled_words: int = 12  # of a report, for the contrasts
    use_history: bool = True  # weights of words from training so far (7); False: all words alike
    history_decay: float = 0.99  # of the moving average (7)
    min_weight: float = 0.25  # of a word (7)
    pixel_dropout: float = 0.0  # share of pixels that training hides from the regions (4)
    regions: Literal["softmax", "sparsemax"] = "softmax"  # shares of pixels: (4), or sparse (12)
    guide_steps: int = 2  # of smoothing along the image's own affinities (11); not in training
    guide_round_steps: int = 0  # of the same in each round on the finer map (6), also in training
    guide_sigma: float = 2.0  # reach of a step, in cells of the map (11)
    tau_guide: float = 0.3  # of squared distances of unit pixels (11)
    tau_grey: float = 0.2  # of squared distances of grey values (11)
    history_size: int = 8192  # slots of the history; word ids are folded into it
    negatives: Literal["token", "all"] = "token"  # "token": images with the same word are none (9)
    report_negatives: Literal["all", "unlike"] = "all"  # "unlike": alike reports are none (15)
    report_alike: float = 0.95  # cosine above which two reports are alike (15)
    progress: Literal["rounds", "ema"] = "rounds"  # refinement in rounds, or over training time
    ema_share: float = 0.5  # lambda: share of the averaged model's S, at the end of the ramp
    ema_ramp_steps: int = 1000  # over which the share grows from 0
    weight_global: float = 2.0  # of the contrast of whole images and reports
    weight_report: float = 1.0  # of (8)
    weight_word: float = 1.0  # of (9)
    concise_start_step: int = 0  # step from which concise reports (13) count; 0: there are none
    concise_words: int = 12  # of a concise report
    weight_concise: float = 1.0  # of (14)
    tile_size: int = 4  # texts (round 0) or images (later rounds) at a time

    def __post_init__(self) -> None:
        check_hyper(
            self,
            rounds=Range(0, 16),  # with the range of gamma, gamma ** T fits a float32
            refinement_start_step=STEPS,
            tau=TEMPERATURE,
            tau_local=TEMPERATURE,
            tau_region=TEMPERATURE,
            tau_importance=TEMPERATURE,
            kappa=Range(1e-4, 1e9),
            eta=WEIGHT,
            rho=FRACTION,
            gamma=Range(0.01, 100),
            num_candidates=COUNT,
            num_sampled_words=COUNT,
            history_decay=FRACTION,
            min_weight=FRACTION,
            pixel_dropout=Range(0, 0.99),
            guide_steps=Range(0, 64),
            guide_round_steps=Range(0, 64),
            guide_sigma=Range(0.1, 16),
            tau_guide=Range(1e-3, 1e9),
            tau_grey=Range(1e-3, 1e9),
            history_size=Range(1, 2**24),
            report_alike=FRACTION,
            ema_share=FRACTION,
            ema_ramp_steps=STEPS._replace(low=1),
            weight_global=WEIGHT,
            weight_report=WEIGHT,
            weight_word=WEIGHT,
            concise_start_step=STEPS,
            concise_words=COUNT,
            weight_concise=WEIGHT,
            tile_size=COUNT,
        )
        if self.report_negatives == "unlike" and self.contrast == "sigmoid":
            raise UserError(
                "hyper.report_negatives is unlike, and hyper.contrast is sigmoid, which compares"
                " all pairs; set hyper.contrast to softmax"
            )
        if self.concise_start_step and not self.use_history:
            raise UserError(
                f"hyper.concise_start_step is {self.concise_start_step}, and hyper.use_history is"
                " False, so that no word weighs more than another; set hyper.use_history to True"
            )


class ImageSide(NamedTuple):
    """The image of a pair: unit pixels of the coarse map, and what else a use needs."""

    pixels: Float[Array, "P D"]
    fine_pixels: Float[Array, "Q D"] | None = None
    ema_pixels: Float[Array, "P D"] | None = None  # of the averaged model
    report_word_id: Int[Array, " W"] | None = None  # all words of the image's own report
    is_kept: Bool[Array, " P"] | None = None  # pixels that the regions may use; None: all
    is_fine_kept: Bool[Array, " Q"] | None = None
    guide: Float[Array, "Q G"] | None = None  # grey values of the finer map's cells


class TextSide(NamedTuple):
    """The text of a pair: unit words with their ids (0: padding)."""

    words: Float[Array, "K D"]
    word_id: Int[Array, " K"]
    ema_words: Float[Array, "K D"] | None = None  # of the averaged model


class RoundOutput(NamedTuple):
    """The values that one round computes from the map of K words."""

    importance: Float[Array, " K"]  # a_n
    regions: Float[Array, "K D"]  # r_n
    matches: Float[Array, " K"]  # C_n, 0 for padding


class Alignment(NamedTuple):
    """The words of a text aligned with the pixels of an image over N = T + 1 rounds."""

    matches: Float[Array, "N K"]  # C_n of each round
    maps: Float[Array, "K Q"]  # S after the last round; Q = P without a finer map
    importance: Float[Array, " K"]  # a_n of the last round


def init(key: PRNGKeyArray, context: MethodContext, hyper: Hyper) -> tuple[Params, Memory]:
    """Returns the learned scale of the global contrast, and an empty history of words.

    The sigmoid loss, if chosen, starts from its own scale and has a learned bias beside it.

    Raises:
      UserError: `progress` is "ema" and the run keeps no moving average.
    """
    if hyper.progress == "ema" and not context.ema_decay:
        raise UserError(
            "hyper.progress is ema, and config.ema_decay is 0; set config.ema_decay=0.99 or so"
        )
    # Two arrays, since the training step donates its buffers.
    memory = {name: jnp.zeros(hyper.history_size) for name in ("similarity_margin", "count")}
    params = {"log_scale": jnp.log(1 / hyper.tau)} | contrastive.init_sigmoid(hyper.contrast)
    return params, memory


# One pair: equations 1 to 6 ---------------------------------------------------------------------


def gate(x: Float[Array, "*N"], mask: Bool[Array, "*N"], kappa: float) -> Float[Array, "*N"]:
    """Computes the soft gate of *equations 2 and 3* over the last axis.

        gate(x)_n = sigmoid((x_n - mean x) / (kappa std x))

    Mean and standard deviation are over the real entries; a masked entry is 0. Standardising makes
    the gate independent of the scale of x; kappa -> inf gives 1/2 everywhere.
    """
    mean = contrastive.masked_mean(x, mask, -1)[..., None]
    variance = contrastive.masked_mean((x - mean) ** 2, mask, -1)[..., None]
    # The constant keeps the gate of a single real entry, whose variance is 0, at 1/2.
    return jax.nn.sigmoid((x - mean) / (kappa * jnp.sqrt(variance + 1e-8))) * mask


def importance_gates(
    maps: Float[Array, "K P"], mask: Bool[Array, " K"], hyper: Hyper
) -> tuple[Float[Array, " K"], Float[Array, " P"]]:
    """Computes the importance of words and of pixels: *equations 2 and 3*.

        (2)  a_n = gate(e)_n,  e_n = tau_importance log mean_p exp(S_np / tau_importance)
        (3)  b_p = gate(d)_p,  d_p = tau_importance log mean_n exp(S_np / tau_importance)

    The soft maxima e and d measure how strongly a word or a pixel responds anywhere; the gates
    compare them with those of the other words or pixels. Neither has a gradient.
    """
    if not hyper.use_gates:
        return 0.5 * mask, jnp.full(maps.shape[-1], 0.5)
    maps = lax.stop_gradient(maps)
    word_maximum = contrastive.soft_maximum(maps, hyper.tau_importance)
    pixel_maximum = contrastive.soft_maximum(maps, hyper.tau_importance, mask[:, None], 0)
    all_pixels = jnp.ones(pixel_maximum.shape, bool)
    word_importance = gate(word_maximum, mask, hyper.kappa)
    return word_importance, gate(pixel_maximum, all_pixels, hyper.kappa)


def ground_words(
    maps: Float[Array, "K P"],
    pixels: Float[Array, "P D"],
    words: Float[Array, "K D"],
    mask: Bool[Array, " K"],
    hyper: Hyper,
    is_kept: Bool[Array, " P"] | None = None,
) -> RoundOutput:
    """Computes each word's soft region in an image and their match: *equations 4, 5 and 12*.

        (4)   A_np = softmax_p(4 a_n b_p S_np / tau_region), over the pixels that are kept
        (5)   r_n = unit(sum_p A_np z_p),  C_n = <u_n, r_n>
        (12)  A_np = sparsemax_p(4 a_n b_p S_np / tau_region), with `regions="sparsemax"`

    The gates a and b are those of equations 2 and 3. Both are 1/2 for an average word and pixel, so
    with the factor 4 the product 4 a_n b_p is 1 there and S_np stays as it is. In (4) there is no
    boundary anywhere: every pixel has a share in A. In (12), *abstract only, form ours*, a pixel
    whose logit is at least 1 below the largest has none.
    """
    word_importance, pixel_importance = importance_gates(maps, mask, hyper)
    gated_maps = maps * (4 * word_importance[:, None] * pixel_importance)
    logits = gated_maps / hyper.tau_region
    if is_kept is not None:
        logits = jnp.where(is_kept, logits, contrastive.MASKED_LOGIT)
    shares = sparsemax if hyper.regions == "sparsemax" else jax.nn.softmax
    regions = contrastive.l2_normalise(shares(logits) @ pixels)
    return RoundOutput(word_importance, regions, jnp.sum(words * regions, -1) * mask)


def align(
    image: ImageSide,
    text: TextSide,
    grids: tuple[tuple[int, int] | None, ...],
    hyper: Hyper,
    rounds: int,
    ema_share: Array | float = 0.0,
) -> Alignment:
    """Aligns the words of one text with the pixels of one image: *equations 1 and 6*.

        (1)  S^0_np = <u_n, z_p>, and with `progress="ema"`
             S^0_np = (1 - lambda) <u_n, z_p> + lambda <u'_n, z'_p>
        (6)  q_n = unit(u_n + eta a_n r_n),  S^t_np = (1 - rho) <q_n, f_p> + rho S^(t-1)_np,
             then S^t <- S^t K^T, `guide_round_steps` times, on a finer map

    K are the affinities of equation 11. u' and z' are words and pixels of the averaged model.
    The importance a, regions r and matches C of a round follow from its map by equations 2 to 5.
    Rounds t >= 1 use the pixels f of the finer map, to which S^0 is resized; without one, f = z.

    Args:
      image, text: the sides of the pair.
      grids: sizes of the coarse and the finer map; not read if the image has no fine pixels.
      hyper: constants.
      rounds: T.
      ema_share: lambda.
    """
    words, mask, pixels = text.words, text.word_id > 0, image.pixels

    # Round 0 looks at the coarse map: every cell has a large field of view, and the map is cheap
    # enough to be compared with every text of the batch.
    maps = words @ pixels.T
    if image.ema_pixels is not None:
        maps = (1 - ema_share) * maps + ema_share * (text.ema_words @ image.ema_pixels.T)
    maps = maps * mask[:, None]  # padding must not count in the importance of pixels
    first = ground_words(maps, pixels, words, mask, hyper, image.is_kept)

    # From here on S lives on the finer map. The coarse map is resized, not recomputed: it is the
    # prior of where to look, and the history of all later rounds.
    is_kept, affinity = image.is_kept, None
    if image.fine_pixels is not None:
        maps, pixels = upsample_maps(maps, *grids), image.fine_pixels
        is_kept = image.is_fine_kept
        if hyper.guide_round_steps and rounds and image.guide is not None:
            affinity = compute_affinity(pixels, image.guide, grids[1], hyper)

    # `lax.scan` compiles one round whatever T. The carry is what a round hands to the next: its
    # map, and the importance and regions that pull the words.
    def refine(carry: tuple[Array, Array, Array], _: None) -> tuple[tuple, Array]:
        maps, importance, regions = carry
        query = contrastive.l2_normalise(words + hyper.eta * importance[:, None] * regions)
        similarity_KQ = query @ pixels.T * mask[:, None]
        maps = (1 - hyper.rho) * similarity_KQ + hyper.rho * maps
        if affinity is not None:
            maps = guide_maps(maps, affinity, hyper.guide_round_steps)
        output = ground_words(maps, pixels, words, mask, hyper, is_kept)
        return (maps, output.importance, output.regions), output.matches

    carry = maps, first.importance, first.regions
    (maps, importance, _), later_matches = lax.scan(refine, carry, None, rounds)
    return Alignment(jnp.concatenate([first.matches[None], later_matches]), maps, importance)


def upsample_maps(
    maps: Float[Array, "K P"], grid: tuple[int, int], fine_grid: tuple[int, int]
) -> Float[Array, "K Q"]:
    """Resizes maps bilinearly from one grid to a finer one."""
    fine_maps = resize_bilinear(maps.reshape(-1, *grid, 1), fine_grid)
    return fine_maps.reshape(len(maps), -1)


def compute_affinity(
    pixels: Float[Array, "Q D"], guide: Float[Array, "Q G"], grid: tuple[int, int], hyper: Hyper
) -> Float[Array, "Z M N"]:
    """Computes how alike the cells of an image are: the K of *equation 11*.

        (11)  K_pq ~ exp(-|f_p - f_q|^2 / tau_guide - |g_p - g_q|^2 / tau_grey
                         - |x_p - x_q|^2 / (2 guide_sigma^2)),  sum_q K_pq = 1

    f are unit pixels, g the grey values of `Features.guide`, and x places on the grid; q runs over
    the cells at most ceil(2 guide_sigma) rows and columns from p. Bilateral weights (Tomasi and
    Manduchi, ICCV 1998). There is no gradient.

    Returns:
      For each of the M cells of a block of GUIDE_ROWS rows, its weights of the N cells of the rows
      near the block, see `_near_blocks`; a table of all pairs of cells would be larger.
    """
    (num_rows, num_columns), reach = grid, math.ceil(2 * hyper.guide_sigma)
    radius = min(reach, num_rows - 1)
    pixels, guide = (lax.stop_gradient(x).reshape(*grid, -1) for x in (pixels, guide))
    # Places are known when the program is compiled: rows and columns in a block, and near it.
    row, column = np.divmod(np.arange(GUIDE_ROWS * num_columns), num_columns)
    near_row, near_column = np.divmod(
        np.arange((GUIDE_ROWS + 2 * radius) * num_columns), num_columns
    )
    row_offset = near_row - radius - row[:, None]
    column_offset = near_column - column[:, None]
    is_near_MN = (abs(row_offset) <= reach) & (abs(column_offset) <= reach)
    near_row_ZN = np.arange(0, num_rows, GUIDE_ROWS)[:, None] + near_row - radius
    is_inside_ZN = (near_row_ZN >= 0) & (near_row_ZN < num_rows)
    place_MN = -(row_offset**2 + column_offset**2) / (2 * hyper.guide_sigma**2)
    place_ZMN = np.where(
        is_near_MN & is_inside_ZN[:, None], place_MN.astype(np.float32), contrastive.MASKED_LOGIT
    )
    near_pixels_ZND, near_guide_ZNG = (_near_blocks(x, radius) for x in (pixels, guide))
    # Of unit vectors.
    cosine_ZMN = jnp.einsum("zmd,znd->zmn", _near_blocks(pixels, 0), near_pixels_ZND)
    distance_ZMN = (2 - 2 * cosine_ZMN) / hyper.tau_guide
    offset_ZMNG = _near_blocks(guide, 0)[:, :, None] - near_guide_ZNG[:, None]
    distance_ZMN += (offset_ZMNG**2).sum(-1) / hyper.tau_grey
    return jax.nn.softmax(place_ZMN - distance_ZMN, -1)


def guide_maps(
    maps: Float[Array, "K Q"], affinity: Float[Array, "Z M N"], num_steps: int
) -> Float[Array, "K Q"]:
    """Smooths maps along the affinities of the image itself: *equation 11*.

        S <- S K^T, `num_steps` times

    What gives a finding away is often its edge, as the line of a pneumothorax; cells that look
    alike share their heat, so that the edge hands it on to what it encloses.
    """
    num_columns = affinity.shape[1] // GUIDE_ROWS
    radius = (affinity.shape[2] // num_columns - GUIDE_ROWS) // 2

    def smooth(maps_QK: Array, _: None) -> tuple[Array, None]:
        near_ZNK = _near_blocks(maps_QK.reshape(-1, num_columns, len(maps)), radius)
        smoothed_ZMK = jnp.einsum("zmn,znk->zmk", affinity, near_ZNK)
        return smoothed_ZMK.reshape(-1, len(maps))[: len(maps_QK)], None

    return lax.scan(smooth, maps.T, None, num_steps)[0].T


def _near_blocks(cells: Float[Array, "Y X C"], radius: int) -> Float[Array, "Z N C"]:
    """Returns the cells of each block of GUIDE_ROWS rows and of `radius` rows above and below it.

    They are 0 outside of the grid.
    """
    num_rows, num_columns, _ = cells.shape
    num_blocks = -(-num_rows // GUIDE_ROWS)
    below = num_blocks * GUIDE_ROWS - num_rows + radius
    padded = jnp.pad(cells, ((radius, below), (0, 0), (0, 0)))
    height = GUIDE_ROWS + 2 * radius
    starts = range(0, num_blocks * GUIDE_ROWS, GUIDE_ROWS)
    blocks = jnp.stack([padded[start : start + height] for start in starts])
    return blocks.reshape(num_blocks, height * num_columns, -1)


# The history of words: equation 7 ---------------------------------------------------------------


def history_weights(
    memory: Memory, word_id: Int[Array, "B W"], hyper: Hyper
) -> Float[Array, "B W"]:
    """Computes the weight of each word from its history: *equation 7*.

        w_n = max(sigmoid((m_v - mean m) / std m), min_weight),  v = word id mod history_size

    m_v is the similarity margin of slot v: how much better its words matched their own image than
    other images, a moving average over training (see `update_history`). Mean and standard deviation
    are over the slots met so far; a slot never met has 1/2 in place of the sigmoid. Padding has
    weight 0, and without `use_history` every word has weight 1.
    """
    real = (word_id > 0).astype(jnp.float32)
    if not hyper.use_history:
        return real
    margin, is_known = memory["similarity_margin"], memory["count"] > 0
    mean = contrastive.masked_mean(margin, is_known)
    # The constant keeps the weights finite while all margins are equal, as before the first step.
    std = jnp.sqrt(contrastive.masked_mean((margin - mean) ** 2, is_known) + 1e-6)
    weight = jnp.where(is_known, jax.nn.sigmoid((margin - mean) / std), 0.5)
    return jnp.maximum(weight, hyper.min_weight)[word_id % hyper.history_size] * real


def normalise_weights(weight: Float[Array, "T K"]) -> Float[Array, "T K"]:
    """Computes the weights of the K sampled words of each text that equations 8 and 9 use.

    *Normalisation of equation 7:* `w_n / sum_k w_k`; all 0 for a text without words.
    """
    return weight / jnp.maximum(weight.sum(-1, keepdims=True), 1e-6)


def update_history(
    memory: Memory, margin: Float[Array, "B K"], word_id: Int[Array, "B K"], hyper: Hyper
) -> Memory:
    """Returns the history after a batch: the moving average m_v of *equation 7*.

        m_v <- history_decay m_v + (1 - history_decay) mean of the margins of slot v in the batch

    The first batch that has a word of the slot sets m_v to its mean. Slots of words that were not
    sampled stay as they are. There is no gradient.
    """
    slot = (word_id % hyper.history_size).ravel()
    real = (word_id > 0).astype(jnp.float32).ravel()
    empty = jnp.zeros(hyper.history_size)
    count = empty.at[slot].add(real)
    mean = empty.at[slot].add(real * margin.ravel()) / jnp.maximum(count, 1)
    old = memory["similarity_margin"]
    average = hyper.history_decay * old + (1 - hyper.history_decay) * mean
    new = jnp.where(memory["count"] > 0, average, mean)
    updated = {
        "similarity_margin": jnp.where(count > 0, new, old),
        "count": memory["count"] + count,
    }
    return lax.stop_gradient(updated)


# The method -------------------------------------------------------------------------------------


def shorten_texts(memory: Memory, text: TextBatch, hyper: Hyper) -> TextBatch | None:
    """Returns the concise reports that the loss reads: *equation 13*, by the weights (7).

    The text tower encodes them beside the reports, and BatchNorm of text heads has the statistics
    of both, whatever the step. None without `concise_start_step`.
    """
    if not hyper.concise_start_step:
        return None
    weight = history_weights(memory, text.word_id, hyper)
    return plan_concise.rebuild_texts(text, plan_concise.choose_words(weight, hyper.concise_words))


def logit_scale(log_scale: Float[Array, ""]) -> Float[Array, ""]:
    """Returns the learned factor on cosines, 1 / temperature, at most MAX_LOGIT_SCALE.

    *Radford et al., arXiv 2103.00020, section 2.5*, with a bound of our own.
    """
    return jnp.exp(jnp.minimum(log_scale, jnp.log(MAX_LOGIT_SCALE)))


def similarity(
    params: Params,
    memory: Memory,
    images: Features,
    texts: Features,
    hyper: Hyper,
    axis: str | None = None,
) -> dict[str, Float[Array, "I T"]]:
    """Returns the similarity of all images with all texts.

    `global` is the cosine; `local` the score s_ij of *equation 8* over all words, in round 0;
    `both` the sum of the two at the temperatures of the loss.
    """

    def score(pixels: Array, text: tuple[TextSide, Array]) -> Array:
        side, weight = text
        # Later rounds would need the finer map of every pair of an image and a text.
        matches = align(ImageSide(pixels), side, (), hyper, rounds=0).matches[0]
        return contrastive.masked_mean(matches, weight)

    pixels, words = contrastive.l2_normalise(images.local), contrastive.l2_normalise(texts.local)
    weight = history_weights(memory, texts.word_id, hyper)
    sides = TextSide(words, texts.word_id), weight
    local = contrastive.score_all_pairs(score, pixels, sides, hyper.tile_size)
    cosines = contrastive.cosine_similarity(images.pooled, texts.pooled)
    is_sigmoid = hyper.contrast == "sigmoid"
    scale = (jnp.exp if is_sigmoid else logit_scale)(params["log_scale"])
    total = scale * cosines + local / hyper.tau_local
    return {"global": cosines, "local": local, "both": total}


def heatmap(
    params: Params, memory: Memory, images: Features, texts: Features, hyper: Hyper
) -> tuple[Float[Array, "B W Q"], Float[Array, "B W"]]:
    """Returns the map S of each word over its image after all rounds, and the importance a_n.

    Maps are on the finer grid if there is one, and are then guided by the image (11).
    """
    grids = images.grid, images.fine_grid
    text_sides = TextSide(contrastive.l2_normalise(texts.local), texts.word_id)

    is_guided = images.guide is not None and images.fine is not None

    def align_pair(pair: tuple[ImageSide, TextSide]) -> tuple[Array, Array]:
        image, text = pair
        alignment = align(image, text, grids, hyper, hyper.rounds)
        maps = alignment.maps
        if is_guided and hyper.guide_steps:
            affinity = compute_affinity(image.fine_pixels, image.guide, grids[1], hyper)
            maps = guide_maps(maps, affinity, hyper.guide_steps)
        return maps, alignment.importance

    pairs = unit_image_sides(images), text_sides
    if is_guided and (hyper.guide_steps or hyper.guide_round_steps):
        return lax.map(align_pair, pairs)  # affinities are larger than maps
    return jax.vmap(align_pair)(pairs)


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
    """Computes the loss of a batch: *equation 10*.

        L = weight_global L_global
            + sum_t omega_t (weight_report L_report^t + weight_word L_word^t)

    L_global is that of `global_loss`. The other two are equations 8 and 9 with the matches of round
    t; omega is that of `round_weights`. From `concise_start_step` on, weight_concise L_concise of
    equation 14 is added; the features of concise reports are `extra["concise"]`.
    """
    # 1. Sample words of this device's texts by their history. The weights do not depend on the
    #    images: by the importance (2), the selection alone would tell which image belongs to the
    #    text.
    weight_bW = history_weights(memory, texts.word_id, hyper)
    count = min(hyper.num_sampled_words, weight_bW.shape[1])
    sample_bK = plan_contrast.sample_words(weight_bW, key, count, axis)

    # 2. Build the sides of the pairs: this device's images, and the sampled words of all texts.
    #    Only sampled words travel between devices.
    image_sides = unit_image_sides(images)._replace(report_word_id=texts.word_id)
    text_sides = TextSide(
        _take_words(contrastive.l2_normalise(texts.local), sample_bK),
        jnp.take_along_axis(texts.word_id, sample_bK, 1),
    )
    ema_share = jnp.zeros(())
    if hyper.progress == "ema":
        ema_images, ema_texts = extra["teacher"]
        ema_words = _take_words(contrastive.l2_normalise(ema_texts.local), sample_bK)
        image_sides = image_sides._replace(ema_pixels=contrastive.l2_normalise(ema_images.local))
        text_sides = text_sides._replace(ema_words=ema_words)
        ema_share = hyper.ema_share * jnp.minimum(step / hyper.ema_ramp_steps, 1.0)
    if hyper.pixel_dropout:
        image_sides = hide_pixels(image_sides, key, hyper, axis)
    is_alike = None
    if hyper.report_negatives == "unlike":
        is_alike = plan_contrast.alike_reports(
            texts.pooled, text_sides.word_id, hyper.report_alike, axis
        )
    text_sides = contrastive.all_gather(text_sides, axis)
    normalised_weight = normalise_weights(history_weights(memory, text_sides.word_id, hyper))

    # 3. Contrast round 0 over all images, and later rounds over a few candidates each.
    omega = round_weights(step, hyper)
    first = first_round_contrast(
        image_sides, text_sides, normalised_weight, ema_share, hyper, axis, is_alike
    )
    metrics = {"loss_report": first.report_loss, "loss_word": first.word_loss}
    round_loss = hyper.weight_report * first.report_loss + hyper.weight_word * first.word_loss
    loss_local = omega[0] * round_loss
    if hyper.rounds:
        grids = images.grid, images.fine_grid
        later = later_round_contrasts(
            image_sides, text_sides, normalised_weight, grids, hyper, axis, is_alike
        )
        metrics["loss_report_last"] = later.report_losses[-1]
        metrics["loss_word_last"] = later.word_losses[-1]
        round_losses = hyper.weight_report * later.report_losses
        round_losses += hyper.weight_word * later.word_losses
        loss_local += omega[1:] @ round_losses

    # 4. Update the history by round 0, whose margins are over all images.
    memory = update_history(memory, first.similarity_margin, text_sides.word_id, hyper)

    # 5. Contrast whole images and reports, and concise ones.
    loss_global = global_loss(params, images.pooled, texts.pooled, hyper, axis, is_alike)
    metrics["loss_global"] = loss_global
    total = hyper.weight_global * loss_global + loss_local
    if hyper.concise_start_step:
        sides = images.pooled, texts.pooled, extra["concise"].pooled
        loss_concise = concise_loss(params, *sides, hyper, axis, is_alike)
        metrics["loss_concise"] = (step >= hyper.concise_start_step) * loss_concise
        total += hyper.weight_concise * metrics["loss_concise"]
    return total, (metrics, memory)


def global_loss(
    params: Params,
    images: Float[Array, "b D"],
    texts: Float[Array, "b D"],
    hyper: Hyper,
    axis: str | None,
    is_alike: Bool[Array, "b T"] | None = None,
) -> Float[Array, ""]:
    """Computes the contrast of whole images and texts: the L_global of *equation 10*.

    It is InfoNCE of the cosines times the learned scale, the mean of both directions; with
    `contrast="sigmoid"` it is `contrastive.sigmoid_loss`. Pairs that are alike are no negatives.
    """
    if hyper.contrast == "sigmoid":
        return contrastive.sigmoid_loss(images, texts, params, axis)
    cosines = contrastive.cosine_similarity(images, contrastive.all_gather(texts, axis))
    logits = plan_contrast.remove_alike(logit_scale(params["log_scale"]) * cosines, is_alike)
    return jnp.add(*contrastive.info_nce(logits, axis)) / 2


def concise_loss(
    params: Params,
    images: Float[Array, "b D"],
    texts: Float[Array, "b D"],
    concise: Float[Array, "b D"],
    hyper: Hyper,
    axis: str | None,
    is_alike: Bool[Array, "b T"] | None = None,
) -> Float[Array, ""]:
    """Computes the loss of concise reports: *equation 14. Abstract only, form ours.*

        (14)  L_concise = L_global(v, c) + mean_i (1 - cos(t_i, c_i)),  c without gradient in cos

    v, t and c are the vectors of images, reports and concise reports. The contrast teaches what the
    chosen words say about the image, and the target draws the whole report towards it.
    """
    target = contrastive.l2_normalise(lax.stop_gradient(concise))
    cosines = jnp.sum(contrastive.l2_normalise(texts) * target, -1)
    distance = contrastive.mean(1 - cosines, axis)
    return global_loss(params, images, concise, hyper, axis, is_alike) + distance


def round_weights(step: Array, hyper: Hyper) -> Float[Array, " N"]:
    """Computes the weight of each round in the loss: the omega of *equation 10*.

        omega_t = active_t gamma^(T - t) R,  R = sum_s active_s / sum_s active_s gamma^(T - s)

    active_t is 1 for round 0, and for later rounds from `refinement_start_step` on, else 0. With
    gamma < 1 later rounds weigh more. R rescales omega to a mean of 1 over the active rounds, so
    that gamma changes the balance of the rounds and not the weight of all of them beside L_global.
    """
    rounds = hyper.rounds
    is_active = (jnp.arange(rounds + 1) == 0) | (step >= hyper.refinement_start_step)
    omega = is_active * hyper.gamma ** jnp.arange(rounds, -1, -1)
    return omega * is_active.sum() / omega.sum()


def first_round_contrast(
    images: ImageSide,
    texts: TextSide,
    normalised_weight: Float[Array, "T K"],
    ema_share: Float[Array, ""],
    hyper: Hyper,
    axis: str | None,
    is_alike: Bool[Array, "b T"] | None = None,
) -> plan_contrast.AllImagesContrast:
    """Computes the contrasts of round 0: *equations 8 and 9* over all images.

    Shapes as in the sides, with a leading axis: b images of this device, T texts of all devices.
    """
    images = images._replace(fine_pixels=None, is_fine_kept=None, guide=None)  # not read in round 0

    def score(image: ImageSide, text: TextSide) -> PairScores:
        alignment = align(image, text, (), hyper, rounds=0, ema_share=ema_share)
        return PairScores(alignment.matches[0], words_in_report(image, text))

    return plan_contrast.contrast_all_images(
        score,
        images,
        texts,
        normalised_weight,
        tau=hyper.tau_local,
        same_word_is_negative=hyper.negatives == "all",
        tile_size=hyper.tile_size,
        axis=axis,
        is_alike=is_alike,
    )


def later_round_contrasts(
    images: ImageSide,
    texts: TextSide,
    normalised_weight: Float[Array, "T K"],
    grids: tuple[tuple[int, int] | None, ...],
    hyper: Hyper,
    axis: str | None,
    is_alike: Bool[Array, "b T"] | None = None,
) -> plan_contrast.CandidateContrast:
    """Computes the contrasts of rounds 1..T: *equations 8 and 9* over `num_candidates` images each.

    A fine map has several times the pixels of a coarse one, and rounds follow one another; over a
    few candidates all of them cost less than round 0 over all images.
    """
    # The averaged model takes part in round 0 only.
    images, texts = images._replace(ema_pixels=None), texts._replace(ema_words=None)

    def score(image: ImageSide, text: TextSide) -> PairScores:
        matches_NK = align(image, text, grids, hyper, hyper.rounds).matches
        return PairScores(matches_NK[1:].T, words_in_report(image, text))

    return plan_contrast.contrast_candidates(
        score,
        images,
        texts,
        normalised_weight,
        num_candidates=hyper.num_candidates,
        tau=hyper.tau_local,
        same_word_is_negative=hyper.negatives == "all",
        tile_size=hyper.tile_size,
        axis=axis,
        is_alike=is_alike,
    )


def unit_image_sides(images: Features) -> ImageSide:
    """Returns the sides of B images, coarse and fine pixels [B P D] and [B Q D] at unit length."""
    fine = None if images.fine is None else contrastive.l2_normalise(images.fine)
    return ImageSide(contrastive.l2_normalise(images.local), fine, guide=images.guide)


def hide_pixels(images: ImageSide, key: PRNGKeyArray, hyper: Hyper, axis: str | None) -> ImageSide:
    """Returns images whose regions may use a random part of the pixels, drawn for each image.

    *Hide-and-seek (Singh and Lee, arXiv 1704.04232), of pixels of the map instead of the image:* a
    word that finds its region by the one cell that gives it away must also know the others.
    """
    coarse, fine = images.pixels.shape[:2], images.fine_pixels

    def draw(index: Array, stream: int, count: int) -> Bool[Array, " P"]:
        # `sample_words` folds the index of a text into the same key, which is never so large.
        own = jax.random.fold_in(jax.random.fold_in(key, 2**31 - 1 - stream), index)
        return jax.random.bernoulli(own, 1 - hyper.pixel_dropout, (count,))

    indices = contrastive.global_indices(coarse[0], axis)
    is_kept = jax.vmap(lambda index: draw(index, 0, coarse[1]))(indices)
    is_fine_kept = None
    if fine is not None:
        is_fine_kept = jax.vmap(lambda index: draw(index, 1, fine.shape[1]))(indices)
    return images._replace(is_kept=is_kept, is_fine_kept=is_fine_kept)


def words_in_report(image: ImageSide, text: TextSide) -> Bool[Array, " K"]:
    """Returns which words of a text also occur in the image's own report."""
    return (text.word_id[:, None] == image.report_word_id[None, :]).any(-1)


def _take_words(words: Float[Array, "T W D"], index: Int[Array, "T K"]) -> Float[Array, "T K D"]:
    return jnp.take_along_axis(words, index[..., None], 1)
