# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A vision transformer of Flax layers
#
# `adapt` is not only for the package's own decoder: it takes any Flax NNX model. Here a small vision transformer of
# Flax's layers learns scikit-learn's 8 x 8 digits. Then the digits are turned by a quarter, its weights are frozen,
# and a nested adapter of rank 8 learns to read them, trained in three ways. What do its first 1, 2 and 4 columns know?

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from mlora_jax import RankHierarchy, adapt, aurac, fold, set_profile, split

plt.rcParams.update({"figure.dpi": 90, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#888888"

# %% [markdown]
# ## The model
#
# Patches by `nnx.Conv`, their places by `nnx.Embed`, attention by `nnx.MultiHeadAttention` (whose projections are
# `nnx.LinearGeneral`), and an MLP of `nnx.Linear`. Nothing in it knows of adapters.

# %%
WIDTH, HEADS, BLOCKS, TOKENS = 32, 4, 1, 16


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm1, self.norm2 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs), nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class VisionTransformer(nnx.Module):
    def __init__(self, rngs):
        self.patches = nnx.Conv(1, WIDTH, (2, 2), strides=2, rngs=rngs)
        self.places = nnx.Embed(TOKENS, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(BLOCKS)])
        self.norm, self.head = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, images):  # [B, 8, 8, 1] to [B, 10]
        x = self.patches(images).reshape(len(images), TOKENS, WIDTH)
        # Places of every image of the batch, so that each may have a rank of its own.
        x = x + self.places(jnp.broadcast_to(jnp.arange(TOKENS), x.shape[:2]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.mean(axis=1)))


# %% [markdown]
# ## The digits, upright and turned

# %%
digits = load_digits()
images = digits.images[..., None].astype(np.float32) / 8 - 1  # [N, 8, 8, 1]
turned = np.rot90(images, axes=(1, 2)).copy()
labels = digits.target
order = np.random.default_rng(0).permutation(len(labels))
train, test = order[:1200], order[1200:]


def batches(key, steps, size=32):
    """Rows [steps, size] of the training images."""
    return jax.random.choice(key, jnp.asarray(train), (steps, size))


def loss_of(logits, rows):
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels)[rows]).mean()


def descend(loss, parameters, inputs, rate):
    """Adam on `loss(parameters, input)`, one step for each of `inputs`, with a rate that falls to zero."""
    steps = len(jax.tree.leaves(inputs)[0])
    optimizer = optax.adam(optax.linear_schedule(rate, 0.0, steps))

    def step(carry, each):
        parameters, state = carry
        updates, state = optimizer.update(jax.grad(loss)(parameters, each), state)
        return (optax.apply_updates(parameters, updates), state), None

    return jax.lax.scan(step, (parameters, optimizer.init(parameters)), inputs)[0][0]


model = VisionTransformer(nnx.Rngs(0))
model.eval()
graphdef, weights = nnx.split(model)
upright = jnp.asarray(images)
weights = jax.jit(
    lambda weights, rows: descend(
        lambda weights, rows: loss_of(nnx.merge(graphdef, weights)(upright[rows]), rows), weights, rows, 3e-3
    )
)(weights, batches(jax.random.key(1), 300))
model = nnx.merge(graphdef, weights)
base_accuracy = {
    name: float(np.mean(model(pictures[test]).argmax(-1) == labels[test]))
    for name, pictures in {"upright": images, "turned": turned}.items()
}
print(base_accuracy)

# %% [markdown]
# ## One adapter, three ways to train it
#
# Every kernel but the last gets an adapter: the patches' convolution, the places' table, attention's projections and
# the MLP. The base is frozen; only the factors are trained.
#
# The three ways differ in the profile alone, which is data. **LoRA** trains with all columns at one weight.
# **MatryoshkaLoRA** weighs column $i$ by the number of ranks of $S$ that it belongs to. **Per example** gives every
# image of a batch a prefix of its own, the ranks of $S$ spread evenly over the batch. Written as one profile per
# example, all three are one compiled function, and train at once under `jax.vmap`.

# %%
S = (1, 2, 4, 8)
hierarchy = RankHierarchy(S)
TARGETS = ("patches", "places", "query", "key", "value", "out", "up", "down")
STEPS, SIZE = 200, 32

adapted = adapt(model, hierarchy.max_rank, TARGETS, key=jax.random.key(2), init="fan_in")
graphdef, base, adapter, profile = split(adapted)
for layer in (adapted.patches, adapted.places, adapted.blocks[0].attention.query, adapted.blocks[0].attention.out):
    print(f"{type(layer.base).__name__:14} A {layer.a.shape}  B {layer.b.shape}")

prefixes = jnp.stack([hierarchy.prefix(r) for r in S])
METHODS = {
    "LoRA": jnp.tile(hierarchy.lora(), (SIZE, 1)),
    "MatryoshkaLoRA": jnp.tile(hierarchy.matryoshka(), (SIZE, 1)),
    "per example": jnp.tile(prefixes, (SIZE // len(S), 1)),
}  # each [B, R]
targets = jnp.asarray(turned)


def fit(values):
    """The adapter trained under the profiles `values` [B, R]."""
    values = set_profile(profile, values, per_example=True)

    def loss(adapter, rows):
        return loss_of(nnx.merge(graphdef, base, adapter, values)(targets[rows]), rows)

    return descend(loss, adapter, batches(jax.random.key(3), STEPS, SIZE), 1e-2)


def accuracy(adapter, p, pictures):
    logits = nnx.merge(graphdef, base, adapter, set_profile(profile, p))(pictures)
    return jnp.mean(logits.argmax(-1) == jnp.asarray(labels[test]))


trained = jax.jit(jax.vmap(fit))(jnp.stack(list(METHODS.values())))  # a tree of factors [method, ...]


def factors_of(method):
    number = list(METHODS).index(method)
    return jax.tree.map(lambda leaf: leaf[number], trained)


# %% [markdown]
# ## What every prefix knows
#
# One trained adapter per method, read out at rank 1, 2, 4 and 8. AURAC, the area under the curve over $\log_2 r$, is
# the curve in one number.
#
# MatryoshkaLoRA's columns are trained with weights of 4 to 1 and read out with weights of 1: at full rank that is not
# the function that was trained. The *nested* read-out keeps those weights, as far as the first $r$ columns have them.

# %%
nested = jnp.stack([hierarchy.nested(r) for r in S])
READ_OUTS = {
    "LoRA": ("LoRA", prefixes, BLUE, "o-"),
    "MatryoshkaLoRA": ("MatryoshkaLoRA", prefixes, ORANGE, "s-"),
    "MatryoshkaLoRA, nested": ("MatryoshkaLoRA", nested, ORANGE, "s--"),
    "per example": ("per example", prefixes, GREEN, "^-"),
}  # label: method, profiles [ranks, R], colour, line
every_rank = jax.jit(jax.vmap(accuracy, in_axes=(None, 0, None)))

figure, panel = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
for label, (method, profiles, color, line) in READ_OUTS.items():
    found = every_rank(factors_of(method), profiles, targets[test])  # [ranks]
    area = aurac(found.tolist(), S)
    panel.plot(S, found, line, color=color, label=f"{label}: AURAC {area:.3f}")
    print(f"{label:23}", "  ".join(f"r={r}: {value:.3f}" for r, value in zip(S, found.tolist(), strict=True)))
for (name, value), (at, side, offset) in zip(base_accuracy.items(), ((1, "left", 3), (8, "right", -10)), strict=True):
    panel.axhline(value, color=GREY, linestyle=":", linewidth=1)
    panel.annotate(
        f"frozen base, {name} digits", (at, value), (0, offset), textcoords="offset points", ha=side, color=GREY
    )
panel.set_xscale("log", base=2)
panel.set(xlabel="rank that is read out", ylabel="accuracy on turned digits", xticks=S, xticklabels=S, ylim=(0, 1.08))
panel.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 0.8))
plt.show()

# %% [markdown]
# ## From an adapter to weights
#
# `fold` adds $A\,\mathrm{diag}(p)\,B$ to every kernel in the kernel's own axes: a convolution gets a convolution back,
# attention its heads. The sum computes what base and adapter compute.

# %%
one = factors_of("per example")
at_four = set_profile(profile, hierarchy.prefix(4))
nothing = set_profile(profile, hierarchy.prefix(0))
apart = nnx.merge(graphdef, base, one, at_four)(targets[test])
together = nnx.merge(graphdef, fold(base, one, at_four), one, nothing)(targets[test])
print("largest difference of a logit:", float(jnp.max(jnp.abs(apart - together))))
assert jnp.allclose(apart, together, atol=1e-3)
