"""The training objectives: which networks are trained, by which losses and in which order. They need torch and `core` only."""
