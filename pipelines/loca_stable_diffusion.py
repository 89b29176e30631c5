"""Stable Diffusion with LoCA: the stock pipeline, with the methods of `loca_vision` on this class alone; nothing is patched.

`DiffusionPipeline.from_pretrained(..., custom_pipeline="pipelines/loca_stable_diffusion.py", trust_remote_code=True)`
"""

from diffusers import StableDiffusionPipeline

from loca_vision.pipeline.loader import LoCALoaderMixin, saved_as_stock


@saved_as_stock
class LoCAStableDiffusionPipeline(LoCALoaderMixin, StableDiffusionPipeline):  # type: ignore[misc]
    """`StableDiffusionPipeline` with `load_loca_weights` and related methods; it is saved as a `StableDiffusionPipeline`."""
