"""Diversity within a prompt: how far apart the images of one prompt are that started from different noise."""

import torch
from torch import Tensor


def pairwise_diversity(features: Tensor) -> float:
    """Mean Euclidean distance over all pairs of images of a prompt and over prompts, in the units of the features.

    features (P, M, D): P prompts with M >= 2 images each; ValueError with fewer. 0 says that noise no longer matters.
    """
    images = features.shape[1]
    if images < 2:
        raise ValueError(f"diversity needs at least 2 images a prompt, got {images}")
    first, second = torch.triu_indices(images, images, offset=1)
    features = features.cpu().double()
    return float((features[:, first] - features[:, second]).norm(dim=-1).mean())
