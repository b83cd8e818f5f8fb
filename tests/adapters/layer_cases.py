"""One layer of every kind that adapt takes, the sum of its kernel and its adapter in NumPy, and how to run it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlora_jax import RankHierarchy, adapt, split
from mlora_jax.adapters import AdaptedLayer

R, B, T = 4, 3, 5
KEY = jax.random.key(7)
P = jnp.array([1.5, 0.5, 2.0, 0.0])
HIERARCHY = RankHierarchy((1, 2, 4), "sqrt")


class Case:
    """A layer, its input's shape, and A diag(p) B in the kernel's own axes as an einsum over reshaped factors."""

    def __init__(self, make, x, a, b, product, *, fan_in, tokens=True, integers=False):
        self.make, self.x_shape, self.a, self.b, self.product = make, x, a, b, product
        self.fan_in, self.tokens, self.integers = fan_in, tokens, integers

    def build(self, seed=0):
        return self.make(nnx.Rngs(seed))

    def x(self, key=1):
        if self.integers:
            return jax.random.randint(jax.random.key(key), self.x_shape, 0, 11)
        return jax.random.normal(jax.random.key(key), self.x_shape)

    def kernel(self, kernel, a, b, p):
        """The sum W + A diag(p) B in NumPy, float64."""
        factors = [np.asarray(f, np.float64) for f in (a, b, p)]
        a, b = factors[0].reshape(*self.a, R), factors[1].reshape(self.b)
        return np.asarray(kernel, np.float64) + np.einsum(self.product, a, factors[2], b).reshape(kernel.shape)


def general(*features, **options):
    return lambda rngs: nnx.LinearGeneral(*features, rngs=rngs, **options)


def einsum(*arguments, **options):
    return lambda rngs: nnx.Einsum(*arguments, rngs=rngs, **options)


def conv(*arguments, **options):
    return lambda rngs: nnx.Conv(*arguments, rngs=rngs, **options)


CASES = {
    "linear": Case(lambda rngs: nnx.Linear(6, 7, rngs=rngs), (B, T, 6), (6,), (R, 7), "dr,r,rf->df", fan_in=6),
    "heads": Case(general(6, (2, 5)), (B, T, 6), (6,), (R, 2, 5), "dr,r,rnh->dnh", fan_in=6),
    "joined": Case(
        general((2, 5), 6, axis=(-2, -1), use_bias=False), (B, T, 2, 5), (2, 5), (R, 6), "nhr,r,rd->nhd", fan_in=10
    ),
    "inner axis": Case(general(4, 3, axis=1), (B, 4, T), (4,), (R, 3), "dr,r,rf->df", fan_in=4, tokens=False),
    "batch axis": Case(
        general(4, (3, 2), batch_axis={0: 2}), (2, B, T, 4), (2, 4), (2, R, 3, 2), "gdr,gr,grxy->gdxy", fan_in=4
    ),
    "einsum": Case(einsum("btd,dnh->btnh", (6, 2, 5), (2, 5)), (B, T, 6), (6,), (R, 2, 5), "dr,r,rnh->dnh", fan_in=6),
    "interleaved": Case(
        einsum("btd,ndh->bnth", (2, 6, 5), (2, 5)), (B, T, 6), (6,), (R, 2, 5), "dr,r,rnh->ndh", fan_in=6
    ),
    "transposed": Case(einsum("...d,fd->...f", (6, 6)), (B, T, 6), (6,), (R, 6), "dr,r,rf->fd", fan_in=6),
    "experts": Case(
        einsum("bted,efd->btef", (2, 7, 6)), (B, T, 2, 6), (2, 6), (2, R, 7), "edr,er,erf->efd", fan_in=6
    ),
    "summed": Case(einsum("btcd,df->btf", (6, 7)), (B, T, 3, 6), (6,), (R, 7), "dr,r,rf->df", fan_in=6),
    "conv": Case(
        conv(3, 8, (3, 2), strides=(2, 1), kernel_dilation=(1, 2)),
        (B, T, 6, 3), (3, 2, 3), (R, 8), "hwcr,r,rf->hwcf", fan_in=18, tokens=False,
    ),
    "grouped conv": Case(
        conv(4, 6, 3, padding="CIRCULAR", feature_group_count=2, use_bias=False),
        (B, T, 4), (2, 3, 2), (2, R, 3), "gwcr,gr,grf->wcgf", fan_in=6, tokens=False,
    ),
    "depthwise conv": Case(
        conv(4, 4, 3, padding="CAUSAL", feature_group_count=4),
        (B, T, 4), (4, 3, 1), (4, R, 1), "gwcr,gr,grf->wcgf", fan_in=3, tokens=False,
    ),
    "embed": Case(
        lambda rngs: nnx.Embed(11, 6, rngs=rngs), (B, T), (11,), (R, 6), "vr,r,rd->vd", fan_in=11, integers=True
    ),
}  # fmt: skip
each_case = pytest.mark.parametrize("name", CASES)
# One of every code path, for what costs more compilations.
SOME = ["batch axis", "inner axis", "interleaved", "grouped conv", "embed"]
some_cases = pytest.mark.parametrize("name", SOME)


def adapted(layer, **options):
    """With random B (and A), so that the adapter does something."""
    model = adapt(layer, R, (".*",), key=KEY, **options)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, AdaptedLayer):
            module.b[...] = jax.random.normal(KEY, module.b.shape, module.b.dtype)
    return model


def forward(model):
    """A compiled (base, adapter, profile, x) -> y, and the three trees."""
    graphdef, *trees = split(model)
    return jax.jit(lambda base, adapter, profile, x: nnx.merge(graphdef, base, adapter, profile, copy=True)(x)), *trees


def frozen(layer):
    return getattr(layer, "embedding" if isinstance(layer, nnx.Embed) else "kernel")


def close(got, expected, tolerance=3e-6):
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * float(np.max(np.abs(expected))))


def frozen_of(base):
    return next(leaf[...] for path, leaf in nnx.to_flat_state(base) if path[-1] in ("kernel", "embedding"))
