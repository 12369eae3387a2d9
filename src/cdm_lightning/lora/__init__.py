"""Low-rank adapters (LoRA, arXiv:2106.09685) on one frozen base network: their settings, training, fusion and extraction."""
