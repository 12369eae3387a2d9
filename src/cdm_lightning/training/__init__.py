"""What carries an objective out: its networks, the student's rollouts (its own paths from noise) and the optimizer steps."""
