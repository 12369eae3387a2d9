"""Run an objective: the networks, the student's rollouts (its own paths from noise) and the optimizer steps."""
