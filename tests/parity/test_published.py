"""Published checkpoints in our encoders: what torch computes from the same state dict.

Each model below is written after the published layout: its state dict has the very names, and its
`forward` is the computation of the original, with small widths and random weights.
"""

import copy
import json
from collections import OrderedDict
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet
from transformers import BertConfig, BertForMaskedLM, BertModel

from configs import testing
from plan_jax.config import Config
from plan_jax.methods import METHODS
from plan_jax.model import build_components
from plan_jax.state import choose_normalisation, load_published_weights
from plan_jax.types import Batch, TextBatch, UserError
from plan_jax.weights.layouts import recognise_layout, translate_name

SIDE, WIDTH, HEADS, DEPTH, LAYERS, POSITIONS = 64, 32, 2, 3, 2, 16
VOCABULARY = build_components(Config.from_dict(testing.get_config().to_dict())).tokenizer.vocab_size
# Text 0 has three words of 2, 1 and 1 pieces; text 1 has two words. 3 and 4 stand for [CLS], [SEP].
TOKENS = np.asarray([[3, 10, 11, 12, 13, 4, 0, 0], [3, 20, 21, 4, 0, 0, 0, 0]])
WORDS = np.asarray([[-1, 0, 0, 1, 2, -1, -1, -1], [-1, 0, 1, -1, -1, -1, -1, -1]])
WORD_ID = np.asarray([[10, 12, 13, 0], [20, 21, 0, 0]])
BERT = {"name": "bert_tiny", "width": WIDTH, "heads": HEADS, "depth": DEPTH, "positions": POSITIONS}
RESNET = {"name": "resnet50", "depths": (1, 1, 1, 1)}
VIT = {"name": "vit_tiny", "patch": 16, "width": WIDTH, "heads": HEADS, "depth": LAYERS}


# The originals ----------------------------------------------------------------------------------


def draw_images():
    """Returns two grey images as UInt8[2 SIDE SIDE 1]."""
    return np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 1)).astype(np.uint8)


def scale(mean, std):
    """Returns the images as a torch model sees them: three channels, (x - mean) / std."""
    x = torch.from_numpy(np.moveaxis(draw_images(), -1, 1)).float() / 255
    mean, std = (torch.tensor(value).reshape(-1, 1, 1) for value in (mean, std))
    return (x.repeat(1, 3, 1, 1) - mean) / std


HALF, IMAGENET = ([0.5], [0.5]), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def make_bert(**options):
    """Returns the config of a small BERT."""
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=POSITIONS,
        **options,
    )


def run_bert(model, **options):
    """Returns the hidden states of all layers, and BERT's output."""
    tokens = torch.from_numpy(TOKENS).long()
    output = model(tokens, (tokens > 0).long(), output_hidden_states=True, **options)
    return output.hidden_states, output


def sum_words(pieces):
    """Returns the sums of the pieces of each word, by a loop."""
    words = torch.zeros(2, 4, pieces.shape[-1])
    for text in range(2):
        for piece, word in enumerate(WORDS[text]):
            if word >= 0:
                words[text, word] += pieces[text, piece]
    return words


def run_resnet(resnet, x, num_stages=4):
    """Returns the maps after each stage."""
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))
    maps = []
    for stage in range(num_stages):
        x = getattr(resnet, f"layer{stage + 1}")(x)
        maps.append(x)
    return maps


def make_resnet():
    """Returns torchvision's ResNet of bottlenecks, one a stage."""
    return ResNet(Bottleneck, [1, 1, 1, 1])


def make_mlp(width, hidden, out, conv=False):
    """Returns MGCA's head: two layers, each with a BatchNorm."""
    layer = partial(nn.Conv1d, kernel_size=1) if conv else nn.Linear
    return nn.Sequential(
        layer(width, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        layer(hidden, out),
        nn.BatchNorm1d(out, affine=False),
    )


def pixels_of(maps):
    """Returns maps [B C Y X] as pixels [B P C]."""
    return maps.flatten(2).transpose(1, 2)


class Model(nn.Module):
    """A published checkpoint: `config` are fields of ours, `prefix` is what its file adds."""

    config: dict = {}
    prefix = ""

    def add(self, path, module):
        """Adds a module under a dotted path, as `a.b.c`."""
        *parents, name = path.split(".")
        parent = self
        for part in parents:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(name, module)
        return module


class Mgca(Model):
    """MGCA with a ResNet."""

    config = {
        "vision": RESNET | {"resize": 75},
        "text": BERT,
        "heads": dict.fromkeys(("image_global", "image_local", "text_global", "text_local"), "mlp"),
        "method": "mgca",
        "embed_dim": 12,
        "head_hidden_dim": 20,
    }

    def __init__(self):
        super().__init__()
        self.add("img_encoder_q.model", self.make_image_model())
        self.add("text_encoder_q.model", BertModel(make_bert(), add_pooling_layer=False))
        widths = self.image_widths
        self.add("img_encoder_q.global_embed.head", make_mlp(widths[0], 20, 12))
        self.add("img_encoder_q.local_embed.head", make_mlp(widths[1], 20, 12, conv=True))
        self.add("text_encoder_q.global_embed.head", make_mlp(WIDTH, 20, 12))
        self.add("text_encoder_q.local_embed.head", make_mlp(WIDTH, 20, 12, conv=True))
        self.prototype_layer = nn.Linear(12, 5, bias=False)
        self.patch_local_atten_layer = nn.MultiheadAttention(12, 1)

    image_widths = (2048, 1024)

    def make_image_model(self):
        resnet = make_resnet()
        resnet.fc = nn.Identity()
        return resnet

    def encode(self, x):
        x = F.interpolate(x, size=(75, 75), mode="bilinear", align_corners=True)
        maps = run_resnet(self.img_encoder_q.model, x)
        return maps[3].mean((2, 3)), pixels_of(maps[2])

    def state(self):
        # The original's embeddings add no type, and the first position to every token.
        state = self.state_dict()
        del state["text_encoder_q.model.embeddings.token_type_embeddings.weight"]
        return state

    def forward(self):
        pooled, local = self.encode(scale(*HALF))
        text = self.text_encoder_q.model
        text.embeddings.token_type_embeddings.weight.data.zero_()
        pieces = run_bert(text, position_ids=torch.zeros(2, 8, dtype=torch.long))[0][-1]
        words = sum_words(pieces)

        def apply(head, x):
            return head(x.transpose(1, 2)).transpose(1, 2)

        return {
            "image_pooled": self.img_encoder_q.global_embed.head(pooled),
            "image_local": apply(self.img_encoder_q.local_embed.head, local),
            "text_pooled": self.text_encoder_q.global_embed.head(pieces[:, 0]),
            "text_local": apply(self.text_encoder_q.local_embed.head, words),
        }


class MgcaVit(Mgca):
    """MGCA with a ViT."""

    config = Mgca.config | {"vision": VIT}
    image_widths = (WIDTH, WIDTH)

    def make_image_model(self):
        return make_vit()

    def encode(self, x):
        tokens = self.img_encoder_q.model.forward_features(x)
        return tokens[:, 0], tokens[:, 1:]


def make_vit():
    """Returns timm's ViT without a classifier."""
    return VisionTransformer(
        img_size=SIDE,
        patch_size=16,
        embed_dim=WIDTH,
        depth=LAYERS,
        num_heads=HEADS,
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )


class Gloria(Model):
    """GLoRIA: a linear layer, a convolution without bias, and no head of the texts."""

    config = {
        "vision": RESNET | {"resize": 75},
        "text": BERT | {"pool": "mean", "sum_last_layers": 2},
        "heads": {
            "image_global": "linear",
            "image_local": "linear",
            "text_global": "none",
            "text_local": "none",
        },
        "method": "gloria",
        "hyper": {"retrieval_score": "max"},
        "embed_dim": WIDTH,
    }

    def __init__(self):
        super().__init__()
        resnet = self.add("gloria.img_encoder.model", make_resnet())
        resnet.fc = nn.Identity()
        self.add("gloria.img_encoder.global_embedder", nn.Linear(2048, WIDTH))
        self.add("gloria.img_encoder.local_embedder", nn.Conv2d(1024, WIDTH, 1, bias=False))
        self.add("gloria.text_encoder.model", BertModel(make_bert()))

    def forward(self):
        encoder, text = self.gloria.img_encoder, self.gloria.text_encoder.model
        x = F.interpolate(scale(*HALF), size=(75, 75), mode="bilinear", align_corners=True)
        maps = run_resnet(encoder.model, x)
        pooled = encoder.global_embedder(maps[3].mean((2, 3)))
        local = pixels_of(encoder.local_embedder(maps[2]))
        layers = run_bert(text)[0][-2:]
        words = sum(sum_words(layer) for layer in layers)
        # [CLS] and [SEP] are entries beside the words, and zeros fill up all slots of the mean.
        real = torch.from_numpy(TOKENS > 0)[..., None]
        sentence = sum((layer * real).sum(1) / TOKENS.shape[1] for layer in layers)
        scores = torch.zeros(2, 2)
        for image in range(2):
            for n, count in enumerate((3, 2)):
                word = words[n, :count]
                attention = torch.softmax(local[image] @ word.T, -1)
                attention = torch.softmax(4 * attention.T, -1)
                cosine = F.cosine_similarity(word, attention @ local[image], dim=-1)
                scores[image, n] = torch.log(torch.exp(5 * cosine).max())
        cosines = F.normalize(pooled, dim=-1) @ F.normalize(sentence, dim=-1).T
        return {
            "image_pooled": pooled,
            "image_local": local,
            "text_local": words,
            "global": cosines,
            "local": scores,
            "both": (cosines + scores) / 2,
        }


class CxrBert(BertForMaskedLM):
    """CXR-BERT: a masked language model, and a projection of [CLS]."""

    def __init__(self, out):
        super().__init__(make_bert())
        self.cls_projection_head = nn.ModuleDict(
            {
                "dense_to_hidden": nn.Linear(WIDTH, out),
                "LayerNorm": nn.LayerNorm(out, eps=1e-12),
                "dense_to_output": nn.Linear(out, out),
            }
        )

    def project(self):
        head = self.cls_projection_head
        x = F.gelu(head["dense_to_hidden"](run_bert(self)[0][-1][:, 0]))
        return head["dense_to_output"](head["LayerNorm"](x))


def make_projector(width, out):
    """Returns BioViL's projector of pixels."""
    return nn.Sequential(
        nn.Conv2d(width, out, 1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
        nn.Conv2d(out, out, 1),
    )


class Biovil(Model):
    """BioViL's image model, with CXR-BERT in a folder of its own."""

    config = {
        "vision": RESNET | {"local_stage": 3},
        "text": BERT,
        "heads": {
            "image_global": "mean",
            "image_local": "mlp_bn",
            "text_global": "mlp_ln",
            "text_local": "shared",
        },
        "method": "convirt",
        "embed_dim": 12,
        "head_hidden_dim": 12,
    }

    def __init__(self, projected=2048):
        super().__init__()
        self.add("encoder.encoder", make_resnet())
        self.add("projector.model", make_projector(projected, 12))
        self.hidden_parts = [CxrBert(12)]  # in another file

    def fuse(self, maps):
        return maps

    def forward(self):
        x = scale([0.0], [1.0])
        maps = self.projector.model(self.fuse(run_resnet(self.encoder.encoder, x)[3]))
        text = self.hidden_parts[0].project()
        pooled = maps.mean((2, 3))
        patches, phrase = F.normalize(pixels_of(maps), dim=-1), F.normalize(text, dim=-1)
        return {
            "image_pooled": pooled,
            "image_local": pixels_of(maps),
            "text_pooled": text,
            "global": F.normalize(pooled, dim=-1) @ phrase.T,
            "heatmap": (patches @ phrase[..., None])[..., 0],
        }


class BiovilT(Biovil):
    """BioViL-T, for an image without a previous one."""

    def __init__(self):
        super().__init__(projected=16)
        self.add("encoder.backbone_to_vit", nn.Conv2d(2048, 8, 1, bias=False))
        self.encoder.missing_previous_emb = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.add("encoder.vit_pooler.norm_post", nn.LayerNorm(8))

    def fuse(self, maps):
        maps = self.encoder.backbone_to_vit(maps)
        missing = self.encoder.missing_previous_emb.repeat(2, 1, *maps.shape[2:])
        return torch.cat([maps, missing], 1)


class Convirt(Model):
    """ConVIRT as BenchX has it: BERT's pooler, and heads of two layers."""

    config = {
        "vision": RESNET | {"local_stage": 3},
        "text": BERT | {"pool": "pooler"},
        "heads": {
            "image_global": "mlp_relu",
            "image_local": "shared",
            "text_global": "mlp_relu",
            "text_local": "shared",
        },
        "method": "convirt",
        "embed_dim": 12,
        "head_hidden_dim": 12,
    }

    def __init__(self):
        super().__init__()
        self.add("linguistic.encoder", BertModel(make_bert()))
        children = OrderedDict(list(make_resnet().named_children())[:-1])  # without fc
        self.add("visual.model", nn.Sequential(children))
        self.vis_proj = nn.Sequential(nn.Linear(2048, 12), nn.ReLU(), nn.Linear(12, 12))
        self.lin_proj = nn.Sequential(nn.Linear(WIDTH, 12), nn.ReLU(), nn.Linear(12, 12))

    def forward(self):
        pooled = self.vis_proj(self.visual.model(scale(*IMAGENET)).flatten(1))
        text = self.lin_proj(run_bert(self.linguistic.encoder)[1].pooler_output)
        cosines = F.normalize(pooled, dim=-1) @ F.normalize(text, dim=-1).T
        return {"image_pooled": pooled, "text_pooled": text, "global": cosines}


class Mflag(Model):
    """M-FLAG: a ResNet, CXR-BERT frozen, and MGCA's kind of heads."""

    config = Mgca.config | {
        "vision": RESNET | {"local_stage": 3},
        "heads": {
            "image_global": "mlp",
            "image_local": "shared",
            "text_global": "mlp",
            "text_local": "shared",
        },
        "method": "convirt",
    }

    def __init__(self):
        super().__init__()
        self.encoder = make_resnet()
        self.encoder.fc = nn.Identity()
        self.proj_v, self.proj_t = make_mlp(2048, 20, 12), make_mlp(WIDTH, 20, 12)
        self.lm_model = CxrBert(7)

    def forward(self):
        pooled = self.proj_v(self.encoder(scale(*HALF)))
        return {
            "image_pooled": pooled,
            "text_pooled": self.proj_t(run_bert(self.lm_model)[0][-1][:, 0]),
        }


class Medclip(Model):
    """MedCLIP's ResNet, whose classifier is the head, beside its text tower."""

    config = {"vision": RESNET}

    def __init__(self):
        super().__init__()
        resnet = self.add("vision_model.model", make_resnet())
        resnet.fc = nn.Linear(2048, 4, bias=False)
        self.add("text_model.model", BertModel(make_bert()))
        self.add("text_model.projection_head", nn.Linear(WIDTH, 4, bias=False))
        self.logit_scale = nn.Parameter(torch.ones(()))

    def forward(self):
        x = scale([0.5862785803043838], [0.27950088968644304])
        maps = run_resnet(self.vision_model.model, x)
        return {"tower_map": pixels_of(maps[3]), "tower_pooled": maps[3].mean((2, 3))}


class Medklip(Model):
    """MedKLIP: the first three stages of a ResNet, by the numbers of its children."""

    config = {"vision": RESNET | {"widths": (64, 128, 256), "depths": (1, 1, 1)}}
    prefix = "module."

    def __init__(self):
        super().__init__()
        self.res_features = nn.Sequential(*list(make_resnet().children())[:-3])
        self.res_l1, self.classifier = nn.Linear(4, 4), nn.Linear(4, 4)
        self.disease_embedding_layer, self.cl_fc = nn.Linear(4, 4), nn.Linear(4, 4)
        self.add("decoder.norm", nn.LayerNorm(4))

    def forward(self):
        maps = self.res_features(scale(*IMAGENET))
        return {"tower_map": pixels_of(maps), "tower_pooled": maps.mean((2, 3))}


class Mrm(Model):
    """MRM: timm's names, beside two decoders."""

    config = {"vision": VIT}

    def __init__(self):
        super().__init__()
        self.hidden_parts = [make_vit()]  # its names have no prefix
        self.decoder_embed, self.bert_mlp = nn.Linear(4, 4), nn.Linear(4, 4)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 17, 4))
        self.add("decoder_blocks.0.norm1", nn.LayerNorm(4))
        self.add("bert_encoder.model.bert.embeddings.LayerNorm", nn.LayerNorm(4))

    def state(self):
        return self.state_dict() | self.hidden_parts[0].state_dict()

    def forward(self):
        tokens = self.hidden_parts[0].forward_features(scale([0.4978], [0.2449]))
        return {"tower_map": tokens[:, 1:], "tower_pooled": tokens[:, 0]}


class RefersBlock(nn.Module):
    """A layer of REFERS' ViT."""

    def __init__(self):
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.ffn_norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.ffn = nn.ModuleDict(
            {"fc1": nn.Linear(WIDTH, 4 * WIDTH), "fc2": nn.Linear(4 * WIDTH, WIDTH)}
        )
        names = ("query", "key", "value", "out")
        self.attn = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in names})

    def forward(self, x):
        y = self.attention_norm(x)
        q, k, v = (
            self.attn[name](y).reshape(2, -1, HEADS, WIDTH // HEADS).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        weights = torch.softmax(q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5, -1)
        x = x + self.attn["out"]((weights @ v).transpose(1, 2).reshape(2, -1, WIDTH))
        return x + self.ffn["fc2"](F.gelu(self.ffn["fc1"](self.ffn_norm(x))))


class Refers(Model):
    """REFERS: a ViT with names of its own, beside a decoder of reports."""

    config = {"vision": VIT}
    vit = "visual.vit.transformer"

    def __init__(self):
        super().__init__()
        self.add(f"{self.vit}.embeddings.patch_embeddings", nn.Conv2d(3, WIDTH, 16, 16))
        self.add(f"{self.vit}.encoder.layer", nn.ModuleList(RefersBlock() for _ in range(LAYERS)))
        self.add(f"{self.vit}.encoder.encoder_norm", nn.LayerNorm(WIDTH, eps=1e-6))
        self.tower().embeddings.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.tower().embeddings.position_embeddings = nn.Parameter(torch.randn(1, 17, WIDTH))
        self.add("textual.embedding.words", nn.Embedding(5, 4))
        self.add("contrastive_bert.text_encoder", BertModel(make_bert()))

    def tower(self):
        return self.get_submodule(self.vit)

    def forward(self):
        tower = self.tower()
        patches = pixels_of(tower.embeddings.patch_embeddings(scale(*IMAGENET)))
        x = torch.cat([tower.embeddings.cls_token.expand(2, -1, -1), patches], 1)
        x = x + tower.embeddings.position_embeddings
        for block in tower.encoder.layer:
            x = block(x)
        x = tower.encoder.encoder_norm(x)
        return {"tower_map": x[:, 1:], "tower_pooled": x[:, 0]}


class RefersTower(Refers):
    """REFERS as BenchX converts it."""

    vit = "visual.vit"


MODELS = {
    model.__name__: model
    for model in (
        Mgca,
        MgcaVit,
        Gloria,
        Biovil,
        BiovilT,
        Convirt,
        Mflag,
        Medclip,
        Medklip,
        Mrm,
        Refers,
        RefersTower,
    )
}


# Ours -------------------------------------------------------------------------------------------


def make_original(name):
    """Returns a model with random weights and statistics, none of which is 0 or 1."""
    torch.manual_seed(0)
    model = MODELS[name]()
    hidden = getattr(model, "hidden_parts", ())
    for part in (model, *hidden):
        randomise(part)
    return model.eval()


def randomise(module):
    """Changes vectors and statistics in place, so that no exact 0 or 1 hides a mistake."""
    for key, value in module.state_dict().items():
        if value.is_floating_point() and value.ndim == 1:
            value.add_(
                torch.rand_like(value) if key.endswith("var") else 0.2 * torch.randn_like(value)
            )
    module.eval()


def state_of(model):
    """Returns the state dict as the file has it."""
    state = model.state() if hasattr(model, "state") else model.state_dict()
    return {model.prefix + key: value.clone() for key, value in state.items()}


def save_model(model, state, folder):
    """Writes the files of a model; returns `config.weights`."""
    path = folder / "published.pth"
    torch.save({"state_dict": state, "epoch": 3}, path)
    weights = {"vision": str(path), "text": str(path), "heads": "towers"}
    if isinstance(model, Biovil):
        text = folder / "cxr_bert"
        text.mkdir()
        (text / "config.json").write_text(json.dumps(make_bert().to_dict()))
        tensors = {key: value.clone() for key, value in model.hidden_parts[0].state_dict().items()}
        save_file(tensors, text / "model.safetensors")
        weights["text"] = str(text)
    if "heads" not in model.config:
        weights |= {"text": "", "heads": ""}
    return weights


def make_config(model, weights):
    """Returns the config of our encoders for a model, with the scale of images from its weights."""
    content = copy.deepcopy(testing.get_config().to_dict())
    content |= {"method": "convirt", "hyper": {}, "fine_map": False, "steps": 0, "channels": 3}
    content |= {"text": {"name": "bert_tiny"}, "normalisation": "weights"}
    content |= copy.deepcopy(model.config)
    content["data"] |= {"size": SIDE}
    content["weights"] |= weights
    content["eval"]["tasks"] = ("retrieval",) if weights["heads"] else ("classification",)
    return choose_normalisation(Config.from_dict(content))


def load(model, state, folder):
    """Returns our encoder with the weights of a model, and its config."""
    config = make_config(model, save_model(model, state, folder))
    encoder = build_components(config).encoder
    text = TextBatch(*map(jnp.asarray, (TOKENS, WORDS, WORD_ID, np.where(WORD_ID > 0, 0, -1))))
    batch = Batch(jnp.asarray(draw_images()), text)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), batch)
    variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan), shapes)
    return encoder, load_published_weights(encoder, variables, config), batch, config


def compute(encoder, variables, batch, config):
    """Returns what our encoder and method compute, by the names of `forward`."""
    stages = encoder.apply(variables, batch.image, method="extract_stages")
    outputs = {"tower_map": stages.maps[-1].reshape(2, -1, stages.maps[-1].shape[-1])}
    outputs["tower_pooled"] = stages.pooled
    if not config.weights.heads:
        return outputs
    images, texts = encoder.apply(variables, batch)
    method = METHODS[config.method]
    heat, _ = method.heatmap({}, {}, images, texts, config.hyper)
    return (
        outputs
        | {"image_pooled": images.pooled, "image_local": images.local, "heatmap": heat[:, 0]}
        | {"text_pooled": texts.pooled, "text_local": texts.local}
        | method.similarity({}, {}, images, texts, config.hyper)
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_published_model_computes_what_torch_does(name, tmp_path):
    model = make_original(name)
    state = state_of(model)
    with torch.no_grad():
        expected = model()
    actual = compute(*load(model, state, tmp_path))
    for key, value in expected.items():
        value, ours = value.numpy(), np.asarray(actual[key])
        if key == "text_local":
            mask = (WORD_ID > 0)[..., None]
            value, ours = value * mask, ours * mask
        error = np.abs(ours - value).max() / np.abs(value).max()
        print(f"{name} {key}: {error:.1e}")
        assert value.shape == ours.shape and error < 1e-4, (key, error)


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_that_lacks_an_array_is_refused(name, tmp_path):
    model = make_original(name)
    state = state_of(model)
    layout = recognise_layout(state, "vision")
    names = {key: translate_name(key.removeprefix(layout.prefix), layout.kind) for key in state}
    key = [key for key in state if key.startswith(layout.prefix) and names[key]][-1]
    del state[key]
    with pytest.raises(UserError, match="so nothing was loaded") as error:
        load(model, state, tmp_path)
    assert f"missing: {names[key]} " in str(error.value)


def test_clip_is_refused_by_one_sentence(tmp_path):
    """PTUnifier's image tower, which ours cannot compute."""
    prefix = "vision_encoder.visual."
    state = {
        f"{prefix}class_embedding": torch.zeros(4),
        f"{prefix}conv1.weight": torch.zeros(4, 3, 16, 16),
        f"{prefix}transformer.resblocks.0.attn.in_proj_weight": torch.zeros(12, 4),
    }
    with pytest.raises(UserError, match=r"hold CLIP's ViT \(PTUnifier.*QuickGELU") as error:
        load(make_original("Mrm"), state, tmp_path)
    assert "\n" not in str(error.value)


def test_a_roberta_is_refused_by_one_sentence(tmp_path):
    """ViLMedic's ConVIRT has one by default, and BERT's names."""
    model = make_original("Convirt")
    state = state_of(model)
    key = "linguistic.encoder.embeddings.token_type_embeddings.weight"
    state[key] = state[key][:1].clone()
    with pytest.raises(UserError, match=r"hold a RoBERTa, .* leave weights.text empty") as error:
        load(model, state, tmp_path)
    assert "\n" not in str(error.value)
