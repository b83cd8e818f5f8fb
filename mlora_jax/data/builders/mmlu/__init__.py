"""The `mmlu` data set: see README.md in this folder."""
