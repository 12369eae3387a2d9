"""Genuine pipelines of every family at toy size, built from configurations, and how the stock pipeline is to be called."""

from tiny_pipelines import flux, longcat, qwen_image, sana, sd3, z_image
from tiny_pipelines.family import TinyFamily

FAMILIES: dict[str, TinyFamily] = {
    family.name: family
    for family in (
        sd3.MEDIUM,
        sd3.MEDIUM_35,
        sd3.LARGE_35,
        longcat.FAMILY,
        flux.DEV,
        flux.SCHNELL,
        qwen_image.FAMILY,
        z_image.FAMILY,
        sana.FAMILY,
    )
}
