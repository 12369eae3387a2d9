"""The training objectives: which networks are trained, on what, and in which order. They depend on torch and `core` only."""
