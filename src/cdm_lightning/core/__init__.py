"""The mathematics of Continuous-Time Distribution Matching (CDM, arXiv:2605.06376), as functions on tensors.

Nothing in this folder depends on a particular network, on a training framework or on a configuration. Sigma, the noise
level, is 1 for pure noise and 0 for data everywhere.
"""
