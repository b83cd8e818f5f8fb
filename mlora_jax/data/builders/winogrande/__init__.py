"""The `winogrande` data set: see README.md in this folder."""
