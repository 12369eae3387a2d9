"""Low-rank adapters (LoRA, arXiv:2106.09685) on one frozen base: their settings, training, fusing and extraction."""
