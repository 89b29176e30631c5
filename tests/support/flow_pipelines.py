"""Tiny whole pipelines of the families that are trained by flow matching, with all text encoders and tokenizers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from support import pipelines as tiny

_MARKS = ("<pad>", "</s>", "<unk>", "<s>", "user", "assistant", "system", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
_CHAT = (
    "{% for message in messages %}<s> {{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def words(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*_MARKS, *tiny.WORDS]))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>", model_max_length=512
    )
    made.chat_template = _CHAT if chat else None
    return made


def t5() -> T5EncoderModel:
    torch.default_generator.manual_seed(4)
    config = T5Config(vocab_size=len(words()), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval()


def vae() -> AutoencoderKL:
    return tiny.vae(scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)


def scheduler(**settings: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**settings)


def stable_diffusion_3() -> Any:
    torch.default_generator.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
    ).eval()
    return tiny.quiet(
        StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=scheduler(shift=3.0),
            vae=vae(),
            text_encoder=tiny.text_encoder(1, projection=True, hidden=8),
            text_encoder_2=tiny.text_encoder(3, projection=True, hidden=16),
            text_encoder_3=t5(),
            tokenizer=tiny.tokenizer(),
            tokenizer_2=tiny.tokenizer(),
            tokenizer_3=words(),
        )
    )


def flux() -> Any:
    torch.default_generator.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=24,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    ).eval()
    return tiny.quiet(
        FluxPipeline(
            transformer=transformer,
            scheduler=scheduler(use_dynamic_shifting=True),
            vae=vae(),
            text_encoder=tiny.text_encoder(),
            text_encoder_2=t5(),
            tokenizer=tiny.tokenizer(),
            tokenizer_2=words(),
        )
    )


def _flux2(width: int, *, guidance: bool) -> Flux2Transformer2DModel:
    torch.default_generator.manual_seed(0)
    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * width,
        timestep_guidance_channels=32,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=guidance,
    ).eval()


def _flux2_vae() -> AutoencoderKLFlux2:
    torch.default_generator.manual_seed(2)
    made = AutoencoderKLFlux2(
        sample_size=16,
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    made.bn.running_mean.copy_(torch.linspace(-0.2, 0.2, 8))
    made.bn.running_var.copy_(torch.linspace(0.5, 2, 8))
    return made


def flux2_klein() -> Any:
    """Its language model has as many layers as the pipeline looks into."""
    torch.default_generator.manual_seed(4)
    config = Qwen3Config(
        vocab_size=len(words()),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=512,
    )
    return tiny.quiet(
        Flux2KleinPipeline(
            transformer=_flux2(8, guidance=False),
            scheduler=scheduler(use_dynamic_shifting=True),
            vae=_flux2_vae(),
            text_encoder=Qwen3ForCausalLM(config).eval(),
            tokenizer=words(chat=True),
        )
    )


def flux2() -> Any:
    torch.default_generator.manual_seed(4)
    text = {
        "model_type": "mistral",
        "vocab_size": len(words()),
        "hidden_size": 8,
        "intermediate_size": 8,
        "max_position_embeddings": 512,
        "num_attention_heads": 2,
        "num_hidden_layers": 31,
        "num_key_value_heads": 2,
        "head_dim": 4,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "image_size": 30,
        "patch_size": 6,
        "num_channels": 3,
    }
    model = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision, image_token_index=7))
    tokenizer = words(chat=True)
    return tiny.quiet(
        Flux2Pipeline(
            transformer=_flux2(8, guidance=True),
            scheduler=scheduler(use_dynamic_shifting=True),
            vae=_flux2_vae(),
            text_encoder=model.eval(),
            tokenizer=PixtralProcessor(PixtralImageProcessor(), tokenizer, patch_size=6, chat_template=_CHAT),
        )
    )
