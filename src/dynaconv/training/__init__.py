"""Training: the epochs, the optimiser and its schedule."""
