"""Generating images with the networks of a run, and measuring teacher and student on the same prompts."""
