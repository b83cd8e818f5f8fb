"""The `platypus` data set: see README.md in this folder."""
