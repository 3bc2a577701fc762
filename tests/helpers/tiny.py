"""Pipelines of the real classes with random weights, from small configs. Nothing is downloaded."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderDC,
    AutoencoderKLCogVideoX,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    AutoencoderOobleck,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CosineDPMSolverMultistepScheduler,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.utils import is_sentencepiece_available
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)

from helpers import tiny_flux2 as flux2
from helpers import tiny_image_to_video as image_to_video
from helpers import tiny_qwen_image_edit as qwen_image_edit
from helpers.pipelines import build_tiny_pipeline
from helpers.tiny_ace_step import build_ace_step
from helpers.tiny_auraflow import build_auraflow
from helpers.tiny_chroma import build_chroma
from helpers.tiny_cogview4 import build_cogview4
from helpers.tiny_flux_kontext import kontext_around, noisy_tokens
from helpers.tiny_hidream import build_hidream
from helpers.tiny_hunyuan_video import build_hunyuan_video
from helpers.tiny_hunyuan_video15 import build_hunyuan_video15
from helpers.tiny_inpainting import build_stable_diffusion_inpaint, fill_around, masks, xl_inpaint_around
from helpers.tiny_instruct_pix2pix import build_instruct_pix2pix, images
from helpers.tiny_kolors import build_kolors
from helpers.tiny_ltx import build_ltx, in_a_row, out_of_a_row
from helpers.tiny_lumina2 import build_lumina2
from helpers.tiny_parts import (
    autoencoder_kl,
    clip_text_encoder,
    clip_tokenizer,
    gemma_tokenizer,
    qwen_tokenizer,
    qwen_vl_text_encoder,
    t5_text_encoder,
    t5_tokenizer,
    umt5_text_encoder,
)
from helpers.tiny_wan_5b import build_wan_5b
from helpers.tiny_z_image import build_z_image


def build_stable_diffusion(prediction_type: str = "epsilon", rescale_betas_zero_snr: bool = False):
    pipeline = build_tiny_pipeline(prediction_type)
    # The sampler is deterministic here.
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config,
        rescale_betas_zero_snr=rescale_betas_zero_snr,
        timestep_spacing="trailing" if rescale_betas_zero_snr else "leading",
    )
    return pipeline


def build_stable_diffusion_xl(**vae_options) -> StableDiffusionXLPipeline:
    text_encoder, text_encoder_2 = clip_text_encoder(), clip_text_encoder(CLIPTextModelWithProjection, width=16)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 1),
        cross_attention_dim=48,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder_kl(**vae_options),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1),
        add_watermarker=False,
    )


def build_stable_diffusion_3(absent: tuple[int, ...] = ()) -> StableDiffusion3Pipeline:
    """SD 3.5's options. `absent`: numbers (1 to 3) of the text encoders that are not there."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=48,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    components = {
        "text_encoder": clip_text_encoder(CLIPTextModelWithProjection),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": clip_text_encoder(CLIPTextModelWithProjection, width=16),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_3": t5_text_encoder(width=64),
        "tokenizer_3": t5_tokenizer(),
    }
    for number in absent:
        suffix = "" if number == 1 else f"_{number}"
        components[f"text_encoder{suffix}"] = components[f"tokenizer{suffix}"] = None
    return StableDiffusion3Pipeline(
        vae=autoencoder_kl(shift_factor=0.3, use_quant_conv=False, use_post_quant_conv=False),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **components,
    )


def build_flux(guidance_embeds: bool = True) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        vae=autoencoder_kl(shift_factor=0.3, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_text_encoder(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def build_pixart_sigma() -> PixArtSigmaPipeline:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=8,
        patch_size=2,
        interpolation_scale=1,
        caption_channels=32,
    )
    return PixArtSigmaPipeline(
        vae=autoencoder_kl(),
        text_encoder=t5_text_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )


def build_sana() -> SanaPipeline:
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=8,
        timestep_scale=0.5,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.4,
    )
    tokenizer = gemma_tokenizer()
    text_encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    # As published: a multistep solver set to flows.
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer, scheduler=scheduler
    )


def build_qwen_image() -> QwenImagePipeline:
    tokenizer = qwen_tokenizer()
    text_encoder = qwen_vl_text_encoder(tokenizer)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, -0.4],
        latents_std=[1.5, 0.5, 2.0, 1.0],
    )
    return QwenImagePipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def build_wan() -> WanPipeline:
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )
    text_encoder = umt5_text_encoder()
    vae = AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    # As published: a multistep solver set to flows.
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        scheduler=scheduler,
        transformer=transformer,
    )


def build_cogvideox(patch_size_t: int | None = None) -> CogVideoXPipeline:
    """With `patch_size_t`, what CogVideoX 1.5 changed; else 1.0's larger model, which rotates positions."""
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=32,
        num_layers=1,
        sample_width=4,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        patch_size_t=patch_size_t,
        patch_bias=patch_size_t is None,
        temporal_compression_ratio=4,
        max_text_seq_length=226,
        use_rotary_positional_embeddings=True,
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.7,
    )
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
    )
    return CogVideoXPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_text_encoder(),
        vae=vae,
        transformer=transformer,
        scheduler=scheduler,
    )


def unchanged(pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
    return latents


def pack(pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Of Flux, Chroma and Qwen-Image."""
    return pipeline._pack_latents(latents, *latents.shape)


def unpack(pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
    """The inverse, for 16 x 24 pixels."""
    unpacked = pipeline._unpack_latents(latents, 16, 24, pipeline.vae_scale_factor)
    return unpacked[:, :, 0] if unpacked.ndim == 5 else unpacked


def build_stable_audio() -> StableAudioPipeline:
    """Eight seconds at 16 Hz, eight samples per latent."""
    tokenizer = t5_tokenizer()
    tokenizer.model_max_length = 64
    return StableAudioPipeline(
        vae=AutoencoderOobleck(
            encoder_hidden_size=8,
            downsampling_ratios=[2, 4],
            channel_multiples=[1, 2],
            decoder_channels=8,
            decoder_input_channels=4,
            sampling_rate=16,
        ),
        text_encoder=t5_text_encoder(),
        projection_model=StableAudioProjectionModel(
            text_encoder_dim=32, conditioning_dim=16, min_value=0, max_value=512
        ),
        tokenizer=tokenizer,
        transformer=StableAudioDiTModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            num_key_value_attention_heads=1,
            cross_attention_dim=16,
            cross_attention_input_dim=16,
            time_proj_dim=16,
            global_states_input_dim=32,
        ),
        scheduler=CosineDPMSolverMultistepScheduler(),
    )


def build_audioldm2() -> AudioLDM2Pipeline:
    """2,560 samples at 16 kHz, 160 per frame, two frames and two mels per latent."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    letters = [*special, *sorted(ByteLevel.alphabet())]
    tokenizer = RobertaTokenizer(
        vocab={letter: number for number, letter in enumerate(letters)}, merges=[], model_max_length=64
    )
    tokenizer_2 = t5_tokenizer()
    tokenizer_2.model_max_length = 64
    clap = ClapModel(
        ClapConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 8,
                "intermediate_size": 16,
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "projection_dim": 8,
                "max_position_embeddings": 80,
            },
            audio_config={
                "spec_size": 8,
                "window_size": 4,
                "num_mel_bins": 8,
                "intermediate_size": 16,
                "depths": [1, 1],
                "num_attention_heads": [1, 1],
                "num_hidden_layers": 2,
                "hidden_size": 192,
                "projection_dim": 8,
                "patch_size": 2,
                "patch_stride": 2,
                "patch_embed_input_channels": 4,
            },
            projection_dim=16,
        )
    )
    language_model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=16, n_positions=128))
    language_model.config.max_new_tokens = 8
    return AudioLDM2Pipeline(
        vae=autoencoder_kl(in_channels=1, out_channels=1),
        text_encoder=clap,
        text_encoder_2=t5_text_encoder(),
        projection_model=AudioLDM2ProjectionModel(text_encoder_dim=16, text_encoder_1_dim=32, langauge_model_dim=8),
        language_model=language_model,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        feature_extractor=ClapFeatureExtractor(feature_size=4),
        unet=AudioLDM2UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=((None, 8, 32), (None, 8, 32)),
            attention_head_dim=4,
        ),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195, steps_offset=1),
        vocoder=SpeechT5HifiGan(
            SpeechT5HifiGanConfig(
                model_in_dim=16,
                upsample_initial_channel=16,
                upsample_rates=[10, 16],
                upsample_kernel_sizes=[20, 32],
                resblock_kernel_sizes=[3],
                resblock_dilation_sizes=[[1]],
                normalize_before=False,
            )
        ),
    )


def frames_first(pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Of CogVideoX; its own inverse."""
    return latents.transpose(1, 2)


def channels_last(pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Of ACE-Step, whose latents have one dimension; its own inverse."""
    return latents.transpose(1, 2)


def one_frame(pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Of Z-Image, whose denoiser takes an image for a video of one frame."""
    return latents.squeeze(2) if latents.ndim == 5 else latents


def unchanged_pixels(pixels: Tensor) -> Tensor:
    return pixels


@dataclass(frozen=True)
class Case:
    """What the contract test must know of a family beyond the family itself.

    Attributes:
        build: Makes the pipeline.
        call: Arguments of its `__call__`, guidance off.
        pack: Latents in the layout of `Family.predict` to that of the pipeline's loop.
        unpack: The inverse.
        conditioning: What replaces the training's values by those that `call` has.
        prediction_type: Of a variance-preserving process; None for a flow.
        size: Height and width in pixels; empty for sound.
        frames: Of a clip; None for an image.
        waveform: Channels and samples of sound; None for what is seen.
        to_vae: Images or clips in the layout that the VAE takes.
        edits: Whether the pipeline edits images, and takes the size from them.
        one_prompt: Whether its call takes one prompt, with its images.
        masked: Whether its call takes a mask for each image too.
        images_of: The images of so many prompts, each's one image or a list; None for one of the case's size.
    """

    build: Callable[[], DiffusionPipeline]
    call: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    pack: Callable[[DiffusionPipeline, Tensor], Tensor] = unchanged
    unpack: Callable[[DiffusionPipeline, Tensor], Tensor] = unchanged
    conditioning: dict[str, float] = field(default_factory=dict)
    prediction_type: str | None = None
    size: tuple[int, ...] = (16, 24)
    frames: int | None = None
    waveform: tuple[int, int] | None = None
    to_vae: Callable[[Tensor], Tensor] = unchanged_pixels
    edits: bool = False
    one_prompt: bool = False
    masked: bool = False
    images_of: Callable[[int], list] | None = None

    def takes(self, prompts: list[str]) -> list[str]:
        """Those of some prompts that one call takes."""
        return prompts[:1] if self.one_prompt else prompts

    def images(self, prompts: int, column: str = "image") -> list:
        """The condition images of so many prompts, or their masks."""
        if column == "mask_image":
            return masks(self.size, prompts)
        return images(self.size, prompts) if self.images_of is None else self.images_of(prompts)

    def arguments(self, prompts: int) -> dict[str, Any]:
        """Of a call on so many prompts: the size, or the images to edit, and `call`."""
        if self.edits:
            given = self.images(prompts)
            beside = {"mask_image": self.images(prompts, "mask_image")} if self.masked else {}
            return {"image": given[0] if self.one_prompt else given, **beside, **self.call}
        return {**dict(zip(("height", "width"), self.size, strict=False)), **self.call}

    def pixels(self, batch: int = 1, seed: int = 1) -> Tensor:
        """Random images, clips or waveforms."""
        shape = (batch, 3, *(() if self.frames is None else (self.frames,)), *self.size)
        if self.waveform:
            shape = (batch, *self.waveform)
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


NO_BINS = {"guidance_scale": 1.0, "use_resolution_binning": False, "clean_caption": False}

# The images of a call are those of all of its prompts.
FLUX2_EDITS: dict[str, Any] = {
    "call": {"guidance_scale": 1.0, "height": 16, "width": 24},
    "pack": flux2.in_a_row,
    "unpack": flux2.out_of_a_row,
    "edits": True,
    "one_prompt": True,
}
FLUX2_DEV_EDITS = FLUX2_EDITS | {
    "call": {"guidance_scale": 4.0, "height": 16, "width": 24},
    "conditioning": {"guidance": 4.0},
}

CASES = {
    "stable_diffusion": Case(build_stable_diffusion, prediction_type="epsilon"),
    "stable_diffusion_2": Case(
        lambda: build_stable_diffusion("v_prediction"),
        prediction_type="v_prediction",
    ),
    "stable_diffusion_zero_terminal_snr": Case(
        lambda: build_stable_diffusion("v_prediction", rescale_betas_zero_snr=True),
        prediction_type="v_prediction",
    ),
    "stable_diffusion_xl": Case(
        build_stable_diffusion_xl,
        call={"guidance_scale": 1.0, "original_size": (40, 30), "crops_coords_top_left": (3, 5)},
        prediction_type="epsilon",
    ),
    # Playground 2.5 gives SDXL's pipeline a VAE with a mean and deviation per channel.
    "stable_diffusion_xl_with_channel_statistics": Case(
        lambda: build_stable_diffusion_xl(latents_mean=(0.1, -0.2, 0.3, -0.4), latents_std=(1.5, 0.5, 2.0, 1.0)),
        prediction_type="epsilon",
    ),
    "instruct_pix2pix": Case(
        build_instruct_pix2pix, unpack=lambda pipeline, latents: latents[:, :4], prediction_type="epsilon", edits=True
    ),
    "stable_diffusion_inpaint": Case(
        build_stable_diffusion_inpaint,
        call={"guidance_scale": 1.0, "height": 16, "width": 24},
        unpack=lambda pipeline, latents: latents[:, :4],
        prediction_type="epsilon",
        edits=True,
        masked=True,
    ),
    "stable_diffusion_xl_inpaint": Case(
        lambda: xl_inpaint_around(build_stable_diffusion_xl()),
        call={
            "guidance_scale": 1.0,
            "height": 16,
            "width": 24,
            "original_size": (40, 30),
            "crops_coords_top_left": (3, 5),
            # Its default, 0.9999, leaves out the first step.
            "strength": 1.0,
        },
        unpack=lambda pipeline, latents: latents[:, :4],
        prediction_type="epsilon",
        edits=True,
        masked=True,
    ),
    "kolors": Case(
        build_kolors,
        call={"guidance_scale": 1.0, "original_size": (40, 30), "crops_coords_top_left": (3, 5)},
        prediction_type="epsilon",
    ),
    "stable_diffusion_3": Case(build_stable_diffusion_3),
    "stable_diffusion_3_without_t5": Case(lambda: build_stable_diffusion_3(absent=(3,))),
    "flux_dev": Case(
        build_flux, call={"guidance_scale": 3.5}, conditioning={"guidance": 3.5}, pack=pack, unpack=unpack
    ),
    "flux_schnell": Case(lambda: build_flux(guidance_embeds=False), call={}, pack=pack, unpack=unpack),
    "flux_kontext": Case(
        lambda: kontext_around(build_flux()),
        call={"guidance_scale": 2.5, "height": 16, "width": 24, "max_area": 16 * 24},
        conditioning={"guidance": 2.5},
        pack=pack,
        unpack=noisy_tokens,
        edits=True,
    ),
    "flux_fill": Case(
        lambda: fill_around(build_flux()),
        call={"guidance_scale": 30.0, "height": 16, "width": 24},
        conditioning={"guidance": 30.0},
        pack=pack,
        unpack=lambda pipeline, latents: unpack(pipeline, latents[..., :16]),
        edits=True,
        masked=True,
    ),
    "flux2_klein": Case(flux2.build_flux2_klein, pack=flux2.in_a_row, unpack=flux2.out_of_a_row),
    "flux2_klein_edit": Case(flux2.build_flux2_klein, images_of=flux2.one_image, **FLUX2_EDITS),
    "flux2_klein_edit_three": Case(flux2.build_flux2_klein, images_of=flux2.three_images, **FLUX2_EDITS),
    "flux2_dev": Case(
        flux2.build_flux2_dev,
        call={"guidance_scale": 4.0},
        conditioning={"guidance": 4.0},
        pack=flux2.in_a_row,
        unpack=flux2.out_of_a_row,
    ),
    "flux2_dev_edit": Case(flux2.build_flux2_dev, images_of=flux2.one_image, **FLUX2_DEV_EDITS),
    "flux2_dev_edit_three": Case(flux2.build_flux2_dev, images_of=flux2.three_images, **FLUX2_DEV_EDITS),
    "pixart_sigma": Case(build_pixart_sigma, call=NO_BINS, prediction_type="epsilon"),
    "sana": Case(build_sana, call=NO_BINS, size=(32, 64)),
    "qwen_image": Case(
        build_qwen_image,
        call={"true_cfg_scale": 1.0},
        pack=pack,
        unpack=unpack,
        to_vae=lambda pixels: pixels.unsqueeze(2),
    ),
    "qwen_image_edit": Case(
        lambda: qwen_image_edit.edit_around(build_qwen_image(), QwenImageEditPipeline),
        call={"true_cfg_scale": 1.0, "height": 16, "width": 24},
        pack=pack,
        unpack=qwen_image_edit.noisy_tokens,
        to_vae=lambda pixels: pixels.unsqueeze(2),
        edits=True,
        one_prompt=True,
    ),
    # Two images of different shapes.
    "qwen_image_edit_plus": Case(
        lambda: qwen_image_edit.edit_around(build_qwen_image(), QwenImageEditPlusPipeline),
        call={"true_cfg_scale": 1.0, "height": 16, "width": 24},
        pack=pack,
        unpack=qwen_image_edit.noisy_tokens,
        to_vae=lambda pixels: pixels.unsqueeze(2),
        edits=True,
        one_prompt=True,
        images_of=lambda count: [[images((16, 24), 1)[0], images((48, 16), 2)[1]]] * count,
    ),
    "chroma": Case(build_chroma, pack=pack, unpack=unpack),
    "auraflow": Case(build_auraflow),
    "lumina2": Case(build_lumina2, size=(32, 48)),
    "z_image": Case(build_z_image, call={"guidance_scale": 0.0}, unpack=one_frame, size=(32, 48)),
    "cogview4": Case(
        build_cogview4,
        call={"guidance_scale": 1.0, "original_size": (40, 30), "crops_coords_top_left": (3, 5)},
        size=(32, 48),
    ),
    "hidream": Case(build_hidream),
    "wan": Case(build_wan, call={"guidance_scale": 1.0, "num_frames": 5}, size=(16, 32), frames=5),
    "wan_5b": Case(build_wan_5b, call={"guidance_scale": 1.0, "num_frames": 5}, size=(32, 64), frames=5),
    "wan_image_to_video": Case(
        lambda: image_to_video.wan_image_to_video(build_wan(), sees_images=True),
        call={"guidance_scale": 1.0, "num_frames": 5, "height": 16, "width": 32},
        unpack=image_to_video.noisy_channels(16, dim=1),
        size=(16, 32),
        frames=5,
        edits=True,
        one_prompt=True,
    ),
    "wan_2_2_image_to_video": Case(
        lambda: image_to_video.wan_image_to_video(build_wan(), sees_images=False),
        call={"guidance_scale": 1.0, "num_frames": 5, "height": 16, "width": 32},
        unpack=image_to_video.noisy_channels(16, dim=1),
        size=(16, 32),
        frames=5,
        edits=True,
        one_prompt=True,
    ),
    "cogvideox_image_to_video": Case(
        lambda: image_to_video.cogvideox_image_to_video(build_cogvideox()),
        call={"guidance_scale": 1.0, "num_frames": 9, "height": 16, "width": 32},
        prediction_type="v_prediction",
        pack=frames_first,
        unpack=image_to_video.noisy_channels(4, dim=2),
        size=(16, 32),
        frames=9,
        edits=True,
    ),
    "cogvideox_1_5_image_to_video": Case(
        lambda: image_to_video.cogvideox_image_to_video(build_cogvideox(patch_size_t=2)),
        call={"guidance_scale": 1.0, "num_frames": 5, "height": 16, "width": 32},
        prediction_type="v_prediction",
        pack=frames_first,
        unpack=image_to_video.noisy_channels(4, dim=2),
        size=(16, 32),
        frames=5,
        edits=True,
    ),
    "ltx": Case(
        build_ltx,
        call={"guidance_scale": 1.0, "num_frames": 9},
        pack=in_a_row,
        unpack=out_of_a_row,
        size=(32, 64),
        frames=9,
    ),
    "hunyuan_video": Case(
        build_hunyuan_video,
        call={"guidance_scale": 6.0, "num_frames": 5},
        conditioning={"guidance": 6.0},
        size=(16, 32),
        frames=5,
    ),
    "hunyuan_video15": Case(
        build_hunyuan_video15,
        call={"num_frames": 5},
        unpack=lambda pipeline, latents: latents[:, :4],
        size=(16, 32),
        frames=5,
    ),
    "cogvideox": Case(
        build_cogvideox,
        call={"guidance_scale": 1.0, "num_frames": 9},
        prediction_type="v_prediction",
        pack=frames_first,
        unpack=frames_first,
        size=(16, 32),
        frames=9,
    ),
    "cogvideox_1_5": Case(
        lambda: build_cogvideox(patch_size_t=2),
        call={"guidance_scale": 1.0, "num_frames": 5},
        prediction_type="v_prediction",
        pack=frames_first,
        unpack=frames_first,
        size=(16, 32),
        frames=5,
    ),
    # Its pipeline takes as many lyrics as prompts.
    "ace_step": Case(
        build_ace_step,
        call={"guidance_scale": 1.0, "lyrics": ["", ""]},
        pack=channels_last,
        unpack=channels_last,
        size=(),
        waveform=(2, 480),
    ),
    "stable_audio": Case(build_stable_audio, prediction_type="v_prediction", size=(), waveform=(2, 128)),
    "audioldm2": Case(build_audioldm2, prediction_type="epsilon", size=(), waveform=(1, 2560)),
}

# Others have these pipelines' families too, or even the smallest takes long: what all families share is tested
# of them in `make test-all` alone.
VARIANTS = (
    "hunyuan_video15",
    "hidream",
    "stable_diffusion_2",
    "stable_diffusion_zero_terminal_snr",
    "stable_diffusion_xl_with_channel_statistics",
    "stable_diffusion_3_without_t5",
    "flux_schnell",
    "flux2_klein_edit",
    "flux2_klein_edit_three",
    "flux2_dev_edit",
    "flux2_dev_edit_three",
    "wan_5b",
    "wan_2_2_image_to_video",
    "cogvideox_1_5",
    "cogvideox_1_5_image_to_video",
)


def marked(names: Iterable[str]) -> list:
    """Names of cases as parameters of a test, with the mark `slow` on variants."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in VARIANTS else name for name in names]


if not hasattr(diffusers, "AceStepPipeline"):
    del CASES["ace_step"]
# Supported pipelines without a case here, since a package that they need is not installed.
ABSENT = set() if is_sentencepiece_available() else {"KolorsPipeline"}
if ABSENT:
    del CASES["kolors"]

# Where guidance is switched on in another way than by `guidance_scale`.
TRUE_GUIDANCE = (
    "flux_dev",
    "flux_schnell",
    "flux_kontext",
    "qwen_image_edit",
    "qwen_image_edit_plus",
    "qwen_image",
    "hunyuan_video",
)
# Their calls have no second side, for guidance with another prompt.
WITHOUT_GUIDANCE = ("flux_fill", "flux2_dev", "flux2_dev_edit", "flux2_dev_edit_three")
VIDEO_CASES = [name for name, case in CASES.items() if case.frames is not None]
IMAGE_CASES = [name for name, case in CASES.items() if case.size and case.frames is None]


def guidance(name: str, pipeline: DiffusionPipeline, scale: float) -> dict[str, float]:
    """What a case's call takes for this guidance; where the pipeline has a guider, it is set there."""
    if hasattr(pipeline, "guider"):
        pipeline.guider = ClassifierFreeGuidance(guidance_scale=scale)
        return {}
    return {"true_cfg_scale" if name in TRUE_GUIDANCE else "guidance_scale": scale}


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """The pipeline of a case, in evaluation mode, its weights a function of the seed."""
    torch.manual_seed(seed)
    pipeline = CASES[name].build()
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline if dtype == torch.float32 else pipeline.to(dtype)
