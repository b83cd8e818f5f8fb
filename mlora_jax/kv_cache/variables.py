"""The kinds of variables that a projected attention adds to a model."""

from __future__ import annotations

from flax import nnx


class KVBasis(nnx.Variable):
    """An orthogonal matrix U [..., KV, Hd, Hd] of keys or of values. Its first r columns span what rank r keeps."""


class KVMean(nnx.Variable):
    """The mean value [..., KV, Hd] of each head, which stays the same at every rank."""


class KVRank(nnx.Variable):
    """The number of entries, int32 [..., KV], that each head keeps of a projected key or value. It is data."""
