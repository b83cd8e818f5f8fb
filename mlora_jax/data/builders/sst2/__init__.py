"""The `sst2` data set: see README.md in this folder."""
