import torch
from diffusers import DDPMScheduler
from helpers.pipelines import build_tiny_pipeline

from trl_diffusion_pref.diffusion.noise import noise_process
from trl_diffusion_pref.fingerprint import rounded_fingerprints, weights_fingerprint
from trl_diffusion_pref.training.divergence import DivergenceGuard


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


class WithoutFloat64(torch.Tensor):
    """As tensors on Apple's GPUs."""

    def double(self):
        raise TypeError("MPS has no float64")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_devices_without_float64_have_the_same_fingerprints(monkeypatch):
    layer = torch.nn.Linear(3, 2)
    expected = weights_fingerprint(layer), rounded_fingerprints(layer)
    state = {name: tensor.as_subclass(WithoutFloat64) for name, tensor in layer.state_dict().items()}
    monkeypatch.setattr(layer, "state_dict", lambda: state)
    assert (weights_fingerprint(layer), rounded_fingerprints(layer)) == expected


def test_the_divergence_guard_needs_no_float64_on_the_device():
    guard = DivergenceGuard(5, noise_process(DDPMScheduler()), reference_margin=0.25, start_margin=1.5)
    errors = torch.ones(2).as_subclass(WithoutFloat64)
    guard.record(errors, errors, errors)
