"""What an experiment will cost: measured by a few steps, or estimated by arithmetic."""
