"""The checkpoints of a run: writing, finding, verifying and reading them, and the callback that decides when a run saves and stops."""
