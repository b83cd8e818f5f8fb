"""What an experiment will cost: `python -m experiments.plan --config configs/NAME.py [--config.KEY=VALUE ...]`.

Prints trials, batches, compilations, steps, tokens, bytes of adapters and the projected time. Trains nothing.
"""

from absl import flags
from rich.console import Console
from rich.table import Table

from experiments.run import run_with_config

TIMED_STEPS = flags.DEFINE_integer("timed_steps", 3, "Steps of each kind of batch that are timed.", lower_bound=1)


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(59), duration(3661)
    ('59 s', '1 h 01 min')
    """
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if seconds >= 60 else f"{round(seconds)} s"


ROWS = (
    ("rank R", "rank", str),
    ("profiles a step", "profiles", str),
    ("trials", "trials", "{:,}".format),
    ("batches of trials", "batches", "{:,}".format),
    ("trials at once", "at_once", "{:,}".format),
    ("compilations", "compilations", "{:,}".format),
    ("tokens trained on", "tokens", "{:,}".format),
    ("tokens computed", "padded_tokens", "{:,}".format),
    ("seconds to compile", "compile_seconds", "{:.1f}".format),
    ("seconds a step", "step_seconds", "{:.3f}".format),
    ("training", "training_seconds", duration),
)


def main() -> None:
    """Parses the command line and prints the plan."""
    run_with_config(_plan)


def _plan(config) -> None:
    from mlora_jax.plan import plan

    found = plan(config, timed_steps=TIMED_STEPS.value)
    table = Table("", *(f"group {number}" for number, _ in enumerate(found.groups, start=1)))
    for label, name, form in ROWS:
        table.add_row(label, *(form(getattr(group, name)) for group in found.groups))
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(
        f"{found.trials} trials of {found.steps} steps; adapters: {found.adapter_bytes:,} bytes\n"
        f"{found.validations} validations while training: {duration(found.validation_seconds)}\n"
        f"{found.curves} rank-accuracy curves: {duration(found.evaluation_seconds)}\n"
        f"projected in all: {duration(found.seconds)}",
        highlight=False,
    )


if __name__ == "__main__":
    main()
