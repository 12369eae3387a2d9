"""How an objective is trained: its networks, their rollouts, their optimizer steps."""
