"""Building blocks that the model families share; each holds its weights and computes one thing."""
