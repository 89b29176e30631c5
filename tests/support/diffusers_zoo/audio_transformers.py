"""Transformers for sound, and for proteins of diffusers, as small as their classes allow."""

from __future__ import annotations

import torch

from support.diffusers_zoo.case import Case, ids, noise

CASES = {
    "AceStepTransformer1DModel": Case(
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "in_channels": 24,
            "audio_acoustic_hidden_dim": 8,
            "patch_size": 2,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-06,
            "sliding_window": 16,
        },
        lambda: {
            "hidden_states": noise(2, 8, 8),
            "timestep": torch.tensor([1.541, 0.293429]),
            "timestep_r": torch.tensor([1.541, 0.293429]),
            "encoder_hidden_states": noise(2, 10, 32),
            "context_latents": noise(2, 8, 16),
        },
    ),
    "LongCatAudioDiTTransformer": Case(
        {"dit_dim": 64, "dit_depth": 2, "dit_heads": 4, "dit_text_dim": 32, "latent_dim": 8, "text_conv": False},
        lambda: {
            "hidden_states": noise(1, 16, 8),
            "encoder_hidden_states": noise(1, 10, 32),
            "encoder_attention_mask": torch.ones(1, 10, dtype=torch.bool),
            "attention_mask": torch.ones(1, 16, dtype=torch.bool),
            "timestep": torch.tensor([1.0]),
        },
    ),
    "MiniMaxMusic3Transformer1DModel": Case(
        {
            "in_channels": 8,
            "condition_dim": 16,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "ff_inner_dim": 32,
            "rotary_dim": 4,
            "fourier_embedding_dim": 8,
        },
        lambda: {"hidden_states": noise(1, 8, 24), "encoder_hidden_states": noise(1, 24, 16), "timestep": torch.tensor([0.5])},
    ),
    "RFD4ProteinaTransformer": Case(
        {
            "nlayers": 2,
            "token_dim": 16,
            "nheads": 2,
            "dim_cond": 8,
            "pair_repr_dim": 8,
            "latent_dim": 4,
            "token_type_emb_dim": 4,
            "cath_emb_dim": 4,
            "t_emb_dim": 8,
            "seq_sep_dim": 4,
            "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
            "tri_mult_c": 8,
        },
        lambda: {
            "bb_ca": noise(1, 4, 3),
            "local_latents": noise(1, 4, 4),
            "bb_ca_time": torch.tensor([0.5]),
            "local_latents_time": torch.tensor([0.5]),
            "padding_mask": torch.ones(1, 4).bool(),
            "token_type": ids(7, 1, 4),
            "atom37_mask": torch.ones(1, 4, 37).bool(),
            "conditioning": {
                "is_in_context_conditioning": torch.zeros(1, 4).bool(),
                "supports_local_latent": torch.ones(1, 4).bool(),
            },
        },
    ),
    "StableAudio3DiTModel": Case(
        {
            "io_channels": 8,
            "patch_size": 1,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 4,
            "cond_token_dim": 16,
            "global_cond_dim": 12,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 16,
            "ff_mult": 2,
            "num_memory_tokens": 3,
            "use_differential_attention": False,
        },
        lambda: {
            "hidden_states": noise(2, 8, 16),
            "timestep": torch.tensor([0.00442582, 0.725697]),
            "encoder_hidden_states": noise(2, 4, 16),
            "global_hidden_states": noise(2, 12),
        },
    ),
    "StableAudioDiTModel": Case(
        {
            "sample_size": 4,
            "in_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 4,
            "num_attention_heads": 4,
            "num_key_value_attention_heads": 2,
            "out_channels": 4,
            "cross_attention_dim": 8,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 8,
        },
        lambda: {
            "hidden_states": noise(1, 4, 4),
            "timestep": torch.tensor([3]),
            "encoder_hidden_states": noise(1, 3, 8),
            "global_hidden_states": noise(1, 1, 8),
        },
    ),
    "T5FilmDecoder": Case(
        {"input_dims": 8, "targets_length": 4, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16},
        lambda: {
            "encodings_and_masks": [(noise(1, 3, 16), torch.ones(1, 3))],
            "decoder_input_tokens": noise(1, 4, 8),
            "decoder_noise_time": torch.tensor([0.5]),
        },
    ),
}
