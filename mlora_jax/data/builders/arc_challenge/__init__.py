"""The `arc_challenge` data set: see README.md in this folder."""
