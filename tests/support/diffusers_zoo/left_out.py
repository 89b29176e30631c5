"""Classes of diffusers that are not in the zoo, and why."""

_CONVOLUTIONS = "it has no linear layer"
_LIST = "a list of models that are here one by one"
_PARTS = "its layers are those of a model that is here, which calls them"

LEFT_OUT = {
    "AutoencoderKLAllegro": "it decodes in tiles of a size that takes seconds; its attention is that of AutoencoderKL",
    "AutoencoderOobleck": _CONVOLUTIONS,
    "AutoencoderTiny": _CONVOLUTIONS,
    "ControlNetXSAdapter": _PARTS,
    "FluxMultiControlNetModel": _LIST,
    "HunyuanDiT2DMultiControlNetModel": _LIST,
    "Kandinsky6SRLatentUpscalerBank": _CONVOLUTIONS,
    "Kandinsky6SRVAE": _CONVOLUTIONS,
    "LongCatAudioDiTVae": _CONVOLUTIONS,
    "MMAudioVocoder": _CONVOLUTIONS,
    "MiniMaxMusic3Vocoder": _CONVOLUTIONS,
    "ModelMixin": "what the others inherit from",
    "MotionAdapter": _PARTS,
    "MultiAdapter": _LIST,
    "MultiControlNetModel": _LIST,
    "MultiControlNetUnionModel": _LIST,
    "QwenImageMultiControlNetModel": _LIST,
    "RFD4ProteinaAutoencoder": "it takes the atoms of proteins; its layers are those of RFD4ProteinaTransformer",
    "SD3MultiControlNetModel": _LIST,
    "T2IAdapter": _CONVOLUTIONS,
}
