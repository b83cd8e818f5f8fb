"""Experiment configs: one file per experiment, values and nothing else."""
