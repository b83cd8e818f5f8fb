"""What an experiment will cost: `python -m experiments.plan --config configs/NAME.py [--config.KEY=VALUE ...]`.

Prints trials, batches, compilations, steps, tokens, bytes of adapters and the projected time. Trains nothing.
"""

from absl import flags
from rich.console import Console
from rich.table import Table

from experiments.run import run_with_config

TIMED_STEPS = flags.DEFINE_integer("timed_steps", 3, "Steps of each kind of batch that are timed.", lower_bound=1)


def main() -> None:
    """Parses the command line and prints the plan."""
    run_with_config(_plan)


def _plan(config) -> None:
    from mlora_jax.plan import plan

    found = plan(config, timed_steps=TIMED_STEPS.value)
    table = Table(
        *("R", "profiles", "trials", "batches", "at once", "compilations", "tokens", "computed"),
        *("compile s", "step s", "training"),
        title=f"{found.trials} trials of {found.steps} steps",
    )
    for group in found.groups:
        table.add_row(
            *(f"{n:,}" for n in (group.rank, group.profiles, group.trials, group.batches, group.at_once)),
            *(f"{n:,}" for n in (group.compilations, group.tokens, group.padded_tokens)),
            *(f"{group.compile_seconds:.1f}", f"{group.step_seconds:.3f}", duration(group.training_seconds)),
        )
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(
        f"adapters: {found.adapter_bytes:,} bytes; {found.curves} curves: {duration(found.evaluation_seconds)}; "
        f"projected in all: {duration(found.seconds)}",
        highlight=False,
    )


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(59), duration(3661)
    ('59 s', '1 h 01 min')
    """
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if seconds >= 60 else f"{round(seconds)} s"


if __name__ == "__main__":
    main()
