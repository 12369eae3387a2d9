"""Train as an objective says: build the networks, make the student's rollouts, and make the optimizer steps."""
