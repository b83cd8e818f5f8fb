"""Defines flags that take numbers. One table has the range of each flag, and the parsers enforce it."""

from collections.abc import Sequence

from absl import flags

from mlora_jax.core.ranges import LARGEST_FLOAT, LARGEST_INTEGER, SEEDS, Range

# A flag that the functions below define belongs to the command that calls them, whose `--help` then shows it.
flags.disclaim_key_flags()

COUNT = Range(low=1, high=LARGEST_INTEGER)
COUNT_OR_NONE = Range(low=0, high=LARGEST_INTEGER)
# Flag -> its range, which is the same in every command that has a flag of this name.
RANGES = {
    "batch": COUNT,
    "batch_size": COUNT,
    "budget": COUNT,
    "effort": Range(low=-1.0, high=1.0),
    "flash_from": COUNT_OR_NONE,
    "hours": Range(low=0.0, high=1e6),
    "kv_budget": Range(low=0.0, high=1.0, open_low=True),
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
    """Makes a parser of absl reject numbers outside a `Range`. The bounds of absl itself would let NaN pass."""

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
    """Defines a flag whose value is an integer, and returns its holder.

    Args:
      name: the name of the flag, a key of `RANGES`.
      default: the value if the flag is not given.
      help: the text for `--help`.
    """
    return flags.DEFINE(_IntegerParser(RANGES[name]), name, default, help, serializer=flags.ArgumentSerializer())


def define_float(name: str, default: float | None, help: str) -> flags.FlagHolder:
    """Defines a flag whose value is a float, and returns its holder.

    Args:
      name: the name of the flag, a key of `RANGES`.
      default: the value if the flag is not given.
      help: the text for `--help`.
    """
    return flags.DEFINE(_FloatParser(RANGES[name]), name, default, help, serializer=flags.ArgumentSerializer())


def integers(name: str, values: Sequence[str], *, low: int | None = None, words: Sequence[str] = ()) -> list[int | str]:
    """Returns the values of a flag that is a list of integers.

    Args:
      name: the name of the flag, a key of `RANGES`.
      values: the texts between its commas.
      low: the smallest allowed integer; None: that of the table.
      words: texts that are allowed besides integers. They are returned as they are.

    Raises:
      ValueError: a value is neither an integer in the range nor one of `words`.
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
