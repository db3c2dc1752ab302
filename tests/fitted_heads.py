"""A small tower, a linear head on it and labelled images, shared by the tests of heads."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from plan_jax.heads import fit, head_on_tower
from plan_jax.heads.examples import StoredRows
from plan_jax.types import Stages, Tower


class PatchNet(nn.Module):
    """Four patches of an image, a dense layer, BatchNorm."""

    @nn.compact
    def __call__(self, x, train):
        """Returns a map of 2 x 2."""
        x = x.astype(jnp.float32).reshape(-1, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4) / 255
        x = nn.Dense(6, name="fc")(x.reshape(-1, 2, 2, 4))
        return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))


class ScalarHead(nn.Module):
    """A linear layer with one output."""

    @nn.compact
    def __call__(self, features, examples, train=False):
        """Returns one logit for each image."""
        return nn.Dense(1)(features)[:, 0]


def make_tower():
    net = PatchNet()
    variables = net.init(jax.random.key(0), jnp.zeros((2, 4, 4, 1), jnp.uint8), False)

    def apply(variables, images, train=False, native=False):
        if not train:
            x, stats = net.apply(variables, images, False), variables["batch_stats"]
        else:
            x, changed = net.apply(variables, images, True, mutable=["batch_stats"])
            stats = changed["batch_stats"]
        return Stages(x.mean((1, 2)) + (100.0 if native else 0.0), (x,)), stats

    return Tower("net", variables, apply)


def labelled_images(count, seed=0):
    """Images whose upper half is bright or not, and which of them are bright."""
    random = np.random.default_rng(seed)
    is_bright = random.random(count) < 0.5
    images = random.integers(0, 120, (count, 4, 4, 1)).astype(np.uint8)
    images[is_bright, :2] += 100
    return images, is_bright.astype(np.float32)


def criterion(outputs, examples):
    return optax.sigmoid_binary_cross_entropy(outputs, examples["label"]).mean()


def attach_scalar_head(mode="frozen", select=lambda stages: stages.pooled, **options):
    images, labels = labelled_images(2)
    return head_on_tower.attach_head(
        make_tower(),
        ScalarHead(),
        criterion,
        {"image": images, "label": labels},
        select_features=select,
        mode=mode,
        native=False,
        **options,
    )


def fit_scalar_head(
    attached,
    epochs=20,
    folder=None,
    learning_rate=0.05,
    stored=False,
    optimiser=optax.adam,
    **options,
):
    splits = []
    for count, seed in ((64, 1), (30, 2)):
        images, labels = labelled_images(count, seed)
        if stored:
            images = StoredRows(images.__getitem__, range(count), (4, 4, 1), np.uint8, str)
        splits.append(attached.examples(images) | {"label": labels})
    settings = {"batch": 16, "patience": 50, "seed": 3, "folder": folder} | options
    initial = attached.params, attached.stats
    return fit.fit_head(
        attached.loss, *initial, *splits, optimiser(learning_rate), epochs=epochs, **settings
    )
