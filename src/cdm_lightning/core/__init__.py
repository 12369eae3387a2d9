"""Continuous-Time Distribution Matching as mathematics on tensors: knows no network, no framework, no configuration."""
