"""LTX-Video's frame rate, decoder and VAE, and HunyuanVideo's guidance and prompts."""

import pytest
import torch
from helpers import tiny
from helpers.recorder import PROMPTS, Recorder
from helpers.tiny_hunyuan_video import build_hunyuan_video
from helpers.tiny_ltx import build_ltx

from trl_diffusion_pref.data.prompts import cut_prompts
from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.families.hunyuan_video import HunyuanVideoFamily
from trl_diffusion_pref.families.ltx import LTXFamily


class TestLTX:
    def test_another_frame_rate_scales_frames_as_the_sampler_does(self):
        pipeline = tiny.build("ltx")
        family, recorder = LTXFamily(frame_rate=30), Recorder(pipeline.transformer)
        options = {"height": 32, "width": 64, "num_frames": 9, "frame_rate": 30, "guidance_scale": 1.0}
        pipeline(PROMPTS[:1], **options, num_inference_steps=2, output_type="latent")
        with torch.no_grad():
            latents, conditioning = torch.zeros(1, 4, 2, 1, 2), family.encode_prompts(pipeline, PROMPTS[:1])
            family.predict(pipeline.transformer, latents, torch.tensor([500.0]), conditioning)
        scales = [[call[f"rope_interpolation_scale.{axis}"] for axis in range(3)] for call in recorder.calls]
        assert scales == [[8 / 30, 32, 32]] * 3

    def test_a_decoder_that_is_told_the_noise_decodes_as_the_sampler_does(self, monkeypatch):
        torch.manual_seed(0)
        pipeline = build_ltx(timestep_conditioning=True)
        pipeline.vae.eval()
        family, pixels = family_for(pipeline), tiny.CASES["ltx"].pixels()
        mean, _ = family.encode_samples(pipeline, pixels)
        packed = pipeline._pack_latents(mean)
        monkeypatch.setattr(pipeline.scheduler, "step", lambda *args, **kwargs: (packed,))
        options = {"height": 32, "width": 64, "num_frames": 9, "num_inference_steps": 2, "output_type": "pt"}
        expected = pipeline(PROMPTS[:1], **options).frames.transpose(1, 2)
        decoded = family.decode_samples(pipeline, mean) / 2 + 0.5
        torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-5)
        assert expected.std() > 0.01

    def test_a_vae_of_another_scale_is_refused(self):
        pipeline = tiny.build("ltx")
        pipeline.vae_temporal_compression_ratio = 4
        with pytest.raises(ValueError, match="has 4 frames and 32 pixels per latent, but LTX-Video's have 8 and 32"):
            family_for(pipeline).check_complete(pipeline)

    def test_videos_with_the_wrong_number_of_frames_are_refused(self):
        pipeline = tiny.build("ltx")
        with pytest.raises(ValueError, match="has 7 frames.* multiple of 8 plus one. Cut it to 1 frames, or pass 9"):
            family_for(pipeline).encode_samples(pipeline, torch.zeros(1, 3, 7, 32, 64))

    def test_distilled_weights_are_known_by_their_name(self):
        pipeline = tiny.build("ltx")
        assert family_for(pipeline).distilled(pipeline) is None
        pipeline.register_to_config(_name_or_path="Lightricks/LTX-Video-0.9.7-distilled")
        assert "0.9.7-distilled" in family_for(pipeline).distilled(pipeline)


class TestHunyuanVideo:
    def test_the_transformer_is_trained_at_guidance_1(self):
        pipeline = tiny.build("hunyuan_video")
        for family, expected in ((family_for(pipeline), 1000.0), (HunyuanVideoFamily(training_guidance=6.0), 6000.0)):
            recorder, conditioning = Recorder(pipeline.transformer), family.encode_prompts(pipeline, PROMPTS)
            with torch.no_grad():
                family.predict(
                    pipeline.transformer, torch.zeros(2, 4, 2, 2, 4), torch.tensor([5.0, 9.0]), conditioning
                )
            assert recorder.calls[-1]["guidance"].tolist() == [expected] * 2

    def test_a_transformer_without_guidance_embedding_is_called_as_the_sampler_does(self):
        torch.manual_seed(0)
        pipeline = build_hunyuan_video(guidance_embeds=False)
        family, recorder = family_for(pipeline), Recorder(pipeline.transformer)
        options = {"height": 16, "width": 32, "num_frames": 5, "guidance_scale": 1.0, "num_inference_steps": 2}
        pipeline(PROMPTS[:1], **options, output_type="latent")
        theirs = recorder.calls[-1]
        with torch.no_grad():
            conditioning = family.encode_prompts(pipeline, PROMPTS[:1])
            family.predict(pipeline.transformer, theirs["hidden_states"], theirs["timestep"], conditioning)
        ours = recorder.calls[-1]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())

    def test_the_template_before_a_prompt_is_dropped(self):
        pipeline = tiny.build("hunyuan_video")
        mask = family_for(pipeline).encode_prompts(pipeline, PROMPTS)["prompt_attention_mask"]
        # One token per letter, and one for the end of the user's turn.
        assert mask.sum(dim=1).tolist() == [len(prompt) + 1 for prompt in PROMPTS]

    def test_prompts_that_clip_cuts_are_counted(self):
        pipeline = tiny.build("hunyuan_video")
        family = family_for(pipeline)
        assert len(pipeline.tokenizer_2(" ".join(["a"] * 75)).input_ids) == 77
        assert cut_prompts([" ".join(["a"] * 75)], pipeline, family) == {}
        assert cut_prompts([" ".join(["a"] * 76)], pipeline, family) == {"tokenizer_2": (1, 77)}
