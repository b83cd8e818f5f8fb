"""Declares the ranges of the numbers that a user gives. An error message names the allowed range."""

from __future__ import annotations

import dataclasses

LARGEST_INTEGER = 2**31 - 1  # the largest int32; arrays store counts, positions and sizes as int32
LARGEST_SEED = 2**32 - 1  # jax.random.key keeps 32 bits of a seed unless 64-bit types are enabled
LARGEST_FLOAT = 3.4028234663852886e38  # the largest finite float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers from `low` to `high`, with both bounds. NaN is in no range.

    Attributes:
      low, high: the bounds.
      open_low: if true, `low` itself is not in the range.
    """

    low: float
    high: float
    open_low: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and not (self.open_low and value == self.low)

    def __str__(self) -> str:
        above = f"{'above' if self.open_low else 'at least'} {self.low}"
        return f"{above} and {'finite' if self.high == LARGEST_FLOAT else f'at most {self.high}'}"

    def check(self, name: str, value: float) -> float:
        """Returns a value if it is in the range.

        Args:
          name: the name of the value, for the message.
          value: the number to check.

        Raises:
          ValueError: the value is outside the range; the message gives the name, the range and the value.

        >>> Range(low=0, high=3).check("--rank", 4)
        Traceback (most recent call last):
        ValueError: --rank must be at least 0 and at most 3, got 4
        """
        if value not in self:
            raise ValueError(f"{name} must be {self}, got {value}")
        return value


SEEDS = Range(low=0, high=LARGEST_SEED)


def check_number(name: str, value: float) -> None:
    """Checks that a number fits an array's int32 or float32.

    Args:
      name: the name of the number, for the message.
      value: the number. Values of other types pass.

    Raises:
      ValueError: the value is an int whose absolute value exceeds 2**31 - 1, or a float that is not finite in float32.
    """
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise ValueError(f"{name} must be at most {LARGEST_INTEGER}, got {value}")
    if isinstance(value, float) and not abs(value) <= LARGEST_FLOAT:
        raise ValueError(f"{name} must be finite, got {value}")
