import torch
from conftest import build_tiny_pipeline

from trl_diffusion_pref.fingerprint import weights_fingerprint


def test_equal_weights_have_equal_fingerprints_wherever_they_are_stored(tiny_pipeline, tmp_path):
    tiny_pipeline.unet.save_pretrained(tmp_path)
    loaded = type(tiny_pipeline.unet).from_pretrained(tmp_path)
    assert weights_fingerprint(loaded) == weights_fingerprint(tiny_pipeline.unet)
    assert weights_fingerprint(build_tiny_pipeline().unet) == weights_fingerprint(tiny_pipeline.unet)


def test_other_weights_dtype_or_config_change_it(tiny_pipeline):
    before = weights_fingerprint(tiny_pipeline.vae)
    tiny_pipeline.vae.register_to_config(scaling_factor=0.5)
    scaled = weights_fingerprint(tiny_pipeline.vae)
    with torch.no_grad():
        tiny_pipeline.vae.decoder.conv_in.weight += 1e-6
    assert len({before, scaled, weights_fingerprint(tiny_pipeline.vae)}) == 3
    assert weights_fingerprint(build_tiny_pipeline().vae.bfloat16()) != before
