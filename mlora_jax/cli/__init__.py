"""The modules of this package are commands. `python -m experiments.NAME` and the installed `mlora-NAME` start them."""
