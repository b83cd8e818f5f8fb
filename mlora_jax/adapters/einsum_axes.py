"""The einsum of an adapter, for which the kernel's letters are sorted into those of A, those of B and those of both."""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

ELLIPSIS = "..."


@dataclasses.dataclass(frozen=True)
class EinsumAxes:
    """A product ``x,kernel->output`` of one letter per axis.

    Attributes:
      x, kernel, output: the letters of the three arrays; x and output may have an ellipsis.
    """

    x: str
    kernel: str
    output: str

    @property
    def groups(self) -> str:
        """Returns the kernel's letters that are in x and in the output. Each of their values has a pair of factors."""
        return "".join(c for c in self.kernel if c in self.x and c in self.output)

    @property
    def contracted(self) -> str:
        """Returns the kernel's letters that are in x and not in the output. D is the product of their sizes."""
        return "".join(c for c in self.kernel if c in self.x and c not in self.output)

    @property
    def kept(self) -> str:
        """Returns the kernel's letters that are not in x. F is the product of their sizes."""
        return "".join(c for c in self.kernel if c not in self.x)

    def expanded(self, ndim: int) -> EinsumAxes:
        """Returns the product for an x with `ndim` axes, with letters in place of the ellipsis."""
        count = ndim - len(self.x.replace(ELLIPSIS, ""))
        fresh = "".join(c for c in string.ascii_letters if c not in self.x + self.kernel + self.output)[:count]
        return EinsumAxes(self.x.replace(ELLIPSIS, fresh), self.kernel, self.output.replace(ELLIPSIS, fresh))


def parse_einsum(equation: str) -> EinsumAxes:
    """Returns the letters of an einsum between an input and a kernel.

    Args:
      equation: the einsum, such as "btd,dnh->btnh".

    Raises:
      ValueError: the kernel is not one matrix per group between x and output.

    >>> letters = parse_einsum("btd,ndh->btnh")
    >>> letters.groups, letters.contracted, letters.kept
    ('', 'd', 'nh')
    """
    operands, _, output = equation.replace(" ", "").partition("->")
    x, kernel = operands.split(",")
    letters = EinsumAxes(x, kernel, output)
    complaint = _complaint(letters)
    if complaint:
        raise ValueError(f"the einsum {equation!r} has no adapter: {complaint}")
    return letters


def _complaint(letters: EinsumAxes) -> str:
    named = [part.replace(ELLIPSIS, "") for part in (letters.x, letters.kernel, letters.output)]
    repeated = sorted({c for part in named for c in part if part.count(c) > 1})
    lone = [c for c in letters.kernel if c not in letters.x + letters.output]
    complaints = {
        "its kernel has an ellipsis; give every axis of the kernel a letter": ELLIPSIS in letters.kernel,
        f"the letter {', '.join(repeated)} stands twice in one operand": bool(repeated),
        f"only its kernel has the letter {', '.join(lone)}": bool(lone),
        "no letter of its kernel is contracted with x": not letters.contracted,
    }
    return next((complaint for complaint, found in complaints.items() if found), "")


def einsum_product(
    letters: EinsumAxes,
    sizes: Sequence[int],
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    p: jax.Array,
    precision: Any,
) -> jax.Array:
    """Returns the adapter's contribution ``((x A) * p) B`` for a layer that computes an einsum.

    Args:
      letters: the letters of the einsum, without an ellipsis.
      sizes: the sizes of the kernel's axes.
      x: the input.
      a: [*groups, D, R].
      b: [*groups, R, F].
      p: [*groups, R]; or [*groups, B, R] or [*groups, B, T, R], where B and T are the first axes of x that are not
        groups.
      precision: the precision of both products.

    Returns:
      An array with the axes of the output, in the dtype of `x`.

    Raises:
      ValueError: a profile per example has axes that are not the first ones of x, or that are contracted.
    """
    size = dict(zip(letters.kernel, sizes, strict=True))
    rank = next(c for c in string.ascii_letters if c not in letters.x + letters.kernel + letters.output)
    groups, contracted, kept = letters.groups, letters.contracted, letters.kept
    a = a.reshape(*a.shape[:-2], *(size[c] for c in contracted), a.shape[-1])
    b = b.reshape(*b.shape[:-1], *(size[c] for c in kept))
    rest = "".join(c for c in letters.x if c not in contracted)
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    options = {"precision": precision, "preferred_element_type": accumulate}
    first = f"{letters.x},{groups}{contracted}{rank}->{rest}{rank}"
    hidden = jnp.einsum(first, x, a.astype(x.dtype), **options)
    p = place_profile(p, groups, letters.x, f"{rest}{rank}", hidden.shape)
    second = f"{rest}{rank},{groups}{rank}{kept}->{letters.output}"
    hidden = (hidden * p.astype(accumulate)).astype(x.dtype)
    return jnp.einsum(second, hidden, b.astype(x.dtype), precision=precision)


def place_profile(p: jax.Array, groups: str, batch: str, hidden: str, shape: tuple[int, ...]) -> jax.Array:
    """Returns a profile whose axes stand where the same axes of ``x A`` stand.

    Args:
      p: [*groups, ..., R], with the first axes of `batch` between the two.
      groups: the letters of the groups.
      batch: the letters of the axes that a profile per example may have, in order. Groups among them are skipped.
      hidden: the letters of ``x A``; the last one is the letter of R.
      shape: the shape of ``x A``.

    Returns:
      An array with as many axes as `hidden` has; an axis that `p` lacks has size one.

    Raises:
      ValueError: `p` has an axis that ``x A`` does not have, or has in another size.
    """
    count = p.ndim - 1 - len(groups)
    own = [*groups, *[c for c in batch if c not in groups][:count], hidden[-1]]
    sizes = dict(zip(hidden, shape, strict=True))
    if len(own) != p.ndim or [sizes.get(c) for c in own] != list(p.shape):
        raise ValueError(
            f"a profile of shape {p.shape} does not fit: its axes before R must be "
            f"{'the groups and then ' if groups else ''}the first axes of x, which this layer must not contract"
        )
    order = sorted(range(p.ndim), key=lambda axis: hidden.index(own[axis]))
    return p.transpose(order).reshape([sizes[c] if c in own else 1 for c in hidden])


def kernel_layout(letters: EinsumAxes, sizes: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns the sizes of the axes of ``A B``, and for each axis of the kernel its position among them.

    Args:
      letters: the letters of the einsum.
      sizes: the sizes of the kernel's axes.

    Returns:
      (sizes, positions), or None if the kernel's axes are in the order of those of ``A B``.
    """
    own = letters.groups + letters.contracted + letters.kept
    if own == letters.kernel:
        return None
    size = dict(zip(letters.kernel, sizes, strict=True))
    return tuple(size[c] for c in own), tuple(own.index(c) for c in letters.kernel)


def group_shape(letters: EinsumAxes, sizes: Sequence[int]) -> tuple[tuple[int, ...], int, int]:
    """Returns the sizes of a kernel's groups, and D and F.

    Args:
      letters: the letters of the einsum.
      sizes: the sizes of the kernel's axes.
    """
    size = dict(zip(letters.kernel, sizes, strict=True))
    features_in, features_out = (math.prod(size[c] for c in part) for part in (letters.contracted, letters.kept))
    return tuple(size[c] for c in letters.groups), features_in, features_out
