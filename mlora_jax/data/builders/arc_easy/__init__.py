"""The `arc_easy` data set: see README.md in this folder."""
