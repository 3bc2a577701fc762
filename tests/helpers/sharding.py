"""FSDP2 on a CPU, where accelerate does not shard: its processes are taken for ones that have a GPU each."""

from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType


# The tiny pipeline's blocks.
FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["BasicTransformerBlock", "ResnetBlock2D"],
        "state_dict_type": "FULL_STATE_DICT",
        "cpu_ram_efficient_loading": False,
    },
}


def shard_on_a_cpu() -> None:
    """For the whole process, before a config is made. gloo exchanges the shards."""
    inherited = PartialState.__init__

    def init(self: PartialState, *args: Any, **kwargs: Any) -> None:
        inherited(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init  # type: ignore[method-assign]


def options_of(name: str) -> dict[str, Any]:
    """What an algorithm's config needs under sharding."""
    return {"self-npo": {"teacher": "frozen"}, "diffusion-nft": {"start": "data"}}.get(name, {})
