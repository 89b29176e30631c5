"""A tiny CLIP model, saved to a folder with its tokenizer and image processor."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from support import pipelines as tiny


def write_tiny_clip(folder: Path) -> Path:
    """Save a CLIP for 16 x 16 images and 12 tokens, with random weights large enough to tell images and texts apart."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = tiny.tokenizer()
    marks = {f"{mark}_token_id": getattr(words, f"{mark}_token_id") for mark in ("bos", "eos", "pad")}
    text = shape | marks | {"vocab_size": len(words), "max_position_embeddings": 12}
    vision = shape | {"image_size": 16, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder
