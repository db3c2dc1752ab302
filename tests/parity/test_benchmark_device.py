"""Compares the steps of `tools/benchmark.py device` in torch with the library's own.

Tiny towers, with torch's weights on both sides; texts fill all slots where the original counts
padding, and what is random is made certain. Loss and norm of the gradient of the first step have to
agree: a side that computes less would be faster.
"""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from plan_jax.methods import plan
from plan_jax.model import build_components
from plan_jax.state import init_state
from plan_jax.types import Features, MethodContext, UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import benchmark_device
from benchmark_device_torch import Encoder, PlanLoss, TorchStep, to_tensors

BATCH, FINDINGS = 16, ("effusion", "opacity", "pneumothorax")
COMMON = {
    "data.size": "32",
    "data.max_tokens": "24",
    "data.max_words": "6",
    "text.name": "bert_tiny",
    "text.dropout": "0.0",
    "embed_dim": "16",
    "head_hidden_dim": "32",
    "weights.any_normalisation": "True",
}
# Method -> overrides of its config. GLoRIA and ConVIRT have texts of several lengths.
CASES = {
    "convirt": {"data.max_words": "22"},
    "gloria": {"data.max_words": "22", "text.sum_last_layers": "1"},
    "mgca": {"hyper.num_prototypes": "10"},
    "asg": {"hyper.num_layers": "2", "hyper.hidden_dim": "32", "hyper.dropout_rate": "0.0"},
    "place": {"hyper.mask_ratio": "1.0"},  # all patches are hidden
    "plan": {"hyper.guide_round_steps": "0"},  # all words are drawn; no finer map
}


def load_config(folder, method):
    vocabulary = benchmark_device.write_vocabulary(folder / "vocab.txt", 4000)
    overrides = {**COMMON, **CASES[method]}
    config = benchmark_device.load_paper_config(method, "float32", BATCH, vocabulary, overrides)
    return dataclasses.replace(config, vision={"name": "vit_tiny"}, fine_map=False)


def to_array(tensor):
    return jnp.asarray(tensor.detach().numpy())


def dense(linear):
    bias = {} if linear.bias is None else {"bias": to_array(linear.bias)}
    return {"kernel": to_array(linear.weight).T, **bias}


def attention(linears):
    names = ("query", "key", "value", "out")
    return {name: dense(linear) for name, linear in zip(names, linears, strict=True)}


def split_projections(module):
    """Returns the projections of torch's MultiheadAttention."""
    parts = zip(module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3), strict=True)
    names = ("query", "key", "value")
    projections = {
        name: {"kernel": to_array(weight).T, "bias": to_array(bias)}
        for name, (weight, bias) in zip(names, parts, strict=True)
    }
    return {**projections, "out": dense(module.out_proj)}


def block(module):
    return {
        "attention": attention(module.projections[:4]),
        "cross": attention(module.projections[4:]),
        "fc1": dense(module.fc1),
        "fc2": dense(module.fc2),
    }


def method_params(name, loss):
    """Returns the parameters of a loss under the names of the library, norms left out."""
    if name == "mgca":
        return {"prototypes": to_array(loss.prototypes)}
    if name == "asg":
        layers = {
            f"layer{n}": {
                "attention": split_projections(layer.self_attn),
                "cross": split_projections(layer.multihead_attn),
                "fc1": dense(layer.linear1),
                "fc2": dense(layer.linear2),
            }
            for n, layer in enumerate(loss.decoder.layers)
        }
        return {"decoder": {**layers, "logit": dense(loss.logit)}}
    if name == "place":
        extractor = {f"block{n}": block(module) for n, module in enumerate(loss.extractor)}
        decoder = {f"block{n}": block(module) for n, module in enumerate(loss.decoder)}
        queries, token = to_array(loss.queries), to_array(loss.token)
        return {
            "extractor": {**extractor, "queries": queries, "head": dense(loss.head)},
            "sentence": dense(loss.sentence),
            "decoder": {**decoder, "token": token, "out": dense(loss.out)},
        }
    return {}


def head_params(encoder):
    """Returns the parameters of the projection heads under the names of the library."""
    heads = {}
    for name, head in encoder.heads.items():
        first = {} if head.fc1 is None else {"fc1": dense(head.fc1)}
        heads[f"{name}_head"] = {**first, "fc2": dense(head.fc2)}
    if encoder.fine_head is not None:
        fine = {name: dense(getattr(encoder.fine_head, name)) for name in ("lateral", "top")}
        heads["image_fine_head"] = fine
    return heads


def merge(old, new):
    """Returns a tree with the leaves of another in place of its own."""
    for name, value in new.items():
        assert name in old, name
        is_tree = isinstance(value, dict)
        assert is_tree or old[name].shape == value.shape, name
        old = {**old, name: merge(old[name], value) if is_tree else value}
    return old


def save_towers(config, encoder, folder):
    """Saves the towers, and returns the config that reads them."""
    torch.save(encoder.image_tower.tower.state_dict(), folder / "vision.pth")
    encoder.text_tower.bert.save_pretrained(folder / "text")
    weights = dataclasses.replace(
        config.weights, vision=str(folder / "vision.pth"), text=str(folder / "text")
    )
    return dataclasses.replace(config, weights=weights)


@pytest.mark.parametrize("name", CASES)
def test_the_first_losses_and_gradients_agree(name, tmp_path):
    config = load_config(tmp_path, name)
    components = build_components(config)
    batch = benchmark_device.draw_batch(config, len(FINDINGS), 5)
    lengths = (batch.text.word_id > 0).sum(1)
    assert (len(set(lengths)) > 1) == (name in ("convirt", "gloria"))

    torch.manual_seed(0)
    encoder = Encoder(config, components.tokenizer.vocab_size)
    loaded = save_towers(config, encoder, tmp_path)
    state, _ = init_state(components, loaded, batch, FINDINGS)
    torch.manual_seed(0)  # the same towers and heads
    step = TorchStep(
        config, batch, 4000, device="cpu", tags=state.memory.get("tags"), is_first=True
    )
    params = {
        "encoders": merge(state.params["encoders"], head_params(step.encoder)),
        "method": merge(state.params["method"], method_params(name, step.loss)),
    }

    @jax.jit
    def run(params, batch):
        def loss(params):
            variables = {"params": params["encoders"], "batch_stats": state.batch_stats}
            features, _ = components.encoder.apply(variables, batch, True, mutable=["batch_stats"])
            return components.method.loss(
                params["method"],
                state.memory,
                *features,
                dict(batch.extra),
                key=jax.random.key(0),
                step=jnp.array(0),
                hyper=config.hyper,
            )[0]

        value, grads = jax.value_and_grad(loss)(params)
        return value, optax.tree.norm(grads)

    value, norm = run(params, jax.tree.map(jnp.asarray, batch))
    torch_loss = step.compute_loss()
    torch_loss.backward()
    grads = [
        param.grad
        for module in (step.encoder, step.loss)
        for param in module.parameters()
        if param.grad is not None
    ]
    torch_norm = torch.stack([grad.norm() for grad in grads]).norm()
    print(f"\n{name}: losses {value:.6f} {torch_loss:.6f}, norms {norm:.6f} {torch_norm:.6f}")
    np.testing.assert_allclose(value, torch_loss.item(), rtol=1e-4)
    np.testing.assert_allclose(norm, torch_norm.item(), rtol=2e-3)


def test_the_maps_of_a_resnet_agree(tmp_path):
    config = load_config(tmp_path, "plan")
    vision = {"name": "resnet18", "resize": 64}
    config = dataclasses.replace(config, vision=vision, fine_map=True)
    components = build_components(config)
    batch = benchmark_device.draw_batch(config, 3, 5)
    torch.manual_seed(0)
    encoder = Encoder(config, components.tokenizer.vocab_size)
    encoder.set_layout(torch.channels_last)
    state, _ = init_state(components, save_towers(config, encoder, tmp_path), batch)
    params = merge(state.params["encoders"], head_params(encoder))

    @jax.jit
    def run(params, image):
        variables = {"params": params, "batch_stats": state.batch_stats}
        options = {"mutable": ["batch_stats"], "method": "encode_image"}
        images, _ = components.encoder.apply(variables, image, True, **options)
        return {name: getattr(images, name) for name in components.method.IMAGE_FEATURES}

    tensors = to_tensors(batch, "cpu")
    words = tensors.word_id.shape[1]
    expected, _ = encoder(tensors.image, tensors.tokens, tensors.word_index, words)
    for name, actual in run(params, jnp.asarray(batch.image)).items():
        # BatchNorm's statistics are over a few pixels, which amplifies the rounding.
        value = expected[name].detach().numpy()
        np.testing.assert_allclose(actual, value, atol=1e-2, err_msg=name)
    assert expected["grids"] == ((4, 4), (8, 8))


def test_the_loss_of_plan_with_a_finer_map():
    hyper = plan.Hyper(
        rounds=2,
        eta=0.5,
        num_sampled_words=6,
        num_candidates=3,
        guide_round_steps=2,
        guide_sigma=0.7,
    )
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    word_id = rng.integers(1, 9, (5, 6)).astype(np.int32)
    word_id[1, 4:] = 0
    image = {"pooled": draw(5, 8), "local": draw(5, 6, 8), "fine": draw(5, 24, 8)}
    text = {"pooled": draw(5, 8), "local": draw(5, 6, 8) * (word_id > 0)[..., None]}
    guide = draw(5, 24, 2)
    loss = PlanLoss(hyper)
    _, memory = plan.init(jax.random.key(0), MethodContext(8), hyper)

    @jax.jit
    def run(memory, learned, word_id):
        def value(learned):
            images = Features(
                **learned[0],
                mask=jnp.ones((5, 6), bool),
                grid=(2, 3),
                fine_grid=(4, 6),
                guide=jnp.asarray(guide),
            )
            texts = Features(**learned[1], mask=word_id > 0, word_id=word_id)
            params = {"log_scale": jnp.log(1 / hyper.tau)}
            options = {"key": jax.random.key(0), "step": jnp.array(0), "hyper": hyper}
            value, (_, new) = plan.loss(params, memory, images, texts, {}, **options)
            return value, new

        return jax.value_and_grad(value, has_aux=True)(learned)

    tensors = [
        {name: torch.tensor(x, requires_grad=True) for name, x in side.items()}
        for side in (image, text)
    ]
    batch = SimpleNamespace(word_id=torch.tensor(word_id.astype(np.int64)))
    learned = jax.tree.map(jnp.asarray, (image, text))
    for _ in range(2):  # the second step reads the history of the first
        (value, memory), grads = run(memory, learned, jnp.asarray(word_id))
        for tensor in (*tensors[0].values(), *tensors[1].values()):
            tensor.grad = None
        others = {"grids": ((2, 3), (4, 6)), "guide": torch.tensor(guide)}
        torch_value = loss(tensors[0] | others, tensors[1], batch)
        torch_value.backward()
        np.testing.assert_allclose(value, torch_value.item(), rtol=1e-5)
        for actual, expected in zip(grads, tensors, strict=True):
            for name, grad in actual.items():
                np.testing.assert_allclose(grad, expected[name].grad, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(memory["similarity_margin"], loss.margin, atol=1e-5)
        np.testing.assert_allclose(memory["count"], loss.count)


def test_sides_are_measured_in_turns(tmp_path):
    config = load_config(tmp_path, "convirt")
    result = benchmark_device.measure_method(config, ("jax", "torch"), repeats=2, steps=1)
    assert [row["side"] for row in result["rows"]] == ["jax", "torch"]
    assert all(len(row["seconds"]) == 2 for row in result["rows"])
    assert all(0 < loss < 20 for loss in result["first_losses"].values())
    ours, theirs = benchmark_device.format_rows(result)
    assert "| jax |" in ours and "| torch |" in theirs


def test_bfloat16_and_a_config_without_an_equal(tmp_path):
    config = dataclasses.replace(load_config(tmp_path, "mgca"), dtype="bfloat16")
    batch = benchmark_device.draw_batch(config, 3, 5)
    step = TorchStep(config, batch, 4000, device="cpu")
    assert step.first_loss > 0 and np.isfinite(float(step.run()))
    assert all(param.dtype == torch.float32 for param in step.encoder.parameters())
    for change, message in (
        ({"vision": {"name": "resnet_tiny"}}, "resnet_tiny has no equal in torchvision or timm"),
        ({"text": {"name": "bert_tiny", "pool": "attention"}}, "pool attention .* has no equal"),
        ({"channels": 1}, "channels 1 has no equal here"),
    ):
        with pytest.raises(UserError, match=message):
            Encoder(dataclasses.replace(config, **change), 4000)
