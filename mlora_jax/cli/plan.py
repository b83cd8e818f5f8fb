"""Prints the cost of an experiment: `python -m experiments.plan --config configs/NAME.py [--config.KEY=VALUE ...]`.

The cost is given as trials, batches, compilations, steps, tokens, bytes of adapters and a projected time. The command
loads the model and times a few steps, but trains nothing. With `--estimate` it only calculates, without weights and
without an accelerator. It then needs the model's config.json, except for the models of the paper, and prints operations
instead of a time; `--teraflops T` turns these into device hours.
"""

from absl import flags
from rich.console import Console
from rich.table import Table

from mlora_jax.cli.config_flags import run_with_config
from mlora_jax.cli.number_flags import define_float, define_integer
from mlora_jax.config_type import ConfigDict

TIMED_STEPS = define_integer("timed_steps", 3, "Number of steps that are timed for each kind of batch.")
ESTIMATE = flags.DEFINE_bool("estimate", False, "Calculates the cost, without weights and without timing.")
TERAFLOPS = define_float("teraflops", 100.0, "TFLOP/s that one device sustains, for --estimate.")


def duration(seconds: float) -> str:
    """Returns a number of seconds in words.

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
    if ESTIMATE.value:
        print_estimate(config)
        return
    from mlora_jax.cost.plan import plan

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
        f"{_tasks(found.tasks)}"
        f"projected in all{', without those tasks' * bool(found.tasks.curves)}: {duration(found.seconds)}",
        highlight=False,
    )


def _tasks(tasks) -> str:
    """Returns a line on the tasks of `config.evaluation.tasks`; "" if there are none."""
    if not tasks.curves:
        return ""
    unknown = f", without {', '.join(tasks.unknown)}, whose size is not known" if tasks.unknown else ""
    return f"{tasks.curves:,} curves on further tasks: {tasks.requests:,} requests at all ranks{unknown}\n"


def print_estimate(config: ConfigDict) -> None:
    """Prints the cost of a resolved config as `mlora_jax.cost.estimate` calculates it."""
    from mlora_jax.cost.estimate import estimate

    found = estimate(config)
    parameters = ", ".join(
        f"{count:,} (R = {form.rank}{', with gates' if form.gate else ''}"
        f"{'' if form.optimizer == 'adam' else f', {form.optimizer}'})"
        for form, count in found.adapter_parameters.items()
    )
    work = {
        "training": found.training_operations,
        "curves on its own rows": found.own_operations,
        "curves on further tasks": found.task_operations,
        "in all": found.operations,
    }
    table = Table("", "operations", f"device hours at {TERAFLOPS.value:g} TFLOP/s")
    for label, operations in work.items():
        table.add_row(label, f"{operations:.2e}", f"{operations / TERAFLOPS.value / 1e12 / 3600:,.1f}")
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(
        f"{found.trials} trials of {found.steps} steps on {found.rows:,} rows; about {found.tokens:,} tokens, a step "
        f"costs {found.passes:.2f} LoRA steps on average\n"
        f"base: {found.parameters:,} parameters, {found.base_bytes:,} bytes\n"
        f"parameters of an adapter: {parameters}; with gradients and optimizer {found.trial_bytes:,} bytes\n"
        f"all adapters: {found.adapter_bytes:,} bytes\n"
        f"{found.curves:,} rank-accuracy curves on its own rows\n"
        f"{_tasks(found.tasks)}"
        "by arithmetic, from mean lengths: right to a factor of two or so",
        highlight=False,
    )


if __name__ == "__main__":
    main()
