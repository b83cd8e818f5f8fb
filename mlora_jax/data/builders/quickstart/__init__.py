"""The `quickstart` data set: see README.md in this folder."""
