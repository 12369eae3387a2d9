"""Several processes for one run: starting them, distributing networks over them, and their communication."""
