"""A training run on disk: its folder, its lock, the record of its starts, and the check whether it may be resumed."""
