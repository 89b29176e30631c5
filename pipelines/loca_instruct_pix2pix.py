"""InstructPix2Pix with LoCA: the stock pipeline, with the methods of `loca_vision` on this class alone; nothing is patched.

`DiffusionPipeline.from_pretrained(..., custom_pipeline="pipelines/loca_instruct_pix2pix.py", trust_remote_code=True)`
"""

from diffusers import StableDiffusionInstructPix2PixPipeline

from loca_vision.pipeline.loader import LoCALoaderMixin, saved_as_stock


@saved_as_stock
class LoCAInstructPix2PixPipeline(LoCALoaderMixin, StableDiffusionInstructPix2PixPipeline):  # type: ignore[misc]
    """`StableDiffusionInstructPix2PixPipeline` with `load_loca_weights` and related methods; it is saved under that name."""
