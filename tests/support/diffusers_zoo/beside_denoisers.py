"""Models that prepare conditions for denoisers of diffusers, as small as their classes allow."""

from __future__ import annotations

import torch

from support.diffusers_zoo.case import Case, ids, noise

CASES = {
    "AceStepAudioTokenDetokenizer": Case(
        {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "rope_theta": 10000.0,
            "sliding_window": 16,
            "audio_acoustic_hidden_dim": 8,
            "pool_window_size": 2,
            "num_attention_pooler_hidden_layers": 1,
        },
        lambda: {"hidden_states": noise(1, 3, 32)},
    ),
    "AceStepAudioTokenizer": Case(
        {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "rope_theta": 10000.0,
            "sliding_window": 16,
            "audio_acoustic_hidden_dim": 8,
            "pool_window_size": 2,
            "num_attention_pooler_hidden_layers": 1,
            "fsq_dim": 32,
            "fsq_input_levels": [4, 4, 4],
        },
        lambda: {"hidden_states": noise(1, 2, 2, 8)},
    ),
    "AceStepConditionEncoder": Case(
        {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "rope_theta": 10000.0,
            "sliding_window": 16,
            "text_hidden_dim": 16,
            "timbre_hidden_dim": 8,
            "num_lyric_encoder_hidden_layers": 1,
            "num_timbre_encoder_hidden_layers": 1,
        },
        lambda: {
            "text_hidden_states": noise(1, 3, 16),
            "text_attention_mask": torch.ones(1, 3),
            "lyric_hidden_states": noise(1, 4, 16),
            "lyric_attention_mask": torch.ones(1, 4),
            "refer_audio_acoustic_hidden_states_packed": noise(1, 5, 8),
            "refer_audio_order_mask": torch.tensor([0]),
        },
    ),
    "AnimaTextConditioner": Case(
        {
            "source_dim": 16,
            "target_dim": 16,
            "model_dim": 16,
            "num_layers": 1,
            "num_attention_heads": 2,
            "mlp_ratio": 2.0,
            "target_vocab_size": 20,
            "min_sequence_length": 4,
        },
        lambda: {"source_hidden_states": noise(1, 4, 16), "target_input_ids": ids(20, 1, 5)},
    ),
    "AudioLDM2ProjectionModel": Case(
        {"text_encoder_dim": 8, "text_encoder_1_dim": 8, "langauge_model_dim": 8},
        lambda: {
            "hidden_states": noise(1, 3, 8),
            "hidden_states_1": noise(1, 3, 8),
            "attention_mask": torch.ones(1, 3).long(),
            "attention_mask_1": torch.ones(1, 3).long(),
        },
    ),
    "CLIPImageProjection": Case({"hidden_size": 8}, lambda: {"x": noise(1, 8)}),
    "Ideogram4PromptEnhancerHead": Case({"hidden_size": 8, "vocab_size": 10}, lambda: {"hidden_states": noise(1, 3, 8)}),
    "MiniMaxMusic3ConditionEncoder": Case(
        {"condition_hidden_dim": 8, "num_condition_layers": 2, "out_dim": 8}, lambda: {"hidden_states": noise(1, 4, 16)}
    ),
    "ImageProjection": Case(
        {"image_embed_dim": 8, "cross_attention_dim": 8, "num_image_text_embeds": 2}, lambda: {"image_embeds": noise(1, 8)}
    ),
    "ReduxImageEncoder": Case({"redux_dim": 8, "txt_in_features": 8}, lambda: {"x": noise(1, 3, 8)}),
    "StableAudio3DurationEmbedder": Case({"output_dim": 8, "fourier_dim": 8}, lambda: {"seconds": torch.tensor([2.0])}),
    "StableAudioProjectionModel": Case(
        {"text_encoder_dim": 8, "conditioning_dim": 12, "min_value": 0, "max_value": 8},
        lambda: {
            "text_hidden_states": noise(1, 3, 8),
            "start_seconds": torch.tensor([1.0]),
            "end_seconds": torch.tensor([2.0]),
        },
    ),
    "UniDiffuserTextDecoder": Case(
        {
            "prefix_length": 2,
            "prefix_inner_dim": 8,
            "prefix_hidden_dim": 8,
            "vocab_size": 20,
            "n_positions": 16,
            "n_embd": 8,
            "n_layer": 1,
            "n_head": 2,
        },
        lambda: {"input_ids": ids(20, 1, 3), "prefix_embeds": noise(1, 2, 8)},
    ),
}
