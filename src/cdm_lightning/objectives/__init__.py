"""What is learned: each objective says whom it trains, on what, and in which order. Torch and `core` only."""
