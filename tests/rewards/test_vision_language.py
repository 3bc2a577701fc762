"""The probability of "Yes" by tiny random models of two families, against float64 without padding."""

import json

import pytest
import torch
from helpers.reward_models import CLIP_PROCESSOR, PROMPTS, fill, images
from helpers.tiny import qwen_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from trl_diffusion_pref.rewards import VisionLanguageReward
from trl_diffusion_pref.rewards.loading import load_image_processor


SAMPLES = images((56, 56), (90, 40), (28, 60))
CHAT = (
    "{% for message in messages %}<|im_start|>{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
)


def tokenizer_with(*tokens: str, chat: str):
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens([*tokens, "Yes"], special_tokens=True)
    tokenizer.chat_template = chat
    return tokenizer


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> str:
    """The layout of Qwen2-VL: its processor has a part for videos, which needs torchvision."""
    folder = tmp_path_factory.mktemp("qwen")
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    tokenizer = tokenizer_with(
        "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>", chat=CHAT.replace("IMAGE", picture)
    )
    tokenizer.save_pretrained(folder)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"},
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    model = Qwen2VLForConditionalGeneration(config)
    weights = fill(model.state_dict())
    weights["lm_head.weight"] *= 2
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    processor = {
        "do_convert_rgb": True,
        "image_mean": CLIP_PROCESSOR["image_mean"],
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": CLIP_PROCESSOR["image_std"],
        "max_pixels": 12845056,
        "merge_size": 2,
        "min_pixels": 3136,
        "patch_size": 14,
        "processor_class": "Qwen2VLProcessor",
        "temporal_patch_size": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


QUESTION = 'Does this image show "{}"? Answer Yes or No.'
EDIT_QUESTION = (
    'The last image was made from what is before it by the instruction "{}". Does it follow the instruction and keep '
    "everything else? Answer Yes or No."
)


def qwen_probability(folder: str, question: str, *seen) -> float:
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pixels = load_image_processor(folder)(list(seen), return_tensors="pt")
    counts = [int(grid.prod()) // 4 for grid in pixels["image_grid_thw"]]
    text = "".join(f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" for count in counts)
    text = f"<|im_start|>{text}{question}<|im_end|>"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    kinds = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    with torch.no_grad():
        output = model(
            input_ids=ids,
            pixel_values=pixels["pixel_values"].double(),
            image_grid_thw=pixels["image_grid_thw"],
            mm_token_type_ids=kinds,
        )
    return output.logits[0, -1].softmax(0)[tokenizer.convert_tokens_to_ids("Yes")].item()


def test_yes_probability_of_qwen_without_torchvision(qwen):
    pairs = zip(PROMPTS, SAMPLES, strict=True)
    expected = [qwen_probability(qwen, QUESTION.format(prompt), image) for prompt, image in pairs]
    assert max(expected) > 1.1 * min(expected)
    for batch_size in (1, 3):
        reward = VisionLanguageReward(qwen, batch_size=batch_size, dtype=torch.float32)
        assert reward(PROMPTS, SAMPLES) == pytest.approx(expected, rel=1e-4)


def test_yes_probability_of_edits_sees_their_sources_first(qwen):
    sources = [[SAMPLES[1], SAMPLES[2]], [SAMPLES[0]], [SAMPLES[0]]]
    rows = zip(PROMPTS, sources, SAMPLES, strict=True)
    expected = [qwen_probability(qwen, EDIT_QUESTION.format(text), *given, image) for text, given, image in rows]
    for batch_size in (1, 3):
        reward = VisionLanguageReward(qwen, batch_size=batch_size, dtype=torch.float32)
        assert reward(PROMPTS, SAMPLES, image=sources) == pytest.approx(expected, rel=1e-4)
    assert reward(PROMPTS, SAMPLES) != pytest.approx(expected, rel=1e-3)


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> str:
    """The layout of LLaVA. Its template and its tokenizer both write the first token, as Gemma's do."""
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = tokenizer_with("<image>", chat="<|endoftext|>" + CHAT.replace("IMAGE", "<image>"))
    tokenizer.bos_token = "<|endoftext|>"
    beginning = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.backend_tokenizer.post_processor = beginning
    processor = LlavaProcessor(
        load_image_processor(_image_processor(tmp_path_factory)),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    processor.save_pretrained(folder)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=0,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = LlavaForConditionalGeneration(config)
    weights = fill(model.state_dict())
    weights["lm_head.weight"] *= 2
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    return str(folder)


def _image_processor(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("llava_images")
    (folder / "preprocessor_config.json").write_text(json.dumps(CLIP_PROCESSOR))
    return str(folder)


def test_yes_probability_of_llava_in_batches_of_any_size(llava):
    model = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float64).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(llava), load_image_processor(llava)
    # It writes the first token itself, which the template has already.
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    expected = []
    for prompt, image in zip(PROMPTS, SAMPLES, strict=True):
        text = f'<|endoftext|><|im_start|>{"<image>" * 4}Is "{prompt}" {{seen}}?<|im_end|>'
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        pixels = processor([image], return_tensors="pt")["pixel_values"].double()
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=pixels).logits
        expected.append(logits[0, -1].softmax(0)[tokenizer.convert_tokens_to_ids("Yes")].item())
    for batch_size in (1, 3):
        reward = VisionLanguageReward(llava, 'Is "{prompt}" {seen}?', batch_size=batch_size, dtype=torch.float32)
        assert reward(PROMPTS, SAMPLES) == pytest.approx(expected, rel=1e-4)


def test_questions_need_a_place_for_the_prompt():
    with pytest.raises(ValueError, match="has no {prompt}"):
        VisionLanguageReward(question="Is this good?")
