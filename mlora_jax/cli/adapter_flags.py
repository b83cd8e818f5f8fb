"""Flags that name one adapter of a run, shared by the commands that read it."""

from absl import flags

from mlora_jax.core import READOUTS

TRIAL = flags.DEFINE_string("trial", None, "Name of the trial: that of its folder in the run's adapters.")
READOUT = flags.DEFINE_enum("readout", "prefix", list(READOUTS), "How the adapter is read out.")
