"""The training of an objective: its networks, the student's rollouts and the optimizer steps."""
