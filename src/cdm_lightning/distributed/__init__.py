"""Start the processes of a run, distribute its networks over them, and let them communicate."""
