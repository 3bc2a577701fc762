"""The head that LAION's aesthetic predictor and ImageReward share: linear layers without activation between them."""

from itertools import pairwise

from torch import Tensor, nn

from .model_reward import wide


class LinearHead(nn.Module):
    """From embeddings `(batch, width)` to scores `(batch,)`.

    Its parameters have the published names, `layers.0.weight`, `layers.2.weight`, 4, 6 and 7: layers of dropout stood
    between the first four while they were trained.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = (width, 1024, 128, 64, 16, 1)
        first, second, third, fourth, fifth = (nn.Linear(*sizes) for sizes in pairwise(widths))
        self.layers = nn.Sequential(first, nn.Identity(), second, nn.Identity(), third, nn.Identity(), fourth, fifth)

    def forward(self, embeddings: Tensor) -> Tensor:
        values = wide(embeddings)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                values = nn.functional.linear(values, layer.weight.to(values.dtype), layer.bias.to(values.dtype))
        return values.squeeze(-1)
