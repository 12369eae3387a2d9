"""The mathematics of Continuous-Time Distribution Matching, on tensors alone.

Nothing in this folder depends on a network, on a training framework or on a configuration.
"""
