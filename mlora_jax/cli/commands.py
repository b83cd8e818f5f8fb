"""What the installed commands call: `mlora-run` is `python -m experiments.run`, and so on."""

import runpy


def _command(module: str):
    def start() -> None:
        # As the main module: only then are its flags and its docstring in --help.
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    return start


run = _command("experiments.run")
table = _command("experiments.table")
generate = _command("experiments.generate")
export = _command("experiments.export")
plan = _command("experiments.plan")
ranks = _command("experiments.ranks")
study = _command("experiments.study")
compile_report = _command("experiments.compile_report")
lm_eval = _command("mlora_jax.cli.lm_eval")
