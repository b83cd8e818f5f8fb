"""Functions that put adapters into a model and split it into the pytrees that pure functions work on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from mlora_jax.adapters.layers import AdaptedLayer, AdaptedLinear, layer_kind
from mlora_jax.adapters.targets import matching
from mlora_jax.adapters.variables import AdapterParam, DropoutKey, InputGram, RankProfile
from mlora_jax.core.hierarchy import check_rank
from mlora_jax.core.product import GATE_INITIALIZERS, path_hash


def adapt(
    model: nnx.Module,
    rank: int,
    targets: Sequence[str],
    *,
    key: jax.Array,
    init: str = "fan_rank",
    dropout: float = 0.0,
    gate: bool | str = False,
) -> nnx.Module:
    """Puts an adapter of one rank on every linear layer that a pattern names.

    Works on any Flax NNX model and its `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum`, `nnx.Conv` and `nnx.Embed`. A
    kernel with leading axes (layers stacked for a scan) gets factors and a profile with the same leading axes. The
    given model is left as it is; the frozen arrays are shared, not copied.

    Args:
      model: the model; its arrays may have any dtype. The factors have jax's default float dtype.
      rank: R, at least 1.
      targets: regular expressions for dotted module paths; each must match a whole path or a whole tail of it that
        begins after a dot. "q_proj" matches layers.self_attn.q_proj, r"mlp\\..*" everything under an mlp.
      key: `jax.random.key`; a layer's draw depends on the key and its own path only (the first of a shared layer).
      init: "fan_rank" or "fan_in", see `mlora_jax.core.initialize_factors`; D is the product of the axes that a kernel
        contracts, a convolution's window among them. An embedding with "fan_in" starts as PEFT's: A zero, B normal.
      dropout: the rate of dropout on the adapters' inputs, in [0, 1).
      gate: whether every adapter also has a trained vector ``gate`` [..., R], by which its profile is multiplied:
        ``y = x W + ((x A) * (p * gate)) B``. True starts it at ones; a key of `mlora_jax.core.GATE_INITIALIZERS` names
        another start.

    Returns:
      A new model with every profile at one. ``A B`` is zero, so the model computes what `model` computes.

    Raises:
      ValueError: a pattern that matches no linear layer (the message lists the layers there are), a pattern that is
        no regular expression, an adapted model, a rank below 1, an unknown init or gate, a dropout rate outside
        [0, 1); a layer whose options leave no room for an adapter, such as a masked convolution; a kernel that is also
        another layer's (one `nnx.Param` under both): folding into one would change the other.

    >>> model = adapt(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), 2, (".*",), key=jax.random.key(0))
    >>> model.a.shape, model.b.shape
    ((4, 2), (2, 3))
    """
    check_rank(rank, "rank", low=1)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"adapter dropout must be in [0, 1), got {dropout}")
    if _has_adapters(model):
        raise ValueError("the model already has adapters; adapt the base model instead")
    options = dict(init=init, dropout=dropout, gate=_gate_initializer(gate))
    model = nnx.clone(model)
    layers = dict(_layer_paths(model))
    names: dict[int, tuple[str, ...]] = {}
    for path, layer in layers.items():
        names[id(layer)] = (*names.get(id(layer), ()), path)
    others = {".".join(map(str, path)): type(module).__name__ for path, module in nnx.iter_modules(model)}
    chosen = matching(tuple(layers), targets, others=others)
    _refuse_tied_kernels(model, [layers[path] for path in chosen])
    wrapped: dict[int, AdaptedLayer] = {}
    for path in chosen:
        layer = layers[path]
        if id(layer) not in wrapped:
            wrapped[id(layer)] = _adapted(layer, names[id(layer)], rank, key, **options)
    if id(model) in wrapped:
        return wrapped[id(model)]
    for _, node in list(nnx.iter_graph(model)):
        if not isinstance(node, AdaptedLayer):
            _replace_children(node, wrapped)
    return model


def fold_where_cheaper(model: nnx.Module) -> nnx.Module:
    """Lets every adapted `nnx.Linear` compute ``x (W + A diag(p) B)`` where that takes fewer multiplications.

    That is on a CPU, with one profile for all of many tokens. The kernel must be float32 or wider: a narrower one would
    lose what is added to it. For models that are run, not trained: the gradient of a factor would go through one of the
    kernel's size.

    Args:
      model: an adapted model; changed in place.

    Returns:
      The model.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, AdaptedLinear):
            module.folds = True
    return model


def watch_inputs(model: nnx.Module, *, inputs: bool = False) -> nnx.Module:
    """Lets every adapted `nnx.Linear` sum up ``H^T H`` of the inputs of its B, ``H = (x A) * p``, in an `InputGram`.

    `split(model, mutable=InputGram)` then gives a fifth tree, which `mlora_jax.core.squeeze` takes as its `grams`. A
    profile per token that is zero leaves the token out.

    Args:
      model: an adapted model; changed in place.
      inputs: whether ``X^T X`` [..., D, D] of the layer's inputs is summed up instead.

    Returns:
      The model.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, AdaptedLinear):
            *stack, features, rank = module.a.shape
            size = features if inputs else rank
            module.gram, module.watches_inputs = InputGram(jnp.zeros((*stack, size, size), module.p.dtype)), inputs
    return model


def split(model: nnx.Module, *, mutable: Any = None) -> tuple:
    """Splits a model into the pytrees that pure functions work on.

    `nnx.merge(graphdef, base, adapter, profile)` puts them together again.

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
    if not _has_adapters(model):
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


def _has_adapters(model: nnx.Module) -> bool:
    return any(isinstance(module, AdaptedLayer) for _, module in nnx.iter_modules(model))


def _gate_initializer(gate: bool | str) -> str | None:
    """Returns the key of `GATE_INITIALIZERS` that the argument stands for; None for no gate."""
    if isinstance(gate, bool):
        return "ones" if gate else None
    if gate not in GATE_INITIALIZERS:
        raise ValueError(f"unknown gate {gate!r}; allowed: True, False, {', '.join(map(repr, GATE_INITIALIZERS))}")
    return gate


def _adapted(layer: nnx.Module, names: tuple[str, ...], rank: int, key: jax.Array, **options) -> AdaptedLayer:
    """Returns a layer with its adapter; `names` are all of its paths."""
    first, *others = names
    layer_key = jax.random.fold_in(key, path_hash(first))
    try:
        kind = cast("type[AdaptedLayer]", layer_kind(layer))  # `_layer_paths` yields only layers of a known kind
        return kind(layer, rank, key=layer_key, names=names if others else (), **options)
    except ValueError as error:
        raise ValueError(f"{first}: {error}") from None


def _layer_paths(node, path: tuple[str, ...] = (), above: tuple = ()) -> Iterator[tuple[str, nnx.Module]]:
    """Yields every path to a layer that an adapter fits, with the layer; a shared layer has several paths."""
    if layer_kind(node):
        yield ".".join(path) or "model", node
    elif not any(node is parent for parent in above):
        for name, child in _children(node):
            yield from _layer_paths(child, (*path, str(name)), (*above, node))


def _refuse_tied_kernels(model: nnx.Module, layers: Sequence[nnx.Module]) -> None:
    """Raises if anything but a kernel's own layer holds the kernel; a layer may be shared as a whole."""
    own = {id(getattr(layer, kind.frozen)): layer for layer in reversed(layers) if (kind := layer_kind(layer))}
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
    """Yields every path to a variable, the object that holds it there, and the variable."""
    if any(node is parent for parent in above):
        return
    for name, child in _children(node):
        if isinstance(child, nnx.Variable):
            yield ".".join((*path, str(name))), node, child
        else:
            yield from _variable_paths(child, (*path, str(name)), (*above, node))


def _children(node) -> list[tuple[Any, Any]]:
    """Returns the children of a module, or of a container in it (`nnx.data([...])`), in the order of `nnx.state`."""
    if isinstance(node, nnx.Pytree):
        return sorted((name, child) for name, child in vars(node).items() if not name.startswith("_pytree__"))
    if isinstance(node, dict):
        return list(node.items())
    return list(enumerate(node)) if isinstance(node, (list, tuple)) else []


def _replace_children(node, wrapped: Mapping[int, AdaptedLayer]) -> None:
    for name, child in _children(node):
        new = _replaced(child, wrapped)
        if new is child:
            continue
        if isinstance(node, nnx.Pytree):
            setattr(node, name, nnx.data(new))
        elif isinstance(node, (list, dict)):
            node[name] = new


def _replaced(child: Any, wrapped: Mapping[int, AdaptedLayer]) -> Any:
    if not isinstance(child, tuple):
        return wrapped.get(id(child), child)
    items = [_replaced(item, wrapped) for item in child]
    if all(new is old for new, old in zip(items, child, strict=True)):
        return child
    return type(child)(*items) if hasattr(child, "_fields") else tuple(items)


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
