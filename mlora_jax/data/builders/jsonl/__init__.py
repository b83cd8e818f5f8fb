"""The `jsonl` data set: see README.md in this folder."""
