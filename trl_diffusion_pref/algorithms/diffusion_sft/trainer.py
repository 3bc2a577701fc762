"""Supervised fine-tuning: the denoising loss on samples that are taken as good."""

from torch import Tensor, nn

from ...data import Batch, Layout, Mode, corrupt
from ...data.layouts import sample_column
from ...data.pair_source import RowSource
from ...data.single_samples import single_samples
from ...training.config import AnyDataset
from ...training.trainer import DiffusionTrainer
from .config import DiffusionSFTConfig


class DiffusionSFTTrainer(DiffusionTrainer):
    """Trainer for supervised fine-tuning, the baseline that preference losses are compared with.

    Arguments are those of [`DiffusionTrainer`], with `args` a [`DiffusionSFTConfig`]; columns `prompt` and `image`
    (`video`, `audio`; `edited_image` for a model that edits images). Of pairs in any known layout the chosen samples
    are trained on.

    Example:

    ```python
    from datasets import load_dataset
    from trl_diffusion_pref import DiffusionSFTConfig, DiffusionSFTTrainer

    trainer = DiffusionSFTTrainer(
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        args=DiffusionSFTConfig(output_dir="sft", max_steps=2000),
        train_dataset=load_dataset("imagefolder", data_dir="images", split="train"),
    )
    trainer.train()
    trainer.save_model()
    ```
    """

    args: DiffusionSFTConfig
    config_class = DiffusionSFTConfig
    layout = Layout(samples=("image",))
    _tag_names = ["trl", "trl-diffusion-pref", "diffusion-sft"]
    _name = "Diffusion-SFT"
    # Whose simple loss, equation 14, this is.
    _paper = {
        "title": "Denoising Diffusion Probabilistic Models",
        "id": "2006.11239",
        "citation": """\
@misc{ho2020ddpm,
    title         = {{Denoising Diffusion Probabilistic Models}},
    author        = {Jonathan Ho and Ajay Jain and Pieter Abbeel},
    year          = 2020,
    eprint        = {2006.11239},
    archivePrefix = {arXiv}
}""",
    }

    def make_layout(self) -> Layout:
        return Layout(samples=(sample_column(self.family),), from_pairs=True)

    def prepare_rows(self, dataset: AnyDataset, label: str) -> tuple[AnyDataset, RowSource | None]:
        """Of pairs the chosen samples."""
        options = self.args.pair_options()
        with self.args.main_process_first():
            return single_samples(dataset, label, self.layout, options, sides={"chosen": 1.0}, scalar=None)

    def compute_losses(self, model: nn.Module, batch: Batch, mode: Mode) -> dict[str, Tensor]:
        noisy = corrupt(batch, mode, self.noise_process)
        error = self.denoise.error(self.denoise(model, noisy), noisy)
        return {"loss": error, "mse": error.detach()}
