"""The checkpoints of a run: how they are written, found, verified and read, when a run saves and when it stops."""
