"""A made-up algorithm on lists of three: every image's error should be as its score says, against the list's mean."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from trl_diffusion_pref.data import Batch, Layout, Mode, corrupt
from trl_diffusion_pref.training.config import DiffusionPreferenceConfig
from trl_diffusion_pref.training.references import make_reference, resolve_reference
from trl_diffusion_pref.training.trainer import DiffusionTrainer


@dataclass
class RankingConfig(DiffusionPreferenceConfig):
    beta: float = field(default=100.0, metadata={"help": "Scale of the implicit rewards, positive."})


class RankingTrainer(DiffusionTrainer):
    config_class = RankingConfig
    layout = Layout(samples=("images",), samples_per_cell=3, scalars=("scores",))
    _name = "Ranking"

    def setup_step(self) -> None:
        kind = resolve_reference("auto", lora=hasattr(self.model, "peft_config"), carried=self.carried_adapter)
        self.reference = make_reference(kind, self.model, self.accelerator)

    def compute_losses(self, model: nn.Module, batch: Batch, mode: Mode) -> dict[str, Tensor]:
        noisy = corrupt(batch, mode, self.noise_process)
        errors = self.denoise.error(self.denoise(model, noisy), noisy).unflatten(0, (3, -1))
        with self.reference.applied() as reference:
            ref_errors = self.denoise.error(self.denoise(reference, noisy), noisy).unflatten(0, (3, -1))
        rewards = -self.args.beta / 2 * (errors - ref_errors)
        wanted = batch.scalars["scores"].T
        centred = (rewards - rewards.mean(dim=0)) - (wanted - wanted.mean(dim=0))
        return {"loss": centred.square().mean(dim=0), "rewards/best": rewards[0].detach()}
