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
from mlora_jax.core.product import GATE_INITIALIZERS, folding_pays, path_hash


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

    The model may be any Flax NNX model. Adapters fit its `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum`, `nnx.Conv`
    and `nnx.Embed`, which are called linear layers here. If a kernel has leading axes because layers are stacked for a
    scan, its factors and its profile have the same leading axes. The given model is not changed, and the new model
    shares its frozen arrays.

    Args:
      model: the base model. Its arrays may have any dtype; the factors have jax's default float dtype.
      rank: R, at least 1.
      targets: regular expressions for dotted module paths. Each must match a whole path, or the whole part of a path
        after one of its dots: "q_proj" matches layers.self_attn.q_proj, and r"mlp\\..*" matches everything in an mlp.
      key: a `jax.random.key`. The draw of a layer depends only on the key and the layer's path; a shared layer uses its
        first path.
      init: "fan_rank" or "fan_in", see `mlora_jax.core.initialize_factors`. D is the product of the axes that a kernel
        contracts, with the window of a convolution. For an embedding, "fan_in" starts as PEFT does: A is zero, and B is
        normal.
      dropout: the rate of dropout on the adapters' inputs, in [0, 1).
      gate: if it is not False, every adapter also has a trained vector ``gate`` [..., R] that multiplies its profile:
        ``y = x W + ((x A) * (p * gate)) B``. With True the gate starts at ones; a key of
        `mlora_jax.core.GATE_INITIALIZERS` selects another start.

    Returns:
      A new model in which every profile is one. ``A B`` is zero, so the new model computes what `model` computes.

    Raises:
      ValueError: a pattern is not a regular expression or matches no linear layer, and the message lists the layers;
        the model already has adapters; the rank is below 1; `init` or `gate` is unknown; the dropout rate is outside
        [0, 1); a layer has an option with which no adapter can represent it, such as a masked convolution; or the
        `nnx.Param` of a kernel is also in another module, which folding into the kernel would change.

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
    """Lets every adapted `nnx.Linear` compute ``x (W + A diag(p) B)`` if that takes fewer multiplications.

    This is the case for many tokens with the same profile. A layer only does it on a CPU, and only if its kernel is
    float32 or wider, because a narrower kernel would lose what is added to it. Use the function for models that are not
    trained: in training, the gradient of a factor would need a gradient of the kernel's size.

    Args:
      model: an adapted model. It is changed in place.

    Returns:
      The same model.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, AdaptedLinear):
            module.folds = True
    return model


def fold_in_training(model: nnx.Module, *, on: bool = True) -> nnx.Module:
    """Lets small adapted `nnx.Linear` layers train by the product with the sum of kernel and adapter.

    A CPU does so in less time, see `mlora_jax.core.product.folding_pays`. Layers with other kernels, profiles per token
    or dropout go on as before.

    Args:
      model: an adapted model. It is changed in place.
      on: false lets all layers go back to products of their own.

    Returns:
      The same model.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, AdaptedLinear):
            (features_in, rank), features_out = module.a.shape[-2:], module.b.shape[-1]
            module.trains_folded = on and folding_pays(features_in, features_out, rank)
    return model


def watch_inputs(model: nnx.Module, *, inputs: bool = False, mean: bool = False) -> nnx.Module:
    """Lets every adapted `nnx.Linear` add ``H^T H`` to an `InputGram` at each call; ``H = (x A) * p`` is B's input.

    `split(model, mutable=InputGram)` then returns a fifth tree, which `mlora_jax.core.squeeze` takes as its `grams`. A
    token whose profile is zero adds nothing.

    Args:
      model: an adapted model. It is changed in place.
      inputs: if true, the gram is ``X^T X`` [..., D, D] of the layer's inputs, and otherwise ``H^T H`` [..., R, R].
      mean: if true and `inputs` is, X has a further feature that is 1: the gram is [..., D + 1, D + 1], its last column
        holds the sums of the inputs, and its last entry is the number of tokens.

    Returns:
      The same model.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, AdaptedLinear):
            *stack, features, rank = module.a.shape
            size = features + mean if inputs else rank
            module.gram, module.watches_inputs = InputGram(jnp.zeros((*stack, size, size), module.p.dtype)), inputs
            module.watches_mean = inputs and mean
    return model


def split(model: nnx.Module, *, mutable: Any = None) -> tuple:
    """Splits a model into the pytrees that pure functions work on.

    `nnx.merge(graphdef, base, adapter, profile)` returns the model again. To train only the adapter, differentiate with
    respect to `adapter` alone.

    A pure function loses what a call of the merged model writes to its variables. Random-number counts and batch
    statistics are such variables, and a model in which a call would write them is an error by default. There are two
    ways to split it. In `model.eval()` mode, dropout and batch norm write nothing. Or the variables are threaded: name
    them by `mutable`, pass the fifth tree to `nnx.merge` too, and after each call take the tree for the next call from
    `nnx.state(model, mutable)`.

    Merge with `copy=True` if two things are true. First, a tree comes from outside the innermost transform; for
    example, `jax.grad` differentiates with respect to `adapter`, and `base` is a closed-over value. Second, the model
    runs an NNX transform such as `nnx.scan`, or has threaded variables. Without the copy NNX raises an error, because
    it does not pass on or write variables of another trace level.

    Args:
      model: an adapted model.
      mutable: an NNX filter for the threaded variables, such as `nnx.RngState` or `(nnx.RngState, nnx.BatchStat)`; None
        if there are none.

    Returns:
      (graphdef, base, adapter, profile), and with `mutable` a fifth tree of the threaded variables. `graphdef` is an
      `nnx.GraphDef`, and each tree is an `nnx.State`: `base` has the frozen variables, `adapter` has the factors and
      gates, and `profile` has the rank profiles and dropout keys. Shapes and dtypes are those of the model.

    Raises:
      ValueError: the model has no adapters, or a call would write variables that `mutable` does not name.
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
    """Returns the key of `GATE_INITIALIZERS` that the argument of `adapt` selects; None if there is no gate."""
    if isinstance(gate, bool):
        return "ones" if gate else None
    if gate not in GATE_INITIALIZERS:
        raise ValueError(f"unknown gate {gate!r}; allowed: True, False, {', '.join(map(repr, GATE_INITIALIZERS))}")
    return gate


def _adapted(layer: nnx.Module, names: tuple[str, ...], rank: int, key: jax.Array, **options) -> AdaptedLayer:
    """Returns a layer with its adapter; `names` are all paths of the layer."""
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
    """Raises a ValueError if a kernel is also in another module than its layer. A layer may be shared as a whole."""
    own = {id(getattr(layer, kind.frozen)): layer for layer in reversed(layers) if (kind := layer_kind(layer))}
    found: dict[int, dict[int, str]] = {}  # id of a kernel -> {id of a module that has it: the first path there}
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
    """Returns the paths of random-number and batch-statistics variables whose owner is not in evaluation mode."""
    nodes = dict(nnx.iter_graph(model))
    threadable = [path for path, node in nodes.items() if isinstance(node, (nnx.RngState, nnx.BatchStat))]
    return [tuple(path) for path in threadable if _evaluates(nodes, path) is not True]


def _evaluates(nodes: Mapping, path: tuple) -> bool | None:
    """Returns true if the owner of a written variable is in evaluation mode; None if no owner has such a mode."""
    switch = "use_running_average" if isinstance(nodes[path], nnx.BatchStat) else "deterministic"
    owners = (nodes.get(path[:depth]) for depth in range(len(path) - 1, -1, -1))
    states = (getattr(owner, switch, None) for owner in owners)
    # An nnx.Rngs returns a value for any name, but never a bool.
    return next((state for state in states if isinstance(state, bool)), None)


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
