"""The mathematics of Continuous-Time Distribution Matching (CDM, arXiv:2605.06376), as functions on tensors.

This folder is independent of networks, training framework and configuration. Sigma is the noise level: 1 for pure noise and 0 for
data.
"""
