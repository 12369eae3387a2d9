"""Several processes for one run: how they start, how networks are distributed over them, how they communicate."""
