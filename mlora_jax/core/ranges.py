"""Ranges of the numbers that a user gives. An error message names the allowed range."""

from __future__ import annotations

import dataclasses

LARGEST_INTEGER = 2**31 - 1  # of an int32, which counts, positions and sizes become in arrays
LARGEST_SEED = 2**32 - 1  # jax.random.key keeps 32 bits where 64-bit types are off
LARGEST_FLOAT = 3.4028234663852886e38  # of a float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers from `low` to `high`, both included; NaN is in no range.

    Attributes:
      low, high: the bounds.
      open_low: whether `low` itself is left out.
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
        """Returns a value that is in the range.

        Raises:
          ValueError: it is not; the message has the name, the range and the value.

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

    Raises:
      ValueError: an integer beyond 2**31 - 1, or a number that is infinite or NaN in float32.
    """
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise ValueError(f"{name} must be at most {LARGEST_INTEGER}, got {value}")
    if isinstance(value, float) and not abs(value) <= LARGEST_FLOAT:
        raise ValueError(f"{name} must be finite, got {value}")
