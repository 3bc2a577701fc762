"""Flux.2's pipelines with random weights, and images for them to edit."""

from importlib import import_module

from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL.Image import Image
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from helpers.tiny_instruct_pix2pix import images
from helpers.tiny_parts import qwen_tokenizer


# The pipelines refuse images of less than 64 pixels, which are too many tokens for tests.
published_check = Flux2ImageProcessor.check_image_input
Flux2ImageProcessor.check_image_input = staticmethod(lambda image: published_check(image, min_side_length=16))

# As Qwen3's without thinking, and Mistral's, as far as these pipelines use them.
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
MISTRAL_TEMPLATE = (
    "<s>{% for message in messages %}"
    "{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ message.content[0].text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ message.content[0].text }}[/INST]{% endif %}{% endfor %}"
)
_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "[IMG]")
# The pipelines read these layers of the text encoders, and others of tiny ones could not be asked for.
_LANGUAGE_MODEL = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "attention_dropout": 0.0,
}


class TextOnlyProcessor(ProcessorMixin):
    """Pixtral's processor without images, which need torchvision; loaded from folders in its place."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, chat_template: str | None = None, **options: object
    ) -> None:
        # By name: what a folder has is passed on to what the signature names.
        super().__init__(tokenizer, chat_template=chat_template, **options)


TextOnlyProcessor.__name__ = "PixtralProcessor"
TextOnlyProcessor.__module__ = "transformers"
# The module that is there now: the imports above may have made another one.
import_module("transformers").PixtralProcessor = TextOnlyProcessor


def _mistral_processor() -> TextOnlyProcessor:
    """One token per byte, after the one that begins every text."""
    tokens = [*_SPECIAL, *sorted(ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokens.index("<s>"))])
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=list(_SPECIAL[4:]),
    )
    return TextOnlyProcessor(own, chat_template=MISTRAL_TEMPLATE)


def _vae() -> AutoencoderKLFlux2:
    """Two pixels per latent, whose patches have statistics that are not 0 and 1."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
        sample_size=16,
        mid_block_add_attention=False,
    )
    vae.bn.running_mean.uniform_(-0.5, 0.5)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def _transformer(width: int, guidance_embeds: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=width,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def build_flux2_klein(is_distilled: bool = False) -> Flux2KleinPipeline:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = QWEN_TEMPLATE
    return Flux2KleinPipeline(
        scheduler=_scheduler(),
        vae=_vae(),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=27, **_LANGUAGE_MODEL)),
        tokenizer=tokenizer,
        transformer=_transformer(3 * 8, guidance_embeds=False),
        is_distilled=is_distilled,
    )


def build_flux2_dev() -> Flux2Pipeline:
    processor = _mistral_processor()
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": len(processor.tokenizer),
            "num_hidden_layers": 30,
            **_LANGUAGE_MODEL,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "head_dim": 8,
        },
        image_token_index=processor.tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    return Flux2Pipeline(
        scheduler=_scheduler(),
        vae=_vae(),
        text_encoder=Mistral3ForConditionalGeneration(config),
        tokenizer=processor,
        transformer=_transformer(3 * 8, guidance_embeds=True),
    )


def one_image(count: int) -> list[list[Image]]:
    """For each prompt an image whose sides are no multiples of a token's."""
    return [images((18, 27), 1)] * count


def three_images(count: int) -> list[list[Image]]:
    """For each prompt three different images of different shapes."""
    return [[images((16, 24), 1)[0], images((34, 16), 2)[1], images((18, 27), 3)[2]]] * count


def in_a_row(pipeline: Flux2Pipeline, latents: Tensor) -> Tensor:
    """Tokens of latents."""
    return pipeline._pack_latents(pipeline._patchify_latents(latents))


def out_of_a_row(pipeline: Flux2Pipeline, tokens: Tensor) -> Tensor:
    """The latents of a 16x24 image from its tokens, after which those of condition images may come."""
    return pipeline._unpatchify_latents(tokens[:, :24].transpose(1, 2).unflatten(2, (4, 6)))
