"""Generating images with the networks of a run, and measuring several samplers on the same prompts."""
