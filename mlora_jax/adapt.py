"""Adapters on the linear layers of any Flax NNX model, and the pytrees that pure functions train and read out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlora_jax.core.hierarchy import check_rank
from mlora_jax.core.product import initialize_factors, p_scaled_product, path_hash, path_names


class AdapterParam(nnx.Variable):
    """A trained factor: A [..., D, R] or B [..., R, F]."""


class RankProfile(nnx.Variable):
    """A rank profile p [..., R].

    Its metadata: `leading` counts the axes it shares with a stacked kernel; `names` are all paths of a shared layer.
    """


class DropoutKey(nnx.Variable):
    """The adapter dropout's random key, one per stacked layer. Holds zeros until `set_dropout_key` sets it."""


class AdaptedLinear(nnx.Module):
    """A frozen linear layer and its adapter: ``y = base(x) + ((dropout(x) A) * p) B``.

    Attributes:
      base: the `nnx.Linear`, kernel [..., D, F].
      a: AdapterParam [..., D, R].
      b: AdapterParam [..., R, F].
      p: RankProfile [..., R].
      dropout: rate in [0, 1) on the adapter's input, while `deterministic` is False (`model.train()`).
    """

    def __init__(
        self, base: nnx.Linear, rank: int, *, key: jax.Array, init: str, dropout: float, names: tuple[str, ...] = ()
    ):
        *leading, features_in, features_out = base.kernel.shape
        a, b = initialize_factors(key, features_in, features_out, rank, leading=tuple(leading), init=init)
        self.base = base
        self.a, self.b = AdapterParam(a), AdapterParam(b)
        self.p = RankProfile(jnp.ones((*leading, rank), a.dtype), leading=len(leading), names=names)
        self.dropout = dropout
        self.deterministic = False
        if dropout:
            self.dropout_key = DropoutKey(jnp.zeros(tuple(leading)))

    @property
    def in_features(self) -> int:
        """D."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """F."""
        return self.base.out_features

    @property
    def bias(self):
        """The base layer's, or None; no adapter changes it."""
        return self.base.bias

    @property
    def kernel(self):
        """Refused: whoever multiplies by the frozen kernel leaves the adapter out without a word."""
        raise AttributeError(
            "an adapted layer has no single kernel: call the layer, read the frozen one at layer.base.kernel, or get "
            "the sum from fold(base, adapter, profile). A model that multiplies by layer.kernel itself bypasses the "
            "adapter: leave that layer out of the targets"
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.base(x)
        x = x.astype(y.dtype)
        if self.dropout and not self.deterministic:
            x = self._drop(x)
        return y + p_scaled_product(x, self.a[...], self.b[...], self.p[...])

    def _drop(self, x: jax.Array) -> jax.Array:
        key = self.dropout_key[...]
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            raise ValueError(
                "adapter dropout has no random key: pass set_dropout_key(profile, key) at every step, "
                "or call model.eval() before split(model)"
            )
        keep = jax.random.bernoulli(key, 1.0 - self.dropout, x.shape)
        return jnp.where(keep, x / (1.0 - self.dropout), jnp.zeros_like(x))


def adapt(
    model: nnx.Module,
    rank: int,
    targets: Sequence[str],
    *,
    key: jax.Array,
    init: str = "fan_rank",
    dropout: float = 0.0,
) -> nnx.Module:
    """Puts an adapter of one rank on every linear layer that a pattern names.

    Works on any Flax NNX model. A kernel with leading axes (layers stacked for a scan) gets factors and a profile
    with the same leading axes. The given model is left as it is; the frozen arrays are shared, not copied.

    Args:
      model: the model; its arrays may have any dtype. The factors have jax's default float dtype.
      rank: R, at least 1.
      targets: regular expressions for dotted module paths; each must match a whole path or a whole tail of it that
        begins after a dot. "q_proj" matches layers.self_attn.q_proj, r"mlp\\..*" everything under an mlp.
      key: `jax.random.key`; a layer's draw depends on the key and its own path only (the first of a shared layer).
      init: "fan_rank" or "fan_in", see `mlora_jax.core.initialize_factors`.
      dropout: rate of dropout on the adapters' inputs, in [0, 1).

    Returns:
      A new model with every profile at one. B is zero: it computes what `model` computes.

    Raises:
      ValueError: a pattern that matches no linear layer (the message lists the layers there are), a pattern that is
        no regular expression, an adapted model, a rank below 1, an unknown init, a dropout rate outside [0, 1); a
        kernel that is also another layer's (one `nnx.Param` under both): folding into one would change the other.

    >>> model = adapt(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), 2, (".*",), key=jax.random.key(0))
    >>> model.a.shape, model.b.shape
    ((4, 2), (2, 3))
    """
    check_rank(rank, "rank", low=1)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"adapter dropout must be in [0, 1), got {dropout}")
    if any(isinstance(module, AdaptedLinear) for _, module in nnx.iter_modules(model)):
        raise ValueError("the model already has adapters; adapt the base model instead")
    model = nnx.clone(model)
    linears = dict(_linear_paths(model))
    names: dict[int, tuple[str, ...]] = {}
    for path, linear in linears.items():
        names[id(linear)] = (*names.get(id(linear), ()), path)
    matching = _matching(tuple(linears), targets)
    _refuse_tied_kernels(model, [linears[path] for path in matching])
    wrapped: dict[int, AdaptedLinear] = {}
    for path in matching:
        linear = linears[path]
        if id(linear) not in wrapped:
            first, *others = names[id(linear)]
            options = dict(init=init, dropout=dropout, names=(first, *others) if others else ())
            layer_key = jax.random.fold_in(key, path_hash(first))
            wrapped[id(linear)] = AdaptedLinear(linear, rank, key=layer_key, **options)
    if isinstance(model, nnx.Linear):
        return wrapped[id(model)]
    for _, node in list(nnx.iter_graph(model)):
        if not isinstance(node, AdaptedLinear):
            _replace_children(node, wrapped)
    return model


def split(model: nnx.Module, *, mutable: Any = None) -> tuple:
    """The pytrees that pure functions work on; `nnx.merge(graphdef, base, adapter, profile)` undoes it.

    Differentiate with respect to `adapter` only and the rest is frozen. What a call of the merged model writes to
    its variables is lost, so variables that a call would write (random-number counts, batch statistics) are refused
    unless they are threaded: name them by `mutable`, merge the fifth tree too, and carry
    `nnx.state(model, mutable)` from call to call. In `model.eval()` mode dropout and batch norm write nothing
    and are accepted as they are.

    Merge with `copy=True` where a tree comes from outside the innermost transform (`jax.grad` over `adapter` alone
    with `base` closed over, say) and the model runs an NNX transform such as `nnx.scan` or threads variables: NNX
    refuses to hand on or write variables of another trace level.

    Args:
      model: an adapted model.
      mutable: an NNX filter such as `nnx.RngState` or `(nnx.RngState, nnx.BatchStat)`.

    Returns:
      (graphdef, base, adapter, profile), and a fifth tree of the `mutable` variables if asked for. Each is an
      `nnx.State`; `adapter` holds the factors, `profile` the rank profiles and dropout keys.

    Raises:
      ValueError: the model has no adapters, or variables that would be frozen by accident.
    """
    if not any(isinstance(module, AdaptedLinear) for _, module in nnx.iter_modules(model)):
        raise ValueError("the model has no adapters: call adapt(model, rank, targets, key=...) first")
    accepted = () if mutable is None else {tuple(path) for path, _ in nnx.to_flat_state(nnx.state(model, mutable))}
    frozen = [path for path in _written_variables(model) if path not in accepted]
    if frozen:
        _refuse_to_freeze(model, frozen)
    if mutable is None:
        graphdef, adapter, profile, base = nnx.split(model, AdapterParam, (RankProfile, DropoutKey), ...)
        return graphdef, base, adapter, profile
    graphdef, adapter, profile, threaded, base = nnx.split(model, AdapterParam, (RankProfile, DropoutKey), mutable, ...)
    return graphdef, base, adapter, profile, threaded


def set_profile(profile_tree: nnx.State, p: jax.Array | Mapping[str, jax.Array], *, per_example: bool = False):
    """Every layer's profile replaced by `p`. Traceable: a profile is data.

    Args:
      profile_tree: what `split` returned.
      p: [R] for all layers; the leading axes of a stacked kernel and R, such as [L, R], for one profile per layer;
        with `per_example` [B, R], or per token [B, T, R], for all layers; or {path pattern: p} with p in
        any of these forms. Patterns are those of `adapt`, the first that matches wins, a layer that none matches keeps
        its profile.
      per_example: whether the axes of `p` before R are those of the batch. Never guessed from a shape.

    Returns:
      A new profile tree.

    Raises:
      ValueError: a shape that fits no layer, a pattern that matches none (a shared layer goes by its first path, which
        the message names), no pattern at all, or a tree without rank profiles.
    """
    is_profile = lambda node: isinstance(node, RankProfile)  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(profile_tree, is_leaf=is_profile)
    paths = [".".join(path_names(path)[:-1]) for path, node in leaves if is_profile(node)]
    if not paths:
        raise ValueError("this tree has no rank profiles: pass the fourth value of split(model)")
    table = p if isinstance(p, Mapping) else None
    if table is not None and not table:
        raise ValueError(f"an empty mapping sets no profile; layers here: {', '.join(sorted(paths))}")
    shared = {name: ".".join(path_names(path)[:-1]) for path, node in leaves if is_profile(node) for name in node.names}
    chosen = {path: pattern for pattern in reversed(table or ()) for path in _matching(paths, (pattern,), shared)}

    def replace(path, node):
        if not is_profile(node):
            return node
        name = ".".join(path_names(path)[:-1])
        if table is not None and name not in chosen:
            return node
        value = p if table is None else table[chosen[name]]
        return node.replace(_fit_profile(name, node, jnp.asarray(value), per_example))

    return jax.tree_util.tree_map_with_path(replace, profile_tree, is_leaf=is_profile)


def set_dropout_key(profile_tree: nnx.State, key: jax.Array) -> nnx.State:
    """Gives every adapter's dropout its own random key; a tree without dropout comes back as it was. Traceable.

    Args:
      profile_tree: what `split` returned.
      key: a `jax.random.key`, another one at every step.
    """
    is_key = lambda node: isinstance(node, DropoutKey)  # noqa: E731

    def replace(path, node):
        if not is_key(node):
            return node
        own = jax.random.fold_in(key, path_hash(".".join(path_names(path)[:-1])))
        shape = node[...].shape
        return node.replace(jax.random.split(own, shape) if shape else own)

    return jax.tree_util.tree_map_with_path(replace, profile_tree, is_leaf=is_key)


def _fit_profile(name: str, node: RankProfile, value: jax.Array, per_example: bool) -> jax.Array:
    old = node[...]
    stacked = old.shape[: node.leading]
    full = (*stacked, old.shape[-1])
    if per_example:
        if value.ndim < 2 or value.shape[-1] != full[-1]:
            raise ValueError(
                f"a profile per example of {name} must end in R = {full[-1]}, like [B, R]; got {value.shape}"
            )
        full = (*stacked, *value.shape)
    elif value.shape not in ((full[-1],), full):
        raise ValueError(
            f"a profile of {name} must have shape {(full[-1],)} or {full}, got {value.shape}; "
            "pass per_example=True for a profile per example"
        )
    return jnp.broadcast_to(value, full).astype(old.dtype)


def _linear_paths(node, path: tuple[str, ...] = (), above: tuple = ()) -> Iterator[tuple[str, nnx.Linear]]:
    """Every path at which a linear layer hangs; a shared layer has several."""
    if isinstance(node, nnx.Linear):
        yield ".".join(path) or "model", node
    elif not any(node is parent for parent in above):
        for name, child in _children(node):
            yield from _linear_paths(child, (*path, str(name)), (*above, node))


def _refuse_tied_kernels(model: nnx.Module, linears: Sequence[nnx.Linear]) -> None:
    """Raises if a kernel hangs under anything but its own layer; a layer that is shared as a whole is no such case."""
    own = {id(linear.kernel): linear for linear in reversed(linears)}
    found: dict[int, dict[int, str]] = {}  # kernel: {what holds it: the first path there}
    for path, holder, variable in _variable_paths(model):
        if id(variable) in own:
            found.setdefault(id(variable), {}).setdefault(id(holder), path)
    for kernel, paths in found.items():
        if len(paths) > 1:
            here = paths.pop(id(own[kernel]))
            raise ValueError(
                f"{here} and {next(iter(paths.values()))} are one variable: an adapter folded into one layer would "
                "change the other. Leave both out of the targets, or give each layer a variable of its own"
            )


def _variable_paths(node, path: tuple[str, ...] = (), above: tuple = ()) -> Iterator[tuple[str, Any, nnx.Variable]]:
    """Every path at which a variable hangs, and what holds it there."""
    if any(node is parent for parent in above):
        return
    for name, child in _children(node):
        if isinstance(child, nnx.Variable):
            yield ".".join((*path, str(name))), node, child
        else:
            yield from _variable_paths(child, (*path, str(name)), (*above, node))


def _children(node) -> list[tuple[Any, Any]]:
    """What a module or a plain container in it (`nnx.data([...])`) holds, in the order of `nnx.state`."""
    if isinstance(node, nnx.Pytree):
        return sorted((name, child) for name, child in vars(node).items() if not name.startswith("_pytree__"))
    if isinstance(node, dict):
        return list(node.items())
    return list(enumerate(node)) if isinstance(node, (list, tuple)) else []


def _replace_children(node, wrapped: Mapping[int, AdaptedLinear]) -> None:
    for name, child in _children(node):
        new = _replaced(child, wrapped)
        if new is child:
            continue
        if isinstance(node, nnx.Pytree):
            setattr(node, name, nnx.data(new))
        elif isinstance(node, (list, dict)):
            node[name] = new


def _replaced(child, wrapped: Mapping[int, AdaptedLinear]):
    if not isinstance(child, tuple):
        return wrapped.get(id(child), child)
    items = [_replaced(item, wrapped) for item in child]
    if all(new is old for new, old in zip(items, child, strict=True)):
        return child
    return type(child)(*items) if hasattr(child, "_fields") else tuple(items)


def _matching(paths: Sequence[str], patterns: Sequence[str], shared: Mapping[str, str] | None = None) -> list[str]:
    """The paths that some pattern matches, in their own order; every pattern must match at least one.

    `shared` maps further names of shared layers, under which they are not found, to their paths: for the message.
    """
    if isinstance(patterns, str):
        raise ValueError(f"targets must be a sequence of patterns, got the string {patterns!r}")
    if not patterns:
        raise ValueError("targets must name at least one pattern, got none")
    found: set[str] = set()
    for pattern in patterns:
        try:
            re.compile(pattern)  # alone first: "a)|(b" would compile inside the group
            compiled = re.compile(rf"(?:.*\.)?(?:{pattern})")
        except re.error as error:
            raise ValueError(f"target {pattern!r} is no regular expression: {error}") from None
        hits = [path for path in paths if compiled.fullmatch(path)]
        known = {path for name, path in (shared or {}).items() if compiled.fullmatch(name)}
        if not hits and known:
            raise ValueError(f"target {pattern!r} names a shared layer, which goes by {', '.join(sorted(known))}")
        if not hits:
            tails = {path.rsplit(".", 1)[-1] for path in paths}
            near = difflib.get_close_matches(pattern, tails, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            there = ", ".join(sorted(paths)) or "none"
            raise ValueError(f"target {pattern!r} matches no linear layer{hint} Linear layers here: {there}")
        found.update(hits)
    return [path for path in paths if path in found]


def _written_variables(model: nnx.Module) -> list[tuple]:
    """Paths of random-number and batch-statistics variables whose owner is not in evaluation mode."""
    nodes = dict(nnx.iter_graph(model))
    threadable = [path for path, node in nodes.items() if isinstance(node, (nnx.RngState, nnx.BatchStat))]
    return [tuple(path) for path in threadable if _evaluates(nodes, path) is not True]


def _evaluates(nodes: Mapping, path: tuple) -> bool | None:
    """Whether the owner of a written variable is in evaluation mode; None if no owner has such a mode."""
    switch = "use_running_average" if isinstance(nodes[path], nnx.BatchStat) else "deterministic"
    owners = (nodes.get(path[:depth]) for depth in range(len(path) - 1, -1, -1))
    states = (getattr(owner, switch, None) for owner in owners)
    return next((state for state in states if isinstance(state, bool)), None)  # nnx.Rngs has an answer to any name


def _refuse_to_freeze(model: nnx.Module, paths: Sequence[tuple]) -> None:
    nodes = dict(nnx.iter_graph(model))
    stuck = [path for path in paths if _evaluates(nodes, path) is None]  # model.eval() would not help
    names = ", ".join(".".join(map(str, path)) for path in (stuck or paths)[:6])
    if stuck:
        kinds = {"nnx.BatchStat" if isinstance(nodes[path], nnx.BatchStat) else "nnx.RngState" for path in stuck}
        filters = ", ".join(sorted(kinds, reverse=True))
        way = f"thread it by mutable={f'({filters})' if len(kinds) > 1 else filters}"
    else:
        way = (
            "call model.eval() before split(model), or thread them with "
            "split(model, mutable=(nnx.RngState, nnx.BatchStat))"
        )
    raise ValueError(
        f"a call of this model would update {len(paths)} variables that a pure function would lose ({names}): {way}"
    )
