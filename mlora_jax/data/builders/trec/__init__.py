"""The `trec` data set: see README.md in this folder."""
