"""The tiny pipeline of HiDream."""

from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel, UniPCMultistepScheduler
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import CLIPTextModelWithProjection, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from helpers.tiny_parts import autoencoder_kl, clip_text_encoder, clip_tokenizer, t5_text_encoder, t5_tokenizer


# The constructor sets 128, and the pipeline scales every size that it is asked for to that area.
HiDreamImagePipeline.default_sample_size = property(lambda self: 10, lambda self, value: None)


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter."""
    letters = ["<unk>", "<eos>", " ", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", model_max_length=512)


def build_hidream() -> HiDreamImagePipeline:
    tokenizer = llama_tokenizer()
    return HiDreamImagePipeline(
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        vae=autoencoder_kl(shift_factor=0.3, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_text_encoder(CLIPTextModelWithProjection, width=8, positions=128),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text_encoder(CLIPTextModelWithProjection, width=16, positions=128),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_text_encoder(width=16),
        tokenizer_3=t5_tokenizer(),
        text_encoder_4=LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=128,
                # As it is published for, the pipeline asks for the attention's weights.
                attn_implementation="eager",
            )
        ),
        tokenizer_4=tokenizer,
        transformer=HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=[16, 8],
            text_emb_dim=24,
            num_routed_experts=3,
            num_activated_experts=2,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(16, 16),
            llama_layers=[0, 2, 2],
        ),
    )
