"""Linear layers of Flax with an adapter. There is a class for each kind of layer, and `LAYERS` is the table of them.

Axes: D is the product of the axes that a kernel contracts. F is the product of the axes that replace them in the
output. G is a group, which is an axis that input, kernel and output share; each of its values has a matrix and a pair
of factors of its own.
"""

from __future__ import annotations

import functools
import math
import string
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mlora_jax.adapters.einsum_axes import (
    EinsumAxes,
    einsum_product,
    group_shape,
    kernel_layout,
    parse_einsum,
    place_profile,
)
from mlora_jax.adapters.variables import AdapterParam, DropoutKey, InputGram, RankProfile
from mlora_jax.core.product import (
    ADAPTED_OUTPUT,
    apply_profile,
    folded_product,
    initialize_factors,
    initialize_gate,
    p_scaled_product,
)


class Factoring(NamedTuple):
    """The description of a kernel as a stack of matrices.

    Attributes:
      axes: the number of the kernel's axes, without those of a stack.
      groups: the sizes of the axes G.
      features_in, features_out: D and F.
      layout: the `kernel_layout` that `mlora_jax.core.fold` reads; None if ``A B`` has its axes in the kernel's order.
    """

    axes: int
    groups: tuple[int, ...]
    features_in: int
    features_out: int
    layout: tuple[tuple[int, ...], tuple[int, ...]] | None = None


class AdaptedLayer(nnx.Module):
    """A frozen layer and its adapter: ``y = base(x) + ((dropout(x) A) * p) B``. A gate replaces ``p`` by ``p * gate``.

    Attributes:
      base: the frozen layer.
      a: AdapterParam [..., D, R].
      b: AdapterParam [..., R, F].
      gate: AdapterParam [..., R], or None if the adapter has no gate.
      p: RankProfile [..., R].
      dropout: the rate in [0, 1) of dropout on the adapter's input.
      deterministic: if true, there is no dropout. `model.eval()` sets it, and `model.train()` resets it.
      frozen: the name of the base layer's matrix.
    """

    frozen: ClassVar[str] = "kernel"
    gate: AdapterParam | None = None

    def __init__(
        self,
        base: nnx.Module,
        rank: int,
        *,
        key: jax.Array,
        init: str,
        dropout: float,
        gate: str | None = None,
        names: tuple[str, ...] = (),
    ) -> None:
        factoring = self.factoring(base)
        shape = getattr(base, self.frozen).shape
        stack = shape[: len(shape) - factoring.axes]
        a, b = self._initial_factors(key, factoring, rank, (*stack, *factoring.groups), init)
        layout: dict[str, Any] = {} if factoring.layout is None else {"kernel_layout": factoring.layout}
        self.base: Any = base
        self.a, self.b = AdapterParam(a, **layout), AdapterParam(b)
        leading, groups = a.ndim - 2, len(factoring.groups)
        vector = (*a.shape[:-2], rank)
        if gate is not None:
            self.gate = AdapterParam(initialize_gate(key, vector, init=gate, dtype=a.dtype))
        self.p = RankProfile(jnp.ones(vector, a.dtype), leading=leading, groups=groups, names=names)
        self.dropout = dropout
        self.deterministic = False
        if dropout:
            self.dropout_key = DropoutKey(jnp.zeros(stack))

    @staticmethod
    def factoring(base: Any) -> Factoring:
        """Returns the description of the layer's kernel as a stack of matrices.

        Args:
          base: the frozen layer.

        Raises:
          ValueError: the layer has an option with which no adapter can represent it.
        """
        raise NotImplementedError

    def _initial_factors(self, key, factoring: Factoring, rank: int, leading: tuple[int, ...], init: str):
        return initialize_factors(key, factoring.features_in, factoring.features_out, rank, leading=leading, init=init)

    def _product(self, x: jax.Array) -> jax.Array:
        """Returns the adapter's contribution to the output, in the dtype of `x`."""
        raise NotImplementedError

    def _rank_scales(self) -> jax.Array:
        """Returns the factor on ``x A``: the profile, times the gate if there is one.

        Returns:
          An array of the profile's shape: [..., R], or [..., B, R] per example, or [..., B, T, R] per token.
        """
        p = self.p[...]
        if self.gate is None:
            return p
        gate = self.gate[...]
        return p * jnp.expand_dims(gate, range(gate.ndim - 1, p.ndim - 1))  # the batch's axes stand before R

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Computes what the base layer's call computes, plus the adapter's contribution."""
        y = self.base(x, **_sharded(out_sharding))
        return _add(y, self._product(self._input(x, y.dtype)), out_sharding)

    @property
    def bias(self) -> Any:
        """Returns the base layer's bias, which no adapter changes; None if it has none."""
        return getattr(self.base, "bias", None)

    @property
    def in_features(self) -> Any:
        """Returns the base layer's `in_features`, an int or a tuple of ints."""
        return self.base.in_features

    @property
    def out_features(self) -> Any:
        """Returns the base layer's `out_features`, an int or a tuple of ints."""
        return self.base.out_features

    @property
    def kernel(self) -> Any:
        """Raises an AttributeError, because a product with the frozen kernel would silently leave the adapter out."""
        raise AttributeError(
            f"an adapted layer has no single {self.frozen}: call the layer, read the frozen one at "
            f"layer.base.{self.frozen}, or get the sum from fold(base, adapter, profile). A model that multiplies by "
            f"layer.{self.frozen} itself bypasses the adapter: leave that layer out of the targets"
        )

    def _input(self, x: jax.Array, dtype) -> jax.Array:
        x = x.astype(dtype)
        return self._drop(x) if self.dropout and not self.deterministic else x

    def _drop(self, x: jax.Array) -> jax.Array:
        key = self.dropout_key[...]
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            raise ValueError(
                "adapter dropout has no random key: pass set_dropout_key(profile, key) at every step, "
                "or call model.eval() before split(model)"
            )
        keep = jax.random.bernoulli(key, 1.0 - self.dropout, x.shape)
        return jnp.where(keep, x / (1.0 - self.dropout), jnp.zeros_like(x))


class AdaptedLinear(AdaptedLayer):
    """An `nnx.Linear`, kernel [..., D, F], and its adapter.

    Attributes:
      gram: an InputGram if `watch_inputs` was called, otherwise None.
      watches_inputs: if true, the gram is of the layer's inputs, and otherwise it is of the inputs of B.
      watches_mean: if true, the inputs have a further feature that is 1, so that the gram has their sum and count.
      folds: true if `fold_where_cheaper` was called.
      trains_folded: whether a training step may multiply by the sum of kernel and adapter, `folded_product`.
    """

    gram: InputGram | None = None
    watches_inputs: bool = False
    watches_mean: bool = False
    folds: bool = False
    trains_folded: bool = False

    @staticmethod
    def factoring(base: nnx.Linear) -> Factoring:
        """Takes the layer's matrix as it is."""
        features_in, features_out = base.kernel.shape[-2:]
        return Factoring(2, (), features_in, features_out)

    def _product(self, x):
        if self.gram is not None:
            self._watch(x, self.gram)
        return p_scaled_product(x, self.a[...], self.b[...], self._rank_scales(), precision=self.base.precision)

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Computes what the base layer's call computes, plus the adapter's contribution."""
        if self.trains_folded and out_sharding is None and self._sum_is_exact() and x.dtype == self.base.kernel.dtype:
            factors = self.a[...], self.b[...], self._rank_scales()
            with jax.named_scope("folded_product"):
                # The stubs of jax.custom_vjp lose the type of what the function returns.
                y: Any = folded_product(x, self.base.kernel[...], *factors, self.base.precision)
            y = checkpoint_name(y, ADAPTED_OUTPUT)
            return y if self.base.bias is None else y + jnp.broadcast_to(self.base.bias[...], y.shape)
        if not self._folds(x):
            return super().__call__(x, out_sharding)
        graphdef, state = nnx.split(self.base)
        beside = super().__call__

        def folded(x):
            kernel: Any = state["kernel"]
            product = jnp.matmul(self.a[...] * self._rank_scales()[None], self.b[...], precision=self.base.precision)
            state["kernel"] = kernel.replace(kernel[...] + product.astype(kernel.dtype))
            return nnx.merge(graphdef, state)(x, **_sharded(out_sharding))

        # An accelerator multiplies float32 at a lower precision, which would lose most of what is added to the kernel.
        return jax.lax.platform_dependent(x, cpu=folded, default=lambda x: beside(x, out_sharding))

    def _folds(self, x: jax.Array) -> bool:
        if not self.folds or not self._sum_is_exact():
            return False
        (features_in, rank), features_out = self.a.shape, self.b.shape[-1]
        beside = math.prod(x.shape[:-1]) * rank * (features_in + features_out)
        return beside > features_in * features_out * (rank + 1)

    def _sum_is_exact(self) -> bool:
        """Returns whether the layer's function is a product with one sum of kernel and adapter, in 32 bits or more."""
        drops = self.dropout and not self.deterministic
        if drops or self.gram is not None or self.p.ndim != 1 or not isinstance(self.base.kernel[...], jax.Array):
            return False  # a kernel that is no array is quantised
        dtype, others = self.base.kernel.dtype, (None, self.base.kernel.dtype)
        return jnp.finfo(dtype).bits >= 32 and self.base.dtype in others and self.base.preferred_element_type in others

    def _watch(self, x: jax.Array, gram: InputGram) -> None:
        if self.watches_inputs:
            counts = jnp.any(self.p[...] != 0, axis=-1)  # false for a token whose profile is zero
            counts = counts.reshape(*counts.shape, *(1,) * (x.ndim - counts.ndim))
            hidden = x * counts.astype(x.dtype)  # [..., D]
            if self.watches_mean:
                ones = jnp.broadcast_to(counts.astype(x.dtype), (*x.shape[:-1], 1))
                hidden = jnp.concatenate([hidden, ones], axis=-1)
        else:
            hidden = apply_profile(jnp.matmul(x, self.a[...].astype(x.dtype)), self._rank_scales())  # [..., R]
        hidden = hidden.reshape(-1, hidden.shape[-1]).astype(gram[...].dtype)
        gram[...] += jnp.matmul(hidden.T, hidden, precision="highest")


class AdaptedLinearGeneral(AdaptedLayer):
    """An `nnx.LinearGeneral`, kernel [..., *batch_axis, *in_features, *out_features], and its adapter.

    A is [..., *G, D, R] and B is [..., *G, R, F]. The batch axes are the groups G.
    """

    @staticmethod
    def factoring(base: nnx.LinearGeneral) -> Factoring:
        """Returns the description in which D is the product of the input features and F that of the output features."""
        groups, axes_in, axes_out = tuple(base.batch_axis.values()), base.in_features, base.out_features
        count = len(groups) + len(axes_in) + len(axes_out)
        return Factoring(count, groups, math.prod(axes_in), math.prod(axes_out))

    def _product(self, x):
        base = self.base
        groups, contracted, kept = len(base.batch_axis), len(base.axis), len(base.out_features)
        axes = _general_axes(x.ndim, groups, tuple(sorted(axis % x.ndim for axis in base.axis)), kept)
        sizes = base.kernel.shape[-(groups + contracted + kept) :]
        return einsum_product(axes, sizes, x, self.a[...], self.b[...], self._rank_scales(), base.precision)


class AdaptedEinsum(AdaptedLayer):
    """An `nnx.Einsum` and its adapter.

    A is [..., *G, D, R] and B is [..., *G, R, F]. D is the product of the kernel's contracted axes, and F is that of
    the axes that are new in the output. The axes that input, kernel and output share are the groups G.
    """

    @staticmethod
    def factoring(base: nnx.Einsum) -> Factoring:
        """Returns the description in which D is the product of the contracted axes and F that of the kept axes."""
        axes = parse_einsum(base.einsum_str)
        sizes = base.kernel.shape[-len(axes.kernel) :]
        return Factoring(len(axes.kernel), *group_shape(axes, sizes), kernel_layout(axes, sizes))

    def __call__(self, x: jax.Array, einsum_str: str | None = None, out_sharding: Any = None) -> jax.Array:
        """Computes what the base layer's call computes, plus the adapter's contribution.

        Args:
          x: the input, with the axes that the einsum names.
          einsum_str: an einsum in place of the layer's own. It may name other axes of x, but must use the kernel in the
            same way.
          out_sharding: the sharding of the output, as for the base layer.

        Raises:
          ValueError: `einsum_str` contracts, keeps or groups other axes of the kernel.
        """
        y = self.base(x, **({} if einsum_str is None else {"einsum_str": einsum_str}), **_sharded(out_sharding))
        own, axes = (parse_einsum(text) for text in (self.base.einsum_str, einsum_str or self.base.einsum_str))
        if _roles(own) != _roles(axes):
            raise ValueError(
                f"{einsum_str!r} uses the kernel otherwise than {self.base.einsum_str!r}, which its adapter is made for"
            )
        sizes = self.base.kernel.shape[-len(axes.kernel) :]
        factors = self.a[...], self.b[...], self._rank_scales()
        x = self._input(x, y.dtype)
        return _add(y, einsum_product(axes.expanded(x.ndim), sizes, x, *factors, self.base.precision), out_sharding)


class AdaptedConv(AdaptedLayer):
    """An `nnx.Conv`, kernel [..., *window, Cin / G, Cout], and its adapter.

    Cin and Cout are the numbers of input and output channels. A is a convolution to R channels with the same window,
    strides, padding and dilation, and B is a matrix on these R channels. D is the size of the window times Cin / G.
    Each of the G feature groups has its own factors, so A is [..., G, D, R].

    Source: LoRA for Conv2d in PEFT, which has one group.
    """

    @staticmethod
    def factoring(base: nnx.Conv) -> Factoring:
        """Returns the description in which D is the size of the window times the input channels of a group.

        Raises:
          ValueError: the convolution has a mask.
        """
        if base.mask is not None:
            raise ValueError("a masked convolution has no adapter: a product A B cannot be kept to a mask")
        window, groups = base.kernel_size, base.feature_group_count
        features_in, features_out = math.prod(window) * base.in_features // groups, base.out_features // groups
        if groups == 1:
            return Factoring(len(window) + 2, (), features_in, features_out)
        sizes = (groups, *window, base.in_features // groups, features_out)
        order = (*range(1, len(window) + 2), 0, len(window) + 2)
        return Factoring(len(window) + 2, (groups,), features_in, features_out, (sizes, order))

    def _product(self, x):
        groups, window = self.base.feature_group_count, len(self.base.kernel_size)
        a, b = self.a[...].astype(x.dtype), self.b[...].astype(x.dtype)
        rank, batch = a.shape[-1], x.ndim - window - 1
        a = a.reshape(groups, *self.base.kernel_size, -1, rank)
        kernel = jnp.moveaxis(a, 0, -2).reshape(*a.shape[1:-1], groups * rank)
        hidden = self._convolve(x, kernel)  # [*batch, *space, G * R]
        axes = string.ascii_letters[: hidden.ndim - 1]
        group = "G" if groups > 1 else ""
        hidden = hidden.reshape(*hidden.shape[:-1], *(groups,) * len(group), rank)
        p = place_profile(self._rank_scales(), group, axes[:batch], f"{axes}{group}R", hidden.shape)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        hidden = (hidden.astype(wide) * p.astype(wide)).astype(x.dtype)
        product = f"{axes}{group}R,{group}RF->{axes}{group}F"
        y = jnp.einsum(product, hidden, b, precision=self.base.precision)
        return y.reshape(*y.shape[: len(axes)], -1)

    def _convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        # A copy of the base layer with another kernel lets Flax itself apply strides, padding and batch axes.
        layer = nnx.clone(self.base)
        layer.kernel, layer.bias, layer.use_bias = nnx.Param(kernel), nnx.data(None), False
        layer.dtype, layer.preferred_element_type = x.dtype, None
        layer.conv_general_dilated = jax.lax.conv_general_dilated
        return layer(x)


class AdaptedEmbed(AdaptedLayer):
    """An `nnx.Embed`, embedding [..., V, D], and its adapter: ``y = embedding[i] + (A[i] * p) B``.

    A is [..., V, R] and B is [..., R, D]; here D is the length of an embedding. `attend` multiplies by the transposed
    sum. Dropout only acts on the input of `attend`, because ids have no features to drop.

    Source: LoRA for Embedding in PEFT. With `init="fan_in"` the factors also start as in PEFT: A is zero, and B is
    drawn from the standard normal distribution.
    """

    frozen: ClassVar[str] = "embedding"

    @staticmethod
    def factoring(base: nnx.Embed) -> Factoring:
        """Takes the layer's matrix as it is."""
        entries, features = base.embedding.shape[-2:]
        return Factoring(2, (), entries, features)

    def _initial_factors(self, key, factoring, rank, leading, init):
        a, b = super()._initial_factors(key, factoring, rank, leading, init)
        return (jnp.zeros_like(a), jax.random.normal(key, b.shape, b.dtype)) if init == "fan_in" else (a, b)

    def __call__(self, ids: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Returns the rows [..., D] of the adapted table for integers [...], in the base layer's dtype."""
        y = self.base(ids, **_sharded(out_sharding))
        # A table of one entry is not indexed: Flax returns its row for any ids.
        rows = jnp.take(self.a[...], ids if self.num_embeddings > 1 else jnp.zeros_like(ids), axis=0)  # [..., R]
        wide = jnp.promote_types(y.dtype, jnp.float32)
        hidden = apply_profile(rows.astype(y.dtype).astype(wide), self._rank_scales()).astype(y.dtype)
        return _add(y, hidden @ self.b[...].astype(y.dtype), out_sharding)

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Returns the products [..., V] of queries [..., D] with all rows of the table, in the base layer's dtype."""
        y = self.base.attend(query, **_sharded(out_sharding))
        query = self._input(query, y.dtype)
        return _add(y, p_scaled_product(query, self.b[...].T, self.a[...].T, self._rank_scales()), out_sharding)

    @property
    def num_embeddings(self) -> int:
        """Returns V, the number of entries of the table."""
        return self.base.num_embeddings

    @property
    def features(self) -> int:
        """Returns D, the length of an embedding."""
        return self.base.features

    @property
    def embedding(self) -> Any:
        """Raises an AttributeError, as `kernel` does."""
        return self.kernel


# To add a kind of layer, add a row.
LAYERS: dict[type[nnx.Module], type[AdaptedLayer]] = {
    nnx.Linear: AdaptedLinear,
    nnx.LinearGeneral: AdaptedLinearGeneral,
    nnx.Einsum: AdaptedEinsum,
    nnx.Conv: AdaptedConv,
    nnx.Embed: AdaptedEmbed,
}


def layer_kind(node: Any) -> type[AdaptedLayer] | None:
    """Returns the class that adapts a layer, or None if there is none."""
    return next((adapted for kind, adapted in LAYERS.items() if isinstance(node, kind)), None)


@functools.cache
def _general_axes(ndim: int, groups: int, contracted: tuple[int, ...], kept: int) -> EinsumAxes:
    x, new = string.ascii_letters[:ndim], string.ascii_letters[ndim : ndim + kept]
    inner = "".join(x[axis] for axis in contracted)
    return EinsumAxes(x, x[:groups] + inner + new, "".join(c for c in x if c not in inner) + new)


def _roles(axes: EinsumAxes) -> list[str]:
    """Returns the role of each axis of the kernel: group, contracted or kept."""
    parts = {"group": axes.groups, "contracted": axes.contracted, "kept": axes.kept}
    return [next(role for role, part in parts.items() if c in part) for c in axes.kernel]


def _sharded(out_sharding) -> dict[str, Any]:
    return {} if out_sharding is None else {"out_sharding": out_sharding}


def _add(y: jax.Array, product: jax.Array, out_sharding) -> jax.Array:
    product = product if out_sharding is None else jax.sharding.reshard(product, out_sharding)
    return checkpoint_name(y + product, ADAPTED_OUTPUT)
