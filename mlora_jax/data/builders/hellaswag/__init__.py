"""The `hellaswag` data set: see README.md in this folder."""
