"""The TFDS builders, one per task. Each has its own package, from which TFDS reads its README and its checksums."""
