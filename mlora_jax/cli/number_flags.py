"""Flags that take numbers: the range of each, in one table, and the parsers that keep to it."""

from collections.abc import Sequence

from absl import flags

from mlora_jax.core.ranges import LARGEST_FLOAT, LARGEST_INTEGER, SEEDS, Range

# A flag is the key flag of the command that defines it by the functions below.
flags.disclaim_key_flags()

COUNT = Range(low=1, high=LARGEST_INTEGER)
COUNT_OR_NONE = Range(low=0, high=LARGEST_INTEGER)
# Flag -> its range. A flag of this name has it in every command.
RANGES = {
    "batch": COUNT,
    "batch_size": COUNT,
    "budget": COUNT,
    "effort": Range(low=-1.0, high=1.0),
    "flash_from": COUNT_OR_NONE,
    "hours": Range(low=0.0, high=1e6),
    "levels": COUNT_OR_NONE,
    "limit": COUNT,
    "max_new_tokens": COUNT,
    "rank": COUNT_OR_NONE,
    "seed": SEEDS,
    "temperature": Range(low=0.0, high=LARGEST_FLOAT),
    "teraflops": Range(low=0.001, high=LARGEST_FLOAT),
    "timed_steps": COUNT,
    "top_p": Range(low=0.0, high=1.0, open_low=True),
    "within": Range(low=0.0, high=1.0),
}


class _InRange:
    """Makes a parser of absl keep to a `Range`; absl's own bounds let NaN pass."""

    number_article: str
    number_name: str

    def __init__(self, within: Range) -> None:
        super().__init__()
        self.within = within
        self.syntactic_help = f"{self.number_article} {self.number_name} that is {within}"

    def is_outside_bounds(self, value: float) -> bool:
        return value not in self.within


class _IntegerParser(_InRange, flags.IntegerParser):
    pass


class _FloatParser(_InRange, flags.FloatParser):
    pass


def define_integer(name: str, default: int | None, help: str) -> flags.FlagHolder:
    """Defines a flag of `RANGES` whose value is an integer."""
    return flags.DEFINE(_IntegerParser(RANGES[name]), name, default, help, serializer=flags.ArgumentSerializer())


def define_float(name: str, default: float | None, help: str) -> flags.FlagHolder:
    """Defines a flag of `RANGES` whose value is a float."""
    return flags.DEFINE(_FloatParser(RANGES[name]), name, default, help, serializer=flags.ArgumentSerializer())


def integers(name: str, values: Sequence[str], *, low: int | None = None, words: Sequence[str] = ()) -> list[int | str]:
    """The values of a list flag of `RANGES`.

    Args:
      name: the flag's name.
      values: what stands between its commas.
      low: the least that is allowed, in place of the table's.
      words: values that are allowed besides integers, and stay as they are.

    Raises:
      ValueError: a value that is no such integer.
    """
    least, most = RANGES[name].low if low is None else low, RANGES[name].high
    given = ",".join(values)
    found = []
    for value in values:
        # Longer numbers are above the range, and Python refuses to read those of thousands of digits.
        if value in words:
            found.append(value)
        elif value.isascii() and value.isdecimal() and len(value) < 20 and least <= int(value) <= most:
            found.append(int(value))
        else:
            also = "".join(f" or {word}" for word in words)
            raise ValueError(
                f"--{name} must be integers in {least}..{most}{also} with commas between them, got {given!r}"
            )
    return found
