"""Low-rank adapters (LoRA, arXiv:2106.09685) on a shared frozen network: settings, training, fusion and extraction."""
