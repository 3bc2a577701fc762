"""A made-up algorithm on single images with a label: images that were liked are learnt, others are pushed away."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from trl_diffusion_pref.data import Batch, Layout, Mode, corrupt
from trl_diffusion_pref.training.config import DiffusionPreferenceConfig
from trl_diffusion_pref.training.trainer import DiffusionTrainer


@dataclass
class VoteConfig(DiffusionPreferenceConfig):
    push: float = field(default=0.1, metadata={"help": "Weight of images that were not liked, at least 0."})


class VoteTrainer(DiffusionTrainer):
    config_class = VoteConfig
    layout = Layout(samples=("image",), scalars=("label",))
    _name = "Votes"

    def compute_losses(self, model: nn.Module, batch: Batch, mode: Mode) -> dict[str, Tensor]:
        noisy = corrupt(batch, mode, self.noise_process)
        error = self.denoise.error(self.denoise(model, noisy), noisy)
        liked = batch.scalars["label"]
        return {"loss": (liked - self.args.push * (1 - liked)) * error, "mse": error.detach(), "liked": liked}
