"""Flax NNX models that are none of the package's: what a user may bring to `adapt`."""

import jax
import jax.numpy as jnp
from flax import nnx

from mlora_jax.adapters import AdaptedLinear

WIDTH = 6


def linear(rngs, features_out=WIDTH, **options):
    return nnx.Linear(WIDTH, features_out, rngs=rngs, **options)


class Perceptron(nnx.Module):
    """Linear layers in every container there is; `encoder` and `decoder` are one layer at two paths."""

    def __init__(self, rngs: nnx.Rngs):
        self.encoder = linear(rngs)
        self.decoder = self.encoder
        self.blocks = nnx.List([nnx.Sequential(linear(rngs), nnx.relu, linear(rngs, use_bias=False)), linear(rngs)])
        self.heads = nnx.Dict(left=linear(rngs, 4), right=linear(rngs, 4))
        self.plain = nnx.data([linear(rngs), {"inner": linear(rngs)}, (linear(rngs),)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.encoder(x))
        for block in self.blocks:
            x = x + jnp.tanh(block(x))
        x = self.norm(self.decoder(x))
        x = self.plain[2][0](self.plain[1]["inner"](self.plain[0](x)))
        return self.heads["left"](x) - self.heads["right"](x)


PERCEPTRON_LAYERS = (
    "encoder", "decoder", "blocks.0.layers.0", "blocks.0.layers.2", "blocks.1", "heads.left", "heads.right",
    "plain.0", "plain.1.inner", "plain.2.0",
)  # fmt: skip


class Block(nnx.Module):
    """One residual layer of a stack."""

    def __init__(self, rngs: nnx.Rngs):
        self.up, self.down = nnx.Linear(WIDTH, 9, rngs=rngs), nnx.Linear(9, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class NNXScan(nnx.Module):
    """Layers stacked by `nnx.vmap` and run by `nnx.scan`."""

    def __init__(self, rngs: nnx.Rngs, layers: int = 3):
        self.layers = nnx.vmap(Block, in_axes=0, out_axes=0)(rngs.split(layers))
        self.out = linear(rngs, 2)

    def __call__(self, x):
        x = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        return self.out(x)


class LaxScan(NNXScan):
    """The same stack run by `jax.lax.scan`."""

    def __call__(self, x):
        graphdef, state = nnx.split(self.layers)
        x, _ = jax.lax.scan(lambda x, layer: (nnx.merge(graphdef, layer)(x), None), x, state)
        return self.out(x)


class Unrolled(nnx.Module):
    """Its layers one by one, as NumPy-like slices: what the stacks must equal."""

    def __init__(self, stack: NNXScan):
        graphdef, state = nnx.split(stack.layers)
        count = jax.tree.leaves(state)[0].shape[0]
        self.layers = nnx.List([nnx.merge(graphdef, jax.tree.map(lambda v, i=i: v[i], state)) for i in range(count)])
        self.out = stack.out

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


class Noisy(nnx.Module):
    """Dropout and batch norm: a call changes random-number counts and running statistics."""

    def __init__(self, rngs: nnx.Rngs):
        self.inner = linear(rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.4, rngs=rngs)
        self.out = linear(rngs, 3)

    def __call__(self, x):
        return self.out(self.dropout(self.norm(jnp.tanh(self.inner(x)))))


def randomize_b(model: nnx.Module, key: jax.Array) -> None:
    """Gives the B of every adapted linear layer random values in place of zeros."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, AdaptedLinear):
            own = jax.random.fold_in(key, len(path) + module.b.shape[-1])
            module.b[...] = 0.3 * jax.random.normal(own, module.b.shape)


MODELS = {"perceptron": Perceptron, "nnx.scan": NNXScan, "lax.scan": LaxScan}


def build(name: str, seed: int = 0) -> nnx.Module:
    return MODELS[name](nnx.Rngs(seed))
