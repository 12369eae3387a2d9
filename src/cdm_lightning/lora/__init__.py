"""Low-rank adapters (LoRA, arXiv:2106.09685) on one frozen base: what is trained, the roles' views, fusing, extraction."""
