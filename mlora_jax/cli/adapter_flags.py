"""Defines the flags that name one adapter of a run, for the commands that read an adapter."""

from absl import flags

from mlora_jax.core import READOUTS

TRIAL = flags.DEFINE_string("trial", None, "Name of the trial, which is the name of its folder in RUN/adapters.")
READOUT = flags.DEFINE_enum("readout", "prefix", list(READOUTS), "How the adapter is read out at a rank.")
