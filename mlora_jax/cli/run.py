"""Runs an experiment: `python -m experiments.run --config configs/NAME.py --workdir DIR [--config.KEY=VALUE ...]`.

`--config NAME` takes a config that the package ships. The variant of a config that has several follows a colon:
`--config paper_gsm8k_llama32_1b:r256`, `--config configs/paper_gsm8k_llama32_1b.py:smoke`.

Every key can be set on the command line, whether the config file names it or not: `--help` and docs/config.md list the
keys. For a config of the study (configs/study_*.py), the command leaves the group `study` out.
"""

from __future__ import annotations

import os

from absl import flags

from mlora_jax.cli import config_flags
from mlora_jax.cli.config_flags import WORKDIR, run_with_config
from mlora_jax.config_type import ConfigDict

flags.adopt_module_key_flags(config_flags)


def main() -> None:
    """Parses the command line and runs the experiment. Bad input ends the command with a message of one line."""
    flags.mark_flag_as_required("workdir")
    run_with_config(_run)


def _run(config: ConfigDict) -> None:
    from mlora_jax.parallel import hosts
    from mlora_jax.run.folder import stored_threads
    from mlora_jax.run.train import train

    workdir = str(WORKDIR.value)
    if threads := stored_threads(workdir):
        # The last bits of results depend on how XLA divides its work. XLA reads this variable when it starts.
        os.environ.setdefault("NPROC", str(threads))
    results = train(config, workdir)
    if not hosts.is_first():
        return
    compiled = ", ".join(f"{count} for {use}" for use, count in results.compilations.items())
    print(f"\n{(results.workdir / 'table.md').read_text(encoding='utf-8')}")
    print(f"executables compiled: {compiled}\nresults in {results.workdir}")


if __name__ == "__main__":
    main()
