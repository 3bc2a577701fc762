"""VideoReward on folders of the published layout, against Qwen2-VL in float64 and PEFT's own merge."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.media import frames
from helpers.reward_models import CLIP_PROCESSOR, CLIP_STD, fill, normalized
from helpers.tiny import qwen_tokenizer
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLModel

from trl_diffusion_pref.rewards import RewardError, VideoReward
from trl_diffusion_pref.rewards.loading import load_image_processor
from trl_diffusion_pref.rewards.video_frames import frame_indices, frame_size, patchify, resize_frames


PROMPTS = ["a red circle moves", "a cat"]
TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
TEMPLATE = f"Judge.\nQuality: {TOKENS[0]}\nMotion: {TOKENS[1]}\nThe prompt is {{text_prompt}}\nFit: {TOKENS[2]}\nEND\n"
CHAT = (
    "{% for message in messages %}<|im_start|>{% for part in message['content'] %}{% if part['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
MEANS = {"VQ_mean": 0.3, "VQ_std": 2.0, "MQ_mean": -0.2, "MQ_std": 0.5, "TA_mean": 0.1, "TA_std": 1.5}
# Two frames per second are seen: four of ten, and all of four. Their sizes are those that the model gets.
VIDEOS = [frames(0, 10, (336, 308)), frames(1, 4, (308, 336))]
RATES = [5.0, 8.0]


class Wrapped(nn.Module):
    """The authors' model, with the names that transformers had when it was published."""

    def __init__(self, qwen: Qwen2VLModel, outputs: int) -> None:
        super().__init__()
        self.visual, self.model = qwen.visual, qwen.language_model
        self.rm_head = nn.Linear(32, outputs, bias=False)
        self.lm_head = nn.Linear(32, 8, bias=False)


def config(tokenizer) -> Qwen2VLConfig:
    return Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 40,
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
        **{
            f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
            for name, token in (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"))
        },
    )


def publish(folder: Path, form: str, outputs: int = 1) -> tuple[Qwen2VLModel, nn.Linear]:
    """Writes the published files; the model whose scores they hold."""
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"], special_tokens=True)
    tokenizer.chat_template = CHAT
    tokenizer.pad_token = "<|endoftext|>"
    base = folder / "base"
    tokenizer.save_pretrained(base)
    qwen_config = config(tokenizer)
    qwen_config.save_pretrained(base)
    qwen_config.text_config.vocab_size = len(tokenizer) + 3
    wrapped = Wrapped(Qwen2VLModel(qwen_config), outputs)
    wrapped.load_state_dict(fill(wrapped.state_dict()))
    lora: dict = {"lora_enable": form != "merged", "lora_alpha": 6, "use_rslora": form == "rslora"}
    if form == "merged":
        weights = wrapped.state_dict()
    else:
        targets = "model.*(q_proj|down_proj)|visual.*(qkv|fc1)"
        peft = get_peft_model(
            wrapped,
            LoraConfig(
                r=4,
                lora_alpha=6,
                target_modules=targets,
                use_rslora=form == "rslora",
                modules_to_save=["rm_head"] if form == "rslora" else None,
            ),
        )
        state = peft.state_dict()
        added = fill({name: value for name, value in state.items() if "lora_" in name or ".default.weight" in name}, 5)
        peft.load_state_dict({**state, **added})
        weights = {name: value.clone() for name, value in peft.state_dict().items()}
        wrapped = peft.merge_and_unload()
    checkpoint = folder / "checkpoint-11352"
    checkpoint.mkdir()
    torch.save(weights, checkpoint / "model.pth")
    published = {
        "data_config": {
            "eval_dim": ["VQ", "MQ", "TA"],
            "fps": 2,
            "max_frame_pixels": 200704,
            "num_frames": None,
            "prompt_template_type": "detailed_special",
            "sample_type": "uniform",
        },
        "model_config": {
            "model_name_or_path": str(base),
            "output_dim": outputs,
            "reward_token": "special",
            "use_special_tokens": True,
        },
        "peft_lora_config": lora,
        "inference_config": MEANS,
    }
    (folder / "model_config.json").write_text(json.dumps(published))
    (folder / "template.txt").write_text(TEMPLATE)
    qwen = Qwen2VLModel(qwen_config)
    qwen.visual.load_state_dict(wrapped.visual.state_dict())
    qwen.language_model.load_state_dict(wrapped.model.state_dict())
    return qwen.double().eval(), wrapped.rm_head.double()


def patches(chosen: list[Image.Image]) -> Tensor:
    """Of frames; a patch is (channel, frame, row, column)."""
    pixels = np.stack([normalized(np.asarray(frame)) for frame in chosen])
    rows = []
    for time in range(0, len(chosen), 2):
        for top in range(0, pixels.shape[2], 28):
            for left in range(0, pixels.shape[3], 28):
                for y, x in ((0, 0), (0, 14), (14, 0), (14, 14)):
                    patch = pixels[time : time + 2, :, top + y : top + y + 14, left + x : left + x + 14]
                    rows.append(patch.transpose(1, 0, 2, 3).ravel())
    return torch.tensor(np.stack(rows))


def expected_scores(qwen: Qwen2VLModel, head: nn.Linear, base: Path, index: int) -> list[float]:
    """Of one video, by the model's own positions, without padding."""
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"], special_tokens=True)
    tokenizer.add_tokens(list(TOKENS), special_tokens=True)
    chosen = [VIDEOS[0][place] for place in (0, 3, 6, 9)] if index == 0 else VIDEOS[1]
    values, (width, height) = patches(chosen), chosen[0].size
    text = "<|im_start|><|vision_start|>" + "<|video_pad|>" * (len(values) // 4) + "<|vision_end|>"
    text += TEMPLATE.replace("{text_prompt}", PROMPTS[index]) + "<|im_end|><|im_start|>"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    video = ids == tokenizer.convert_tokens_to_ids("<|video_pad|>")
    with torch.no_grad():
        states = qwen(
            input_ids=ids,
            pixel_values_videos=values,
            video_grid_thw=torch.tensor([[2, height // 14, width // 14]]),
            mm_token_type_ids=video.int() * 2,
        ).last_hidden_state[0]
        scores = []
        for number, (token, name) in enumerate(zip(TOKENS, ("VQ", "MQ", "TA"), strict=True)):
            logits = head(states[ids[0].tolist().index(tokenizer.convert_tokens_to_ids(token))])
            raw = logits[number if len(logits) == 3 else 0].item()
            scores.append((raw - MEANS[f"{name}_mean"]) / MEANS[f"{name}_std"])
    return scores


@pytest.mark.parametrize(("form", "outputs"), [("lora", 1), ("rslora", 1), ("merged", 3)])
def test_video_reward_equals_the_published_model(tmp_path, form, outputs):
    qwen, head = publish(tmp_path, form, outputs)
    expected = np.array([expected_scores(qwen, head, tmp_path / "base", index) for index in range(2)])
    assert np.abs(np.diff(expected, axis=0)).min() > 1e-3
    template = str(tmp_path / "template.txt")
    reward = VideoReward(str(tmp_path), template=template, batch_size=2, dtype=torch.float32)
    scores = reward.scores(PROMPTS, VIDEOS, fps=RATES)
    for column, name in enumerate(("VQ", "MQ", "TA")):
        assert scores[name] == pytest.approx(list(expected[:, column]), abs=1e-5)
    assert reward(PROMPTS, VIDEOS, fps=RATES) == pytest.approx(expected.sum(axis=1), abs=3e-5)
    one = VideoReward(str(tmp_path), template=template, dimension="MQ", fps=5, dtype=torch.float32)
    assert one.__name__ == "video_reward_mq"
    assert one(PROMPTS[:1], VIDEOS[:1]) == pytest.approx(expected[:1, 1], abs=1e-5)


def test_positions_go_on_from_the_largest_one_of_the_video(tmp_path):
    """Twenty frames of 28 x 28: time goes further than height and width."""
    publish(tmp_path, "merged")
    reward = VideoReward(str(tmp_path), template=str(tmp_path / "template.txt"))
    reward.load()
    video = patchify(torch.zeros(6, 3, 28, 56), 14, 2, 2)
    pad = reward._tokenizer.convert_tokens_to_ids("<|video_pad|>")
    positions = reward._positions(torch.tensor([1, 2, *[pad] * 6, 3, 4]), video)
    assert positions.tolist() == [
        [0, 1, 2, 2, 3, 3, 4, 4, 5, 6],
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 3, 2, 3, 2, 3, 5, 6],
    ]


@pytest.mark.parametrize(
    ("total", "rate", "expected"),
    [
        (81, 16, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),  # 10.1 of them, an even number
        (88, 16, [0, 8, 16, 24, 32, 40, 47, 55, 63, 71, 79, 87]),  # 11 of them
        (16, 8, [0, 5, 10, 15]),
        (5, 30, [0, 1, 3, 4]),  # at least four
        (3, 8, [0, 2]),
        (7, 1, [0, 1, 2, 4, 5, 6]),  # no more than there are
    ],
)
def test_two_frames_per_second_are_seen(total, rate, expected):
    assert frame_indices(total, rate, 2) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 832), (336, 588)), ((1080, 1920), (336, 588)), ((100, 100), (336, 336)), ((448, 448), (448, 448))],
)
def test_frames_have_at_most_448_pixels_square(size, expected):
    height, width = frame_size(*size, 28, 128 * 28 * 28, 448 * 448)
    assert (height, width) == expected and height * width <= 448 * 448


def test_frames_are_resized_as_by_pillow_and_rounded():
    (image,) = frames(0, 1, (90, 50))
    found = resize_frames([image], 28, 128 * 28 * 28, 448 * 448)[0].numpy()
    _, height, width = found.shape
    assert (height, width) == (252, 448)
    planes = [Image.fromarray(plane) for plane in np.asarray(image).astype(np.float32).transpose(2, 0, 1)]
    exact = np.stack([np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) for plane in planes], -1)
    levels = (found - normalized(np.clip(exact, 0, 255))) * 255 * CLIP_STD[:, None, None]
    assert 0.4 < np.abs(levels).max() < 0.501


def test_patches_of_a_still_video_equal_those_of_the_image(tmp_path):
    """transformers' processor of images repeats an image in time."""
    processor = {
        "image_mean": CLIP_PROCESSOR["image_mean"],
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": CLIP_PROCESSOR["image_std"],
        "max_pixels": 448 * 448,
        "min_pixels": 128 * 28 * 28,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    (image,) = frames(0, 1, (364, 336))
    published = load_image_processor(str(tmp_path))([image], return_tensors="pt")
    video = patchify(resize_frames([image, image], 28, 128 * 28 * 28, 448 * 448), 14, 2, 2)
    assert [list(video.grid)] == published["image_grid_thw"].tolist()
    torch.testing.assert_close(video.values, published["pixel_values"], atol=1e-5, rtol=0)


def test_instructions_are_read_from_the_authors_file_without_running_it(tmp_path):
    qwen, head = publish(tmp_path, "merged")
    code = f"raise SystemExit\nOTHER = 1\nDETAILED_PROMPT_WITH_SPECIAL_TOKEN = {TEMPLATE!r}\n"
    (tmp_path / "prompt_template.py").write_text(code)
    reward = VideoReward(str(tmp_path), template=str(tmp_path / "prompt_template.py"), dtype=torch.float32)
    expected = sum(expected_scores(qwen, head, tmp_path / "base", 1))
    assert reward(PROMPTS[1:], VIDEOS[1:], fps=[8.0]) == pytest.approx([expected], abs=3e-5)
    (tmp_path / "other.txt").write_text(TEMPLATE.replace(TOKENS[1], TOKENS[0]))
    with pytest.raises(ValueError, match="other.txt must have {text_prompt} and .*VQ_reward"):
        VideoReward(str(tmp_path), template=str(tmp_path / "other.txt"))(PROMPTS, VIDEOS, fps=RATES)


@pytest.mark.parametrize(
    ("prompts", "videos", "fps", "message"),
    [
        (["a", "b"], VIDEOS, [5.0, None], "sample 1: its frames per second are None"),
        (["a", "b"], VIDEOS, [0, 5.0], "sample 0: its frames per second are 0"),
        (["a", f"b {TOKENS[0]}"], VIDEOS, 5.0, "sample 1: its prompt contains one of"),
        (["a", "b"], [VIDEOS[0], VIDEOS[1][:1]], 5.0, "sample 1: the video has fewer than two frames"),
        (["a", "b"], [VIDEOS[0], VIDEOS[1][0]], 5.0, "sample 1: found a Image; pass a video as a list"),
    ],
)
def test_videos_that_cannot_be_scored_are_named(tmp_path, prompts, videos, fps, message):
    publish(tmp_path, "merged")
    with pytest.raises(RewardError, match=f"reward 'video_reward', {message}"):
        VideoReward(str(tmp_path), template=str(tmp_path / "template.txt"))(prompts, videos, fps=fps)


def test_checkpoints_with_other_instructions_are_refused(tmp_path):
    publish(tmp_path, "merged")
    options = json.loads((tmp_path / "model_config.json").read_text())
    options["data_config"]["prompt_template_type"] = "simple"
    (tmp_path / "model_config.json").write_text(json.dumps(options))
    with pytest.raises(ValueError, match="prompt_template_type='simple'; only 'detailed_special'"):
        VideoReward(str(tmp_path), template=str(tmp_path / "template.txt"))(PROMPTS, VIDEOS, fps=RATES)
