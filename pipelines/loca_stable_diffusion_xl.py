"""Stable Diffusion XL with LoCA: the stock pipeline, with the methods of `loca_vision` on this class alone; nothing is patched.

`DiffusionPipeline.from_pretrained(..., custom_pipeline="pipelines/loca_stable_diffusion_xl.py", trust_remote_code=True)`
"""

from diffusers import StableDiffusionXLPipeline

from loca_vision.pipeline.loader import LoCALoaderMixin, saved_as_stock


@saved_as_stock
class LoCAStableDiffusionXLPipeline(LoCALoaderMixin, StableDiffusionXLPipeline):  # type: ignore[misc]
    """`StableDiffusionXLPipeline` with `load_loca_weights` and related methods; saved as a `StableDiffusionXLPipeline`."""
