"""Computes the six methods' training steps in torch, for `tools/benchmark.py device`.

The towers are torchvision's ResNet or timm's ViT, and transformers' BERT, all with random weights;
the projection heads have the layers of the config. ConVIRT, GLoRIA, MGCA and ASG compute their
losses as their published code does: GLoRIA in a loop over captions, MGCA with the percentiles of
each text and image by themselves, ASG for all regions of the batch at once. PLAN and PLACE have no
published code; their losses are the equations of `plan_jax.methods`, for all pairs of the batch at
once, as one writes them in torch. Losses are computed in float32, whatever the towers' type.

Deviation in torch's favour: pieces are summed to words by one product instead of a loop over
pieces, attention is fused, and ASG's tags are encoded once instead of in each step.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from benchmark_encoders import load_torchvision
from benchmark_losses import info_nce, torch_gloria, torch_mgca
from torch import nn
from torch.nn import functional

from plan_jax.config import Config
from plan_jax.encoders.bert import BERTS
from plan_jax.encoders.dual_encoder import MEAN_AND_STD
from plan_jax.encoders.resnet import RESNETS
from plan_jax.encoders.vit import VITS
from plan_jax.methods import METHODS
from plan_jax.types import Batch, UserError

MASKED_LOGIT = -1e9
# ResNets that torchvision has too.
TORCHVISION_RESNETS = ("resnet18", "resnet34", "resnet50")
HEADS = ("linear", "norm", "mlp", "shared")


def to_tensors(batch: Batch, device: str) -> SimpleNamespace:
    """Returns a batch as tensors: images [B 1 Y X] of grey values 0..255, texts and extras.

    Indices are int64, as torch wants them. `lengths` are the numbers of words of the texts.
    """

    def tensor(array: Any) -> torch.Tensor:
        array = np.asarray(array)
        return torch.tensor(array.astype(np.int64) if array.dtype == np.int32 else array).to(device)

    text = batch.text
    return SimpleNamespace(
        image=tensor(batch.image).permute(0, 3, 1, 2).contiguous(),
        tokens=tensor(text.tokens),
        word_index=tensor(text.word_index),
        word_id=tensor(text.word_id),
        sentence=tensor(text.sentence),
        lengths=(np.asarray(text.word_id) > 0).sum(1).tolist(),
        extra={name: tensor(array) for name, array in batch.extra.items()},
    )


# Towers and heads --------------------------------------------------------------------------------


class Head(nn.Module):
    """A projection head: `linear`, `norm` or `mlp` of `plan_jax.encoders.dual_encoder`."""

    def __init__(self, kind: str, width: int, hidden: int, dim: int) -> None:
        """Builds the layers of a kind, from `width` channels to `dim`."""
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=False) if kind == "mlp" else None
        self.norm1 = nn.BatchNorm1d(hidden) if kind == "mlp" else None
        self.fc2 = nn.Linear(hidden if kind == "mlp" else width, dim)
        self.norm2 = None if kind == "linear" else nn.BatchNorm1d(dim, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Projects the last axis of [... E] to [... D]."""
        rows = x.flatten(0, -2)
        if self.fc1 is not None and self.norm1 is not None:
            rows = functional.relu(self.norm1(self.fc1(rows)))
        rows = self.fc2(rows)
        rows = rows if self.norm2 is None else self.norm2(rows)
        return rows.unflatten(0, x.shape[:-1])


class FineHead(nn.Module):
    """The head of the finer map, with a lateral connection from the coarse one."""

    def __init__(self, fine_width: int, width: int, dim: int) -> None:
        """Builds both projections and the norm of their sum."""
        super().__init__()
        self.lateral = nn.Linear(fine_width, dim)
        self.top = nn.Linear(width, dim, bias=False)
        self.norm = nn.BatchNorm1d(dim, affine=False)

    def forward(
        self, fine: torch.Tensor, coarse: torch.Tensor, grids: tuple[tuple[int, int], ...]
    ) -> torch.Tensor:
        """Projects finer pixels [B Q C], with the coarse ones [B P E], to [B Q D]."""
        grid, fine_grid = grids
        top = self.top(coarse).transpose(1, 2).unflatten(2, grid)
        top = functional.interpolate(top, fine_grid, mode="bilinear", align_corners=False)
        pixels = self.lateral(fine) + top.flatten(2).transpose(1, 2)
        return self.norm(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])


class ImageTower(nn.Module):
    """torchvision's ResNet or timm's ViT, with the maps and the attention that a method reads."""

    def __init__(self, vision: Mapping[str, Any], size: int) -> None:
        """Builds the tower of `config.vision` for images of `size` pixels.

        Raises:
          UserError: neither library has it.
        """
        super().__init__()
        vision = dict(vision)
        name = vision.pop("name")
        torchvision = load_torchvision()
        self.resize = int(vision.get("resize") or 0)
        self.is_resnet = name in RESNETS
        if name in TORCHVISION_RESNETS:
            self.tower = torchvision.models.get_model(name, weights=None)
            self.tower.fc = nn.Identity()
            self.local_stage = vision.get("local_stage", RESNETS[name]["local_stage"])
            expansion = 4 if RESNETS[name]["bottleneck"] else 1
            widths = [width * expansion for width in RESNETS[name]["widths"]]
            self.width, self.pooled_width = widths[self.local_stage], widths[-1]
            self.fine_width = widths[self.local_stage - 1]
        elif name in VITS and "layer_scale" not in VITS[name]:
            import timm

            sizes = {**VITS[name], **vision}
            self.tower = timm.create_model(
                "vit_base_patch16_224",
                pretrained=False,
                num_classes=0,
                img_size=size,
                patch_size=sizes["patch"],
                embed_dim=sizes["width"],
                depth=sizes["depth"],
                num_heads=sizes["heads"],
            )
            self.width = self.pooled_width = self.fine_width = sizes["width"]
        else:
            names = (*TORCHVISION_RESNETS, *(n for n in VITS if "layer_scale" not in VITS[n]))
            raise UserError(
                f"config.vision.name {name} has no equal in torchvision or timm; use one of"
                f" {', '.join(names)}, or --sides jax"
            )

    def forward(self, x: torch.Tensor, with_attention: bool) -> SimpleNamespace:
        """Encodes images [B 3 Y X]: `pooled` [B E], `local` [B P E], `fine`, `attention`, grids."""
        if not self.is_resnet:
            return self._run_vit(x, with_attention)
        if self.resize:
            side = (self.resize, self.resize)
            x = functional.interpolate(x, side, mode="bilinear", align_corners=True)
        tower = self.tower
        x = tower.maxpool(tower.relu(tower.bn1(tower.conv1(x))))
        maps = []
        for layer in (tower.layer1, tower.layer2, tower.layer3, tower.layer4):
            x = layer(x)
            maps.append(x)
        local, fine = maps[self.local_stage], maps[self.local_stage - 1]
        return SimpleNamespace(
            pooled=x.mean((2, 3)),
            local=local.flatten(2).transpose(1, 2),
            fine=fine.flatten(2).transpose(1, 2),
            attention=None,
            grids=(tuple(local.shape[2:]), tuple(fine.shape[2:])),
        )

    def _run_vit(self, x: torch.Tensor, with_attention: bool) -> SimpleNamespace:
        tower = self.tower
        x = tower.norm_pre(tower._pos_embed(tower.patch_embed(x)))
        attention = None
        for index, block in enumerate(tower.blocks):
            if with_attention and index == len(tower.blocks) - 1:
                # The fused attention shows no weights: those of the class token are computed apart.
                with torch.no_grad():
                    tokens, heads = block.norm1(x), block.attn.num_heads
                    query, key, _ = block.attn.qkv(tokens).chunk(3, -1)
                    attention = first_token_attention(query, key, heads)[:, 1:]
            x = block(x)
        x = tower.norm(x)
        side = math.isqrt(x.shape[1] - 1)
        grids = ((side, side), (side, side))
        return SimpleNamespace(
            pooled=x[:, 0], local=x[:, 1:], fine=None, attention=attention, grids=grids
        )


def first_token_attention(
    query: torch.Tensor, key: torch.Tensor, heads: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the attention of the first token to all tokens [B N], averaged over heads."""
    query = query[:, :1].unflatten(-1, (heads, -1)).float()
    key = key.unflatten(-1, (heads, -1)).float()
    logits = torch.einsum("bqhc,bnhc->bhn", query, key) / query.shape[-1] ** 0.5
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None], MASKED_LOGIT)
    return logits.softmax(-1).mean(1)


class TextTower(nn.Module):
    """transformers' BERT, whose pieces are summed to words."""

    def __init__(self, text: Mapping[str, Any], vocab_size: int) -> None:
        """Builds the tower of `config.text`.

        Raises:
          UserError: transformers' BERT has no such pooling or mask.
        """
        super().__init__()
        load_torchvision()
        from transformers import BertConfig, BertModel

        sizes = {**BERTS[text["name"]], **text}
        self.pool, self.sum_last_layers = sizes.get("pool", "cls"), sizes.get("sum_last_layers", 1)
        if self.pool not in ("cls", "mean") or sizes.get("block_diagonal"):
            raise UserError(
                f"config.text.pool {self.pool} with block_diagonal"
                f" {bool(sizes.get('block_diagonal'))} has no equal in transformers; use cls or"
                " mean and False, or --sides jax"
            )
        self.heads, self.width = sizes["heads"], sizes["width"]
        self.bert = BertModel(
            BertConfig(
                vocab_size=vocab_size,
                hidden_size=sizes["width"],
                num_hidden_layers=sizes["depth"],
                num_attention_heads=sizes["heads"],
                intermediate_size=4 * sizes["width"],
                hidden_dropout_prob=sizes.get("dropout", 0.0),
                attention_probs_dropout_prob=0.0,  # as in the library
                attn_implementation="sdpa",
            ),
            add_pooling_layer=False,
        )

    def forward(
        self, tokens: torch.Tensor, word_index: torch.Tensor, num_words: int, with_attention: bool
    ) -> SimpleNamespace:
        """Encodes texts [B L]: `pooled` [B E], `local` [B W E] and `attention` [B W]."""
        is_real = tokens > 0
        x, outputs, attention = self.bert.embeddings(tokens), [], None
        layers = self.bert.encoder.layer
        # An index of -1 belongs to no word.
        membership = functional.one_hot(word_index + 1, num_words + 1)[..., 1:]
        for index, layer in enumerate(layers):
            if with_attention and index == len(layers) - 1:
                with torch.no_grad():
                    part = layer.attention.self
                    weights = first_token_attention(part.query(x), part.key(x), self.heads, is_real)
                    attention = torch.einsum("bl,blw->bw", weights, membership.float())
            x = layer(x, is_real[:, None, None, :])
            x = x[0] if isinstance(x, tuple) else x  # before transformers 5
            outputs.append(x)
        x = sum(outputs[-self.sum_last_layers :]) if self.sum_last_layers > 1 else x
        pooled = x[:, 0]
        if self.pool == "mean":
            weights = (is_real / is_real.sum(1, keepdim=True)).to(x.dtype)
            pooled = torch.einsum("ble,bl->be", x, weights)
        local = torch.einsum("ble,blw->bwe", x, membership.to(x.dtype))
        return SimpleNamespace(pooled=pooled, local=local, attention=attention)


class Encoder(nn.Module):
    """Both towers with the heads that a method's loss reads."""

    def __init__(self, config: Config, vocab_size: int) -> None:
        """Builds the encoder of a config.

        Raises:
          UserError: the libraries have no equal of a part of it.
        """
        super().__init__()
        method, dim = METHODS[config.method], config.embed_dim
        self.image_names, self.text_names = method.IMAGE_FEATURES, method.TEXT_FEATURES
        self.image_tower = ImageTower(config.vision, config.data.size)
        self.text_tower = TextTower(config.text, vocab_size)
        widths = {
            "image_global": self.image_tower.pooled_width,
            "image_local": self.image_tower.width,
            "text_global": self.text_tower.width,
            "text_local": self.text_tower.width,
        }
        self.heads = nn.ModuleDict()
        for name, kind in vars(config.heads).items():
            if kind not in HEADS or config.channels != 3:
                raise UserError(
                    f"config.heads.{name} {kind} with config.channels {config.channels} has no"
                    f" equal here; use {', '.join(HEADS)} and 3, or --sides jax"
                )
            if kind != "shared":  # a head that no loss here reads
                self.heads[name] = Head(kind, widths[name], config.head_hidden_dim, dim)
        self.fine_head = None
        if "fine" in self.image_names and config.fine_map and self.image_tower.is_resnet:
            tower = self.image_tower
            self.fine_head = FineHead(tower.fine_width, tower.width, dim)
        self.normalisation = config.normalisation
        self.layout = torch.contiguous_format

    def set_layout(self, layout: torch.memory_format) -> None:
        """Sets the layout of images, maps and kernels."""
        self.layout = layout
        self.image_tower.to(memory_format=layout)

    def normalise(self, image: torch.Tensor) -> torch.Tensor:
        """Returns images [B 1 Y X] of 0..255 as normalised images [B 3 Y X]."""
        x = (image.float() / 255).expand(-1, 3, -1, -1)
        if self.normalisation == "image":
            std = x.std((1, 2, 3), correction=0, keepdim=True)
            return (x - x.mean((1, 2, 3), keepdim=True)) / (std + 1e-3)
        mean, std = (
            torch.tensor(value, device=x.device).reshape(1, -1, 1, 1)
            for value in MEAN_AND_STD[self.normalisation]
        )
        return (x - mean) / std

    def forward(
        self,
        image: torch.Tensor,
        tokens: torch.Tensor,
        word_index: torch.Tensor,
        num_words: int,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the features of both sides that the loss reads, as of `plan_jax.types.Features`.

        `image` is [B 1 Y X], `tokens` and `word_index` are [B L]. All results are in float32.
        """
        x = self.normalise(image)
        x = x.contiguous(memory_format=self.layout)
        seen = self.image_tower(x, "attention" in self.image_names)
        images = {"pooled": self.heads["image_global"](seen.pooled), "attention": seen.attention}
        if "local" in self.image_names:
            images["local"] = self.heads["image_local"](seen.local)
        if "raw" in self.image_names:
            images["raw"] = seen.local
        if self.fine_head is not None:
            images["fine"] = self.fine_head(seen.fine, seen.local, seen.grids)
            images["guide"] = describe_grey(image, seen.grids[1])
        read = self.text_tower(tokens, word_index, num_words, "attention" in self.text_names)
        texts = {"pooled": self.heads["text_global"](read.pooled), "attention": read.attention}
        if "local" in self.text_names:
            texts["local"] = self.heads["text_local"](read.local)
        for side in (images, texts):
            for name, value in side.items():
                side[name] = None if value is None else value.float()
        return images | {"grids": seen.grids}, texts


def describe_grey(image: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Returns the grey values' mean and deviation in each cell [B Q 2], as the encoder's guide."""
    grey = image.float() / 255
    grey = grey - grey.mean((2, 3), keepdim=True)

    def mean_cells(x: torch.Tensor) -> torch.Tensor:
        # Cells may share a pixel, by its parts; torch's adaptive pooling would count it twice.
        shares = []
        for count, cells in zip(x.shape[2:], grid, strict=True):
            edges = torch.arange(cells + 1, device=x.device) * (count / cells)
            pixel = torch.arange(count, device=x.device)
            overlap = edges[1:, None].minimum(pixel + 1) - edges[:-1, None].maximum(pixel)
            shares.append(overlap.clamp(min=0) * (cells / count))
        return torch.einsum("Yy,Xx,bcyx->bcYX", *shares, x)

    mean, square = mean_cells(grey), mean_cells(grey**2)
    values = torch.cat([mean, (square - mean**2).clamp(min=0).sqrt()], 1).flatten(2).mT
    values = values - values.mean(1, keepdim=True)
    return values / (values.std(1, correction=0, keepdim=True) + 1e-3)


# Losses ------------------------------------------------------------------------------------------


def unit(x: torch.Tensor) -> torch.Tensor:
    """Returns vectors [... D] scaled to length 1."""
    return functional.normalize(x, dim=-1)


def masked_mean(x: torch.Tensor, mask: torch.Tensor, *axes: int) -> torch.Tensor:
    """Computes the mean of [...] over axes, weighted by a mask or weights."""
    weight = mask.to(x.dtype).expand_as(x)
    return (x * weight).sum(axes) / weight.sum(axes).clamp(min=1e-6)


class ConvirtLoss(nn.Module):
    """ConVIRT: InfoNCE of the cosines in both directions, weighted."""

    def __init__(self, hyper: Any, **_: Any) -> None:
        """Stores the constants."""
        super().__init__()
        self.hyper = hyper

    def forward(self, images: dict, texts: dict, batch: SimpleNamespace) -> torch.Tensor:
        """Computes the loss of a batch, a scalar []."""
        logits = unit(images["pooled"]) @ unit(texts["pooled"]).T / self.hyper.tau
        labels = torch.arange(len(logits), device=logits.device)
        share = self.hyper.image_to_text
        to_text = functional.cross_entropy(logits, labels)
        return share * to_text + (1 - share) * functional.cross_entropy(logits.T, labels)


class GloriaLoss(nn.Module):
    """GLoRIA: a loop over captions at their true lengths."""

    def __init__(self, hyper: Any, **_: Any) -> None:
        """Stores nothing: the constants are those of the code."""
        super().__init__()

    def forward(self, images: dict, texts: dict, batch: SimpleNamespace) -> torch.Tensor:
        """Computes the loss of a batch, a scalar []."""
        regions, words = (side["local"].transpose(1, 2) for side in (images, texts))
        pooled = images["pooled"], texts["pooled"]
        return torch_gloria(*pooled, regions, words, batch.lengths)


class MgcaLoss(nn.Module):
    """MGCA: contrasts of reports and of tokens, and prototypes."""

    def __init__(self, hyper: Any, dim: int, **_: Any) -> None:
        """Draws the prototypes."""
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(hyper.num_prototypes, dim))

    def forward(self, images: dict, texts: dict, batch: SimpleNamespace) -> torch.Tensor:
        """Computes the loss of a batch, a scalar []."""
        padding = batch.word_id == 0
        weight = clip_each(texts["attention"] * ~padding)
        patch_weight = images["attention"]
        patch_weight = None if patch_weight is None else clip_each(patch_weight)
        # The code freezes the prototypes in its first epoch, which lasts longer than this.
        prototypes = self.prototypes.detach()
        sides = images["pooled"], texts["pooled"], images["local"], texts["local"]
        return torch_mgca(*sides, prototypes, padding, weight, patch_weight)


@torch.no_grad()
def clip_each(attention: torch.Tensor) -> torch.Tensor:
    """Clips the attention [B N] of each text or image to its percentiles, and scales it to sum 1.

    One after the other, because the numbers of words differ.
    """
    rows = []
    for row in attention:
        real = row.nonzero().flatten()
        low, high = (torch.quantile(row[real], fraction) for fraction in (0.1, 0.9))
        clipped = row.clone()
        clipped[real] = row[real].clip(low, high)
        rows.append(clipped)
    clipped = torch.stack(rows)
    return clipped / clipped.sum(1, keepdim=True)


class AsgLoss(nn.Module):
    """ASG: reports, regions with their sentences, tags of an image, and tags between pairs."""

    def __init__(self, hyper: Any, width: int, tags: np.ndarray | None = None, **_: Any) -> None:
        """Builds the tag decoder; `tags` [F E] are the encoded names of the findings."""
        super().__init__()
        self.hyper = hyper
        self.register_buffer("tags", torch.tensor(np.asarray(tags)))
        tag_width = self.tags.shape[1]
        self.project = nn.Linear(width, tag_width) if width != tag_width else nn.Identity()
        rate = hyper.dropout_rate
        layer = nn.TransformerDecoderLayer(
            tag_width, hyper.num_heads, hyper.hidden_dim, rate, norm_first=True, batch_first=True
        )
        norm = nn.LayerNorm(tag_width)
        self.decoder = nn.TransformerDecoder(layer, hyper.num_layers, norm)
        self.dropout, self.logit = nn.Dropout(rate), nn.Linear(tag_width, 1)

    def roi_weights(self, low: torch.Tensor, high: torch.Tensor, count: int) -> torch.Tensor:
        """Returns RoIAlign's weights [B R count] of the cells of one axis, for one output cell."""
        length = high - low if self.hyper.aligned else (high - low).clamp(min=1.0)
        samples = length.ceil().clamp(1, count)[..., None]
        index = torch.arange(count, device=low.device)
        position = low[..., None] + (index + 0.5) * length[..., None] / samples
        position = position - 0.5 * self.hyper.aligned
        used = (index < samples) & (position >= -1) & (position <= count)
        position = position.clamp(0, count - 1)
        bilinear = (1 - (position[..., None] - index).abs()).clamp(min=0)
        return (bilinear * used[..., None]).sum(-2) / samples

    def region_loss(self, images: dict, texts: dict, batch: SimpleNamespace) -> torch.Tensor:
        """Computes the contrast of each image's regions [B R D] with their sentences."""
        (rows, columns), boxes = images["grids"][0], batch.extra["regions"]
        pixels, words = unit(images["local"]), unit(texts["local"])
        x0, y0, x1, y1 = boxes.unbind(-1)
        across = self.roi_weights(x0 * columns, x1 * columns, columns)
        down = self.roi_weights(y0 * rows, y1 * rows, rows)
        pixels = pixels.unflatten(1, (rows, columns))
        regions = torch.einsum("bry,brx,byxd->brd", down, across, pixels)
        membership = batch.extra["region_words"].float()
        sentences = membership @ words / membership.sum(-1, keepdim=True).clamp(min=1)
        real = (x1 > x0) & (y1 > y0) & membership.any(-1)
        logits = regions @ sentences.transpose(1, 2) / self.hyper.tau
        labels = torch.arange(real.shape[1], device=real.device).expand_as(real)
        labels = labels.masked_fill(~real, -100)
        total = 0.0
        for table in (logits, logits.transpose(1, 2)):
            table = table.masked_fill(~real[:, None], MASKED_LOGIT).flatten(0, 1)
            total = total + functional.cross_entropy(table, labels.flatten())
        return total

    def forward(self, images: dict, texts: dict, batch: SimpleNamespace) -> torch.Tensor:
        """Computes the loss of a batch, a scalar []."""
        hyper = self.hyper
        logits = unit(images["pooled"]) @ unit(texts["pooled"]).T / hyper.tau
        labels = (batch.extra["labels"] > 0).float()
        tags = self.tags.expand(len(labels), -1, -1)
        decoded = self.dropout(self.decoder(tags, self.project(images["raw"])))
        predicted = self.logit(decoded)[..., 0]
        loss_tags = functional.binary_cross_entropy_with_logits(predicted, labels)
        tags = unit(labels)
        target = (1 - hyper.soft_share) * torch.eye(len(tags), device=tags.device)
        target = target + hyper.soft_share * tags @ tags.T + hyper.target_smoothing
        target = target / target.sum(1, keepdim=True)
        loss_soft = 0.0
        for table in (logits, logits.T):
            log_p, reduction = table.log_softmax(-1), "batchmean"
            forward = functional.kl_div(log_p, target, reduction=reduction)
            backward = functional.kl_div(target.log(), log_p.exp(), reduction=reduction)
            loss_soft = loss_soft + (forward + backward) / 4
        value = info_nce(logits) + hyper.weight_tags * loss_tags + hyper.weight_soft * loss_soft
        return value + hyper.weight_region * self.region_loss(images, texts, batch)


class Block(nn.Module):
    """A pre-norm block of PLACE: self-attention, cross-attention and an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        """Builds the block; its attentions have no biases."""
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width, eps=1e-6) for _ in range(3)])
        # Query, key, value and output of the self-attention, then of the cross-attention.
        self.projections = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(8)])
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def attend(
        self, first: int, x: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the attention of x [B N E] to memory [B M E], with four projections."""
        query, key, value = (
            self.projections[first + n](side).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for n, side in enumerate((x, memory, memory))
        )
        y = functional.scaled_dot_product_attention(query, key, value, mask)
        return self.projections[first + 3](y.transpose(1, 2).flatten(2))

    def forward(
        self, x: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns x [B N E] after the block; it attends to memory [B M E] where mask is True."""
        y = self.norms[0](x)
        x = x + self.attend(0, y, y, None)
        x = x + self.attend(4, self.norms[1](x), memory, mask)
        y = functional.gelu(self.fc1(self.norms[2](x)), approximate="tanh")
        return x + self.fc2(y)


class PlaceLoss(nn.Module):
    """PLACE: equations 1 to 10 of `plan_jax.methods.place`, with `match="max"`."""

    def __init__(self, hyper: Any, dim: int, **_: Any) -> None:
        """Builds extractor, sentence head and decoder."""
        super().__init__()
        self.hyper = hyper
        heads = hyper.num_heads
        self.queries = nn.Parameter(torch.randn(hyper.num_queries, dim))
        self.token = nn.Parameter(0.02 * torch.randn(dim))
        self.norm, self.norm_out, self.norm_pixels, self.norm_words = (
            nn.LayerNorm(dim, eps=1e-6) for _ in range(4)
        )
        self.norm_decoded = nn.LayerNorm(dim, eps=1e-6, bias=False)
        self.extractor = nn.ModuleList([Block(dim, heads) for _ in range(hyper.num_blocks)])
        self.decoder = nn.ModuleList([Block(dim, heads) for _ in range(hyper.num_decoder_blocks)])
        self.head, self.sentence = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim, bias=False)

    def positions(self, grid: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
        """Returns sines and cosines of the rows and columns [P D]."""
        dim = like.shape[-1]
        frequencies = 10000.0 ** -torch.arange(0, 1, 4 / dim, device=like.device)
        indices = (torch.arange(count, device=like.device) for count in grid)
        rows, columns = torch.meshgrid(*indices, indexing="ij")
        angles = torch.cat([side.reshape(-1, 1) * frequencies for side in (rows, columns)], 1)
        return torch.cat([angles.sin(), angles.cos()], 1)[:, :dim]

    def correlation_loss(
        self, images: dict, texts: dict, mask: torch.Tensor, hidden: torch.Tensor
    ) -> torch.Tensor:
        """Computes the error of the predicted correlations of patches, with `hidden` [B P]."""
        pixels, words = images["local"], texts["local"]
        x = torch.where(hidden[..., None], self.token, self.norm_pixels(pixels))
        x = x + self.positions(images["grids"][0], pixels)
        memory = self.norm_words(words) * mask[..., None]
        for block in self.decoder:
            x = block(x, memory, mask[:, None, None])
        y = self.out(self.norm_decoded(x))
        y = unit(y - y.mean(1, keepdim=True))
        with torch.no_grad():
            tokens = images["raw"]
            centred = tokens - tokens.mean(1, keepdim=True)
            standard = unit(centred * (centred**2).mean(1, keepdim=True).add(1e-8).rsqrt())
            true = standard @ standard.transpose(1, 2)
        pairs = hidden[:, :, None] | hidden[:, None, :]
        pairs = pairs & ~torch.eye(pairs.shape[1], dtype=torch.bool, device=pairs.device)
        return masked_mean((y @ y.transpose(1, 2) - true) ** 2, pairs, 1, 2).mean()

    def forward(
        self,
        images: dict,
        texts: dict,
        batch: SimpleNamespace,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes the loss of a batch, a scalar []; `hidden` [B P] are the patches to hide."""
        hyper, mask, pixels = self.hyper, batch.word_id > 0, images["local"]
        x, memory = self.queries.expand(len(pixels), -1, -1), self.norm(pixels)
        for block in self.extractor:
            x = block(x, memory)
        observations = unit(self.head(self.norm_out(x)))
        count = min(hyper.max_sentences, mask.shape[1])
        membership = batch.sentence[..., None] == torch.arange(count, device=mask.device)
        membership = (membership & mask[..., None]).float()
        sizes = membership.sum(1)
        means = torch.einsum("bwd,bwm->bmd", texts["local"], membership)
        means = means / sizes.clamp(min=1)[..., None]
        real = sizes > 0
        sentences = unit(self.sentence(means)) * real[..., None]
        products = torch.einsum("tmd,ikd->itmk", sentences, observations)
        scores = masked_mean(products.amax(-1), real, -1)
        overlap = (observations @ observations.transpose(1, 2)) ** 2
        others = 1 - torch.eye(overlap.shape[1], device=overlap.device)
        variety = (overlap * others).sum() / (others.sum().clamp(min=1) * len(overlap))
        if hidden is None:
            noise = torch.rand(pixels.shape[:2], device=pixels.device)
            num_hidden = min(max(round(hyper.mask_ratio * noise.shape[1]), 1), noise.shape[1])
            hidden = torch.zeros_like(noise, dtype=torch.bool)
            hidden.scatter_(1, noise.topk(num_hidden, 1).indices, True)
        value = info_nce(unit(images["pooled"]) @ unit(texts["pooled"]).T / hyper.tau)
        value = value + hyper.weight_pcma * info_nce(scores / hyper.tau_local)
        value = value + hyper.weight_variety * variety
        return value + hyper.weight_cce * self.correlation_loss(images, texts, mask, hidden)


class PlanLoss(nn.Module):
    """PLAN: equations 1 to 11 of `plan_jax.methods.plan`, with `progress="rounds"`."""

    def __init__(self, hyper: Any, **_: Any) -> None:
        """Builds the learned scale and the history of words.

        Raises:
          UserError: a constant asks for what is not written here.
        """
        super().__init__()
        defaults = type(hyper)()
        for name in ("pixel_dropout", "regions", "report_negatives", "concise_start_step"):
            value, default = getattr(hyper, name), getattr(defaults, name)
            if value != default:
                message = f"hyper.{name} is {value}, which torch's PLAN lacks; set it to {default}"
                raise UserError(message)
        self.hyper = hyper
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / hyper.tau)))
        self.register_buffer("margin", torch.zeros(hyper.history_size))
        self.register_buffer("count", torch.zeros(hyper.history_size))

    def word_weights(self, word_id: torch.Tensor) -> torch.Tensor:
        """Computes the weight of each word [B W] from its history: equation 7."""
        known = self.count > 0
        mean = masked_mean(self.margin, known, 0)
        std = (masked_mean((self.margin - mean) ** 2, known, 0) + 1e-6).sqrt()
        weight = torch.where(known, ((self.margin - mean) / std).sigmoid(), 0.5)
        weight = weight.clamp(min=self.hyper.min_weight)[word_id % self.hyper.history_size]
        return weight * (word_id > 0)

    @torch.no_grad()
    def update_history(self, margin: torch.Tensor, word_id: torch.Tensor) -> None:
        """Enters the margins [T K] of a batch into the history."""
        slot = (word_id % self.hyper.history_size).flatten()
        real = (word_id > 0).float().flatten()
        count = torch.zeros_like(self.count).index_add_(0, slot, real)
        total = torch.zeros_like(self.count).index_add_(0, slot, real * margin.flatten())
        mean, decay = total / count.clamp(min=1), self.hyper.history_decay
        new = torch.where(self.count > 0, decay * self.margin + (1 - decay) * mean, mean)
        self.margin.copy_(torch.where(count > 0, new, self.margin))
        self.count.add_(count)

    def gate(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Computes the soft gate of [... N] over the last axis: equations 2 and 3."""
        mean = masked_mean(x, mask, -1)[..., None]
        variance = masked_mean((x - mean) ** 2, mask, -1)[..., None]
        return ((x - mean) / (self.hyper.kappa * (variance + 1e-8).sqrt())).sigmoid() * mask

    def ground(
        self, maps: torch.Tensor, mask: torch.Tensor, equation: str, pixels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the importance [... K] and the regions [... K D] of maps [... K P].

        `equation` sums attention and pixels, as "tikp,ipd->tikd"; equations 2 to 5.
        """
        with torch.no_grad():
            tau = self.hyper.tau_importance
            count = mask.sum(-1, keepdim=True)
            word_maximum = tau * ((maps / tau).logsumexp(-1) - math.log(maps.shape[-1]))
            masked = (maps / tau).masked_fill(~mask[..., None], MASKED_LOGIT)
            pixel_maximum = tau * (masked.logsumexp(-2) - count.clamp(min=1).log())
            pixel_maximum = torch.where(count > 0, pixel_maximum, 0.0)
            words = self.gate(word_maximum, mask)
            gates = self.gate(pixel_maximum, torch.ones_like(pixel_maximum, dtype=torch.bool))
            factor = 4 * words[..., None] * gates[..., None, :]
        attention = (maps * factor / self.hyper.tau_region).softmax(-1)
        return words, unit(torch.einsum(equation, attention, pixels))

    @torch.no_grad()
    def affinity(
        self, pixels: torch.Tensor, guide: torch.Tensor, grid: tuple[int, int]
    ) -> torch.Tensor:
        """Computes how alike the cells of each image are [I Q Q]: equation 11, as one table."""
        hyper = self.hyper
        cells = torch.cartesian_prod(*(torch.arange(x, device=pixels.device) for x in grid))
        offset = cells[:, None] - cells
        is_near = (offset.abs() <= math.ceil(2 * hyper.guide_sigma)).all(-1)
        distance = (2 - 2 * torch.einsum("ipd,iqd->ipq", pixels, pixels)) / hyper.tau_guide
        distance += torch.cdist(guide, guide) ** 2 / hyper.tau_grey
        distance += (offset**2).sum(-1) / (2 * hyper.guide_sigma**2)
        return (-distance).masked_fill(~is_near, MASKED_LOGIT).softmax(-1)

    def forward(self, images: dict, texts: dict, batch: SimpleNamespace) -> torch.Tensor:
        """Computes the loss of a batch, a scalar []."""
        hyper, tau, word_id = self.hyper, self.hyper.tau_local, batch.word_id
        size, device = len(word_id), word_id.device
        pixels = unit(images["local"])
        weight = self.word_weights(word_id)
        gumbel = -torch.empty_like(weight).exponential_().log()
        noisy = torch.where(weight > 0, weight.clamp(min=1e-9).log() + gumbel, MASKED_LOGIT)
        sample = noisy.topk(min(hyper.num_sampled_words, weight.shape[1]), 1).indices
        words, ids = unit(texts["local"]), word_id.gather(1, sample)
        words = words.gather(1, sample[..., None].expand(-1, -1, words.shape[-1]))
        weight = weight.gather(1, sample)
        weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-6)
        mask = ids > 0

        # Round 0: all texts with all images.
        maps = torch.einsum("tkd,ipd->tikp", words, pixels) * mask[:, None, :, None]
        pair_mask = mask[:, None].expand(-1, size, -1)
        importance, regions = self.ground(maps, pair_mask, "tikp,ipd->tikd", pixels)
        matches = (words[:, None] * regions).sum(-1) * pair_mask
        in_report = (ids[:, None, :, None] == word_id[None, :, None, :]).any(-1)
        own = torch.eye(size, dtype=torch.bool, device=device)[..., None]
        allowed = own | ~in_report | (hyper.negatives == "all")
        scores = torch.einsum("tik,tk->it", matches, weight)
        report_losses = [info_nce(scores / tau)]
        logsumexp = (matches / tau).masked_fill(~allowed, MASKED_LOGIT).logsumexp(1)
        positive = (matches * own).sum(1)
        word_losses = [((logsumexp - positive / tau) * weight).sum(1).mean()]
        margin = positive - masked_mean(matches, allowed & ~own, 1)

        # Later rounds: each image with its own text and those before it.
        count = min(hyper.num_candidates, size)
        offset = torch.arange(count, device=device)
        text = (torch.arange(size, device=device)[:, None] - offset) % size  # [I C]
        image = (torch.arange(size, device=device)[:, None] + offset) % size  # [T C]
        pick = torch.arange(size, device=device)[:, None]
        nearby, near_words, near_mask = maps[text, pick], words[text], mask[text]
        importance, regions = importance[text, pick], regions[text, pick]
        fine, equation = pixels, "ickq,iqd->ickd"
        if "fine" in images:
            fine, (grid, fine_grid) = unit(images["fine"]), images["grids"]
            nearby = functional.interpolate(
                nearby.flatten(0, 1).unflatten(-1, grid), fine_grid, mode="bilinear"
            )
            nearby = nearby.flatten(2).unflatten(0, (size, count))
        affinity = None
        if hyper.guide_round_steps and "fine" in images:
            affinity = self.affinity(fine, images["guide"], fine_grid)
        near_allowed = allowed[pick, image]  # [T C K]
        labels = torch.zeros(size, dtype=torch.long, device=device)
        for _ in range(hyper.rounds):
            query = unit(near_words + hyper.eta * importance[..., None] * regions)
            closer = torch.einsum("ickd,iqd->ickq", query, fine) * near_mask[..., None]
            nearby = (1 - hyper.rho) * closer + hyper.rho * nearby
            for _ in range(hyper.guide_round_steps if affinity is not None else 0):
                nearby = torch.einsum("ickq,ipq->ickp", nearby, affinity)
            importance, regions = self.ground(nearby, near_mask, equation, fine)
            near_matches = (near_words * regions).sum(-1) * near_mask / tau  # [I C K]
            logits = near_matches[image, offset]  # [T C K]: text j with image j + r
            table = torch.einsum("tck,tk->tc", logits, weight)
            by_image = table[text, offset]
            report_losses.append(
                functional.cross_entropy(table, labels) + functional.cross_entropy(by_image, labels)
            )
            logsumexp = logits.masked_fill(~near_allowed, MASKED_LOGIT).logsumexp(1)
            word_losses.append(((logsumexp - logits[:, 0]) * weight).sum() / size)

        self.update_history(margin, ids)
        shares = [hyper.gamma ** (hyper.rounds - t) for t in range(hyper.rounds + 1)]
        cosines = unit(images["pooled"]) @ unit(texts["pooled"]).T
        scale = self.log_scale.clamp(max=math.log(50.0)).exp()
        value = hyper.weight_global * info_nce(scale * cosines) / 2
        for share, report, word in zip(shares, report_losses, word_losses, strict=True):
            omega = share * len(shares) / sum(shares)
            value = value + omega * (hyper.weight_report * report + hyper.weight_word * word)
        return value


LOSSES: dict[str, type[nn.Module]] = {
    "convirt": ConvirtLoss,
    "gloria": GloriaLoss,
    "mgca": MgcaLoss,
    "asg": AsgLoss,
    "place": PlaceLoss,
    "plan": PlanLoss,
}
# Their loops over captions, texts or images would be unrolled by the compiler, for each batch anew.
LOOPS = ("gloria", "mgca")


# Steps -------------------------------------------------------------------------------------------


class TorchStep:
    """A training step in torch: forward, backward and AdamW, on a batch that stays on the device.

    Attributes:
      encoder, loss: the modules.
      first_seconds: seconds of the first step, with compilation.
      peak_bytes: memory of a step above what was allocated before, None on a CPU.
    """

    def __init__(
        self,
        config: Config,
        batch: Batch,
        vocab_size: int,
        *,
        device: str,
        compiled: bool = False,
        tags: np.ndarray | None = None,
        is_first: bool = False,
    ) -> None:
        """Builds the step and runs it twice.

        Args:
          config: the config, for which the libraries must have equal towers and heads.
          batch: the arrays of one batch.
          vocab_size: rows of the embedding of pieces.
          device: `cpu` or `cuda`.
          compiled: whether towers and heads, and a loss without loops, go through `torch.compile`.
          tags: the features of the findings' names [F E], for ASG.
          is_first: whether no step is taken yet, and the weights stay the initial ones.

        Raises:
          UserError: the libraries have no equal of a part of the config.
        """
        is_cuda = device == "cuda"
        before = torch.cuda.memory_allocated() if is_cuda else 0
        self.encoder = Encoder(config, vocab_size).to(device).train()
        options = {"dim": config.embed_dim, "width": self.encoder.image_tower.width, "tags": tags}
        loss = LOSSES[config.method](config.hyper, **options)
        self.loss = loss.to(device).train()
        self.batch = to_tensors(batch, device)
        if self.encoder.image_tower.is_resnet:
            layouts = torch.contiguous_format, torch.channels_last
            is_measured = not is_cuda and not is_first
            seconds = [self._time_image_tower(x) if is_measured else 0.0 for x in layouts]
            self.encoder.set_layout(layouts[int(seconds[1] <= seconds[0])])
        self.optimiser = make_optimiser([self.encoder, self.loss], config)
        self.clip_norm = config.optim.clip_norm
        self.autocast: Callable[[], Any] = nullcontext
        if config.dtype == "bfloat16":
            self.autocast = lambda: torch.autocast(device, torch.bfloat16)
        if is_cuda:
            # XLA multiplies float32 in TF32 too, where the card has it.
            torch.set_float32_matmul_precision("high")
        self._encode, self._loss = self.encoder, self.loss
        if compiled:
            self._encode = torch.compile(self.encoder)
            self._loss = self.loss if config.method in LOOPS else torch.compile(self.loss)
        self.synchronise = torch.cuda.synchronize if is_cuda else lambda: None
        if is_first:
            return
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        self.first_loss = float(self.run())
        self.synchronise()
        self.first_seconds = time.perf_counter() - start
        self.run()
        self.synchronise()
        self.peak_bytes = torch.cuda.max_memory_allocated() - before if is_cuda else None

    def _time_image_tower(self, layout: torch.memory_format) -> float:
        """Returns the CPU time of the image tower, forward and backward, in a layout."""
        encoder = self.encoder
        encoder.set_layout(layout)
        x = encoder.normalise(self.batch.image).contiguous(memory_format=layout)
        seconds = 0.0
        for _ in range(2):  # the first time warms up
            start = time.process_time()
            encoder.image_tower(x, False).pooled.sum().backward()
            seconds = time.process_time() - start
        encoder.zero_grad(set_to_none=True)
        return seconds

    def compute_loss(self) -> torch.Tensor:
        """Computes the loss of the batch, a scalar []."""
        batch = self.batch
        with self.autocast():
            images, texts = self._encode(
                batch.image, batch.tokens, batch.word_index, batch.word_id.shape[1]
            )
        # Padding has vectors and attention of 0, as in the library.
        mask = batch.word_id > 0
        for name, value in texts.items():
            if name != "pooled" and value is not None:
                texts[name] = value * (mask[..., None] if value.ndim == 3 else mask)
        loss: torch.Tensor = self._loss(images, texts, batch)
        return loss

    def run(self) -> torch.Tensor:
        """Takes one step and returns its loss, a scalar []."""
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.compute_loss()
        loss.backward()
        if self.clip_norm:
            groups = self.optimiser.param_groups
            params = [param for group in groups for param in group["params"]]
            nn.utils.clip_grad_norm_(params, self.clip_norm)
        self.optimiser.step()
        return loss.detach()


def make_optimiser(modules: list[nn.Module], config: Config) -> torch.optim.AdamW:
    """Returns torch's fused AdamW, which decays matrices and kernels only."""
    params = [param for module in modules for param in module.parameters()]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": config.optim.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optim = config.optim
    return torch.optim.AdamW(groups, optim.learning_rate, (optim.b1, optim.b2), fused=True)
