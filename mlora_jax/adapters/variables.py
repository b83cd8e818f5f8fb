"""The kinds of variables that an adapted layer adds to a model."""

from __future__ import annotations

from flax import nnx


class AdapterParam(nnx.Variable):
    """A trained leaf of an adapter: A [..., D, R], B [..., R, F] or a gate [..., R].

    Its metadata: `kernel_layout`, which an A has if its product ``A B`` has the kernel's axes in another order, see
    `mlora_jax.core.fold`.
    """


class RankProfile(nnx.Variable):
    """A rank profile p [..., R].

    Its metadata: `leading` counts the axes that it shares with its factors, the axes of a stack and then the axes of
    groups; `groups` counts the latter; `names` are all paths of a shared layer.
    """


class InputGram(nnx.BatchStat):
    """The sum ``H^T H`` [..., R, R] over the inputs of B, ``H = (x A) * p`` or ``(x A) * (p * gate)``.

    `mlora_jax.adapters.watch_inputs` adds it to a model.
    """


class DropoutKey(nnx.Variable):
    """The adapter dropout's random key, one per stacked layer. It holds zeros until `set_dropout_key` sets it."""
