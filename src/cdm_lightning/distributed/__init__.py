"""Several processes for one run: start them, distribute networks over them, and let them communicate."""
