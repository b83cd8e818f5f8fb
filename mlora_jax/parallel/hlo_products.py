"""The FLOPs of the matrix products and convolutions of a compiled program."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence

from mlora_jax.parallel.hlo_text import Instruction, Shape, find_attribute


def _integers(rest: str, name: str) -> list[int]:
    found = re.search(rf"\b{name}=\{{([\d,]*)\}}", rest)
    return [int(each) for each in found[1].split(",") if each] if found else []


def _dot_flops(one: Instruction, operands: Sequence[Shape]) -> float:
    contracted = math.prod(operands[0].sizes[axis] for axis in _integers(one.rest, "lhs_contracting_dims"))
    return 2.0 * math.prod(one.shapes[0].sizes) * contracted


def _convolution_flops(one: Instruction, operands: Sequence[Shape]) -> float:
    """Counts only taps of the window that lie on the input: a product written as a convolution has few of them."""
    left, right, out = find_attribute(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest).groups()
    lhs, rhs, result = operands[0].sizes, operands[1].sizes, one.shapes[0].sizes
    groups = {name: int(found[1]) if (found := re.search(rf"{name}=(\d+)", one.rest)) else 1
              for name in ("feature_group_count", "batch_group_count")}  # fmt: skip
    window = _window(one.rest, len(lhs) - 2)
    positions = 1
    for axis in range(len(lhs) - 2):
        label = str(axis)
        sizes = lhs[left.index(label)], rhs[right.index(label)], result[out.index(label)]
        positions *= _taps(*sizes, **{name: values[axis] for name, values in window.items()})
    features = lhs[left.index("f")] // groups["feature_group_count"] * rhs[right.index("o")]
    return 2.0 * features * (lhs[left.index("b")] // groups["batch_group_count"]) * positions


def _window(rest: str, axes: int) -> dict[str, list]:
    found = re.search(r"window=\{([^}]*)\}", rest)
    given = dict(part.split("=") for part in found[1].split()) if found else {}
    numbers = lambda name: [int(x) for x in given[name].split("x")] if name in given else [1] * axes  # noqa: E731
    pads = given["pad"].split("x") if "pad" in given else ["0_0"] * axes
    return {
        "stride": numbers("stride"),
        "low": [int(pad.split("_")[0]) for pad in pads],
        "base": numbers("lhs_dilate"),
        "dilation": numbers("rhs_dilate"),
        "reverse": [number == "1" for number in given["rhs_reversal"].split("x")] if "rhs_reversal" in given
        else [False] * axes,
    }  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _taps(size: int, kernel: int, out: int, *, stride: int, low: int, base: int, dilation: int, reverse: bool) -> int:
    """Counts the pairs of an output and a tap of the window whose input is neither padding nor a hole."""
    if kernel == 1 and low == 0 and base == 1:
        return min(out, -(-size // stride))
    first, span = -low, (size - 1) * base
    count = 0
    for tap in range(kernel):
        at = first + tap * dilation
        if base == 1:
            # Outputs o with 0 <= at + o * stride <= span.
            lowest = max(0, -(at // stride))
            highest = min(out - 1, (span - at) // stride)
            count += max(0, highest - lowest + 1)
        else:
            count += sum(0 <= (place := at + o * stride) <= span and place % base == 0 for o in range(out))
    return count


PRODUCTS = {"dot": _dot_flops, "convolution": _convolution_flops}
