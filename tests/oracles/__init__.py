"""Independent renderings of the formulas in NumPy and PyTorch; they import nothing of the package."""
