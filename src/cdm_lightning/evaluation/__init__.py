"""Making images with the networks of a run, and measuring them side by side."""
