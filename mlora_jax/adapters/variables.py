"""The kinds of variables that an adapted layer adds to a model."""

from __future__ import annotations

from flax import nnx


class AdapterParam(nnx.Variable):
    """A trained leaf of an adapter: A [..., D, R], B [..., R, F] or a gate [..., R].

    An A has the metadata `kernel_layout` if the axes of ``A B`` have another order than those of the kernel; see
    `mlora_jax.core.fold`.
    """


class RankProfile(nnx.Variable):
    """A rank profile p [..., R].

    It has three items of metadata. `leading` is the number of axes that it shares with its factors: the axes of a stack
    and then the axes of groups. `groups` is the number of axes of groups. `names` are all paths of a shared layer.
    """


class InputGram(nnx.BatchStat):
    """The sum ``H^T H`` [..., R, R] over the inputs of B, ``H = (x A) * p`` or ``(x A) * (p * gate)``.

    `mlora_jax.adapters.watch_inputs` adds it to a model.
    """


class DropoutKey(nnx.Variable):
    """The adapter dropout's random key, one per stacked layer. It holds zeros until `set_dropout_key` sets it."""
