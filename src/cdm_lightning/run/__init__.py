"""A training run on disk: its folder, its lock, a record of each start, and the check whether the run may be resumed."""
