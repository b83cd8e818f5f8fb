"""The commands. `python -m experiments.NAME` and the installed `mlora-NAME` start the modules of this package."""
