"""Training: objective, step, loop, records, adapters on disk."""
