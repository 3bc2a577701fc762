"""The tiny pipeline of ACE-Step 1.5."""

import diffusers
from diffusers import AutoencoderOobleck, FlowMatchEulerDiscreteScheduler
from transformers import Qwen3Config, Qwen3Model

from helpers.tiny_parts import qwen_tokenizer


def build_ace_step(**transformer_options) -> diffusers.DiffusionPipeline:
    """A minute at 8 Hz, four samples per latent. Needs diffusers 0.39."""
    tokenizer = qwen_tokenizer()
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    attention = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8}
    condition_encoder = diffusers.AceStepConditionEncoder(
        hidden_size=16,
        intermediate_size=16,
        text_hidden_dim=16,
        timbre_hidden_dim=4,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
        **attention,
    )
    condition_encoder.silence_latent.normal_()
    return diffusers.AceStepPipeline(
        vae=AutoencoderOobleck(
            encoder_hidden_size=8,
            downsampling_ratios=[2, 2],
            channel_multiples=[1, 2],
            decoder_channels=8,
            decoder_input_channels=4,
            sampling_rate=8,
        ),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=diffusers.AceStepTransformer1DModel(
            hidden_size=24,
            intermediate_size=16,
            num_hidden_layers=2,
            in_channels=12,
            audio_acoustic_hidden_dim=4,
            encoder_hidden_size=16,
            **attention,
            **transformer_options,
        ),
        condition_encoder=condition_encoder,
        # As published: the pipeline shifts times itself.
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )
