"""One TFDS builder per task, each in a package of its own: TFDS reads README and checksums from there."""
