"""The `gsm8k` data set: see README.md in this folder."""
