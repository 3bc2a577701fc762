"""How kohya's scripts and ComfyUI name a denoiser's layers: as the code of the model's authors does."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias


# From a match of a rule's pattern and the denoiser's config to the authors' name.
NameOf: TypeAlias = Callable[[re.Match[str], Mapping[str, Any]], str]


class Rule(NamedTuple):
    """The name of layers that match a pattern.

    Args:
        pattern: Matches the whole name of a diffusers layer.
        name: The authors' name, a template of `re.Match.expand` or a function.
        part: Which of several diffusers layers it is that the authors' code computes as one layer.
        widths: Outputs of each of these, in the smallest common unit.
    """

    pattern: str
    name: str | NameOf
    part: int = 0
    widths: tuple[int, ...] = (1,)


class KohyaLayer(NamedTuple):
    """Where a diffusers layer stands: the name, and which part of what is one layer there (see `Rule`)."""

    name: str
    part: int
    widths: tuple[int, ...]


@dataclass(frozen=True)
class KohyaNames:
    """The names of one kind of denoiser.

    Args:
        rules: The first whose pattern matches counts. Layers that match none have no place in such files.
        prefix: Before the name. With kohya's own, "lora_unet_", the name's dots become underscores. ComfyUI also
            knows "diffusion_model." before the name as it is.
    """

    rules: tuple[Rule, ...]
    prefix: str = "lora_unet_"

    def layer(self, name: str, config: Mapping[str, Any]) -> KohyaLayer | None:
        """Where the layer of this name stands; None where there is no place for it.

        Args:
            name: In the diffusers model, such as "mid_block.attentions.0.proj_in".
            config: The denoiser's.
        """
        for rule in self.rules:
            if match := re.fullmatch(rule.pattern, name):
                theirs = match.expand(rule.name) if isinstance(rule.name, str) else rule.name(match, config)
                theirs = theirs.replace(".", "_") if self.prefix.endswith("_") else theirs
                return KohyaLayer(self.prefix + theirs, rule.part, rule.widths)
        return None


def joined(prefix: str, layers: tuple[str, ...], name: str, widths: tuple[int, ...] | None = None) -> tuple[Rule, ...]:
    """Rules for diffusers layers that the authors' code computes as one layer.

    Args:
        prefix: Pattern before the layers' names.
        layers: In the order of the one layer's outputs.
        name: Template of the one layer's name.
        widths: See `Rule`; default all alike.
    """
    widths = widths or (1,) * len(layers)
    return tuple(Rule(prefix + re.escape(layer), name, part, widths) for part, layer in enumerate(layers))


# kohya trains Stable Diffusion 1.x and 2.x in diffusers' own UNet, and Qwen-Image's names are the authors' own.
DIFFUSERS_NAMES = KohyaNames((Rule(".*", r"\g<0>"),))
