"""LoRA under kohya's names: what diffusers' own loaders and converters of authors' checkpoints make of the file."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionXLPipeline
from diffusers.loaders import lora_conversion_utils
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
from helpers import tiny
from helpers.pipelines import build_tiny_pipeline
from helpers.recorder import PROMPTS, Recorder, stacked
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sdxl_memory import sdxl_unet
from torch import Tensor, nn

from trl_diffusion_pref import MaPOConfig, MaPOTrainer
from trl_diffusion_pref.export import export_lora, merge_lora
from trl_diffusion_pref.export.kohya import KOHYA_FILE, kohya_state_dict
from trl_diffusion_pref.export.weights import adapter_tensors, lora_metadata, save_lora
from trl_diffusion_pref.families import Family, family_for, family_of_denoiser


# All layers that have a place in the format and that diffusers' loader finds there again.
UNET = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
UNET += ("conv1", "conv2", "time_emb_proj", "conv_shortcut")
MMDIT = [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")]
MMDIT += [f"transformer_blocks.0.attn.add_{name}_proj" for name in "qkv"]
MLPS = ["net.0.proj", "net.2"]
FLUX2 = ["linear_in", "linear_out", "to_qkv_mlp_proj", "single_transformer_blocks.0.attn.to_out"]
TARGETS = {
    "stable_diffusion": UNET,
    "stable_diffusion_xl": UNET,
    # Of the other blocks the loader knows the published sizes alone.
    "flux_dev": [
        *MMDIT,
        "norm1.linear",
        "norm1_context.linear",
        *(f"transformer_blocks.0.ff.{name}" for name in MLPS),
    ],
    "flux2_klein": [*MMDIT, *FLUX2],
    "flux2_dev": [*MMDIT, *FLUX2],
    "chroma": [*MMDIT, *(f"transformer_blocks.0.ff.{name}" for name in MLPS)],
    "qwen_image": ["to_q", "to_k", "to_v", "to_out.0", "to_add_out", "add_q_proj", "img_mod.1", *MLPS],
    "z_image": ["to_q", "to_k", "to_v", "to_out.0", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"],
    "wan": ["to_q", "to_k", "to_v", "to_out.0", *MLPS],
}
# Each has alpha 8 and rank 4 where no pattern says otherwise.
OPTIONS = [
    {},
    {"rank_pattern": {"to_q": 2, "to_k": 3, "proj_in": 6}},
    {"alpha_pattern": {"to_v": 3, "ff.net.2": 1}},
    {"use_rslora": True, "rank_pattern": {"to_v": 2}},
]


def with_lora(pipeline: DiffusionPipeline, targets, **options) -> nn.Module:
    """The denoiser with a random LoRA."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False, **options)
    torch.manual_seed(3)
    return get_peft_model(family_for(pipeline).denoiser(pipeline), config).eval()


def call_of_the_sampler(pipeline: DiffusionPipeline, name: str):
    """The arguments of a denoiser's call."""
    family, case = family_for(pipeline), tiny.CASES[name]
    recorder = Recorder(family.denoiser(pipeline))
    size = dict(zip(("height", "width"), case.size, strict=False))
    options = {"num_inference_steps": 1, "output_type": "latent", **size, **case.call}
    pipeline(prompt=list(PROMPTS), **options, generator=torch.Generator().manual_seed(0))
    return recorder.raw[-1]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "ranks", "alphas", "rslora"])
@pytest.mark.parametrize("name", TARGETS)
def test_diffusers_loads_it_at_the_trained_scale(name, options, tmp_path):
    if name.startswith("flux2") and not hasattr(lora_conversion_utils, "_convert_kohya_flux2_lora_to_diffusers"):
        pytest.skip("this version of diffusers has no loader for such files")
    pipeline = tiny.build(name)
    family = family_for(pipeline)
    args, kwargs = call_of_the_sampler(pipeline, name)
    model = with_lora(pipeline, TARGETS[name], **options)
    with torch.no_grad():
        expected = stacked(model(*args, **kwargs)[0])
    save_lora(pipeline, family, model, tmp_path, kohya=True)

    fresh = tiny.build(name)
    with torch.no_grad():
        base = stacked(family.denoiser(fresh)(*args, **kwargs)[0])
        fresh.load_lora_weights(tmp_path, weight_name=KOHYA_FILE)
        output = stacked(family.denoiser(fresh)(*args, **kwargs)[0])
    assert (expected - base).abs().max() > 1e-2
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def products(tensors: dict[str, Tensor], options: dict, family: Family, config: dict) -> dict[str, Tensor]:
    """`alpha / rank * up @ down` by kohya's layer, from the file's tensors alone."""
    named = kohya_state_dict(tensors, options, family, config)
    layers = {name.removesuffix(".alpha") for name in named if name.endswith(".alpha")}
    return {
        layer: named[f"{layer}.alpha"]
        / len(named[f"{layer}.lora_down.weight"])
        * named[f"{layer}.lora_up.weight"]
        @ named[f"{layer}.lora_down.weight"]
        for layer in layers
    }


class Checkpoint(dict):
    """A checkpoint of SD 3's authors that has zeros wherever nothing else was put in."""

    def pop(self, name: str) -> Tensor:
        return super().pop(name, torch.zeros(6, 1))


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "ranks", "alphas", "rslora"])
def test_sd3_s_names_are_those_of_the_authors_checkpoints(options):
    """diffusers has no loader for kohya's files of SD 3, but a converter of whole checkpoints."""
    pipeline = tiny.build("stable_diffusion_3")
    family = family_for(pipeline)
    before = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    config = dict(pipeline.transformer.config)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    model = with_lora(pipeline, [*targets, *MLPS, "norm1.linear"], **options)
    tensors, metadata = adapter_tensors(model), lora_metadata(model.peft_config["default"])
    merged = model.merge_and_unload().state_dict()

    flat = products(tensors, metadata, family, config)
    checkpoint = Checkpoint({"context_embedder.weight": torch.zeros(32, 1)})
    parts = ["attn.qkv", "attn.proj", "attn2.qkv", "attn2.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    for block in range(2):
        for side in ("x_block", "context_block"):
            for part in parts:
                name = f"joint_blocks.{block}.{side}.{part}"
                if (key := f"lora_unet_{name.replace('.', '_')}") in flat:
                    checkpoint[f"{name}.weight"] = flat.pop(key)
                elif block == 0 or part == "attn.qkv":
                    # The converter goes by which layers there are.
                    checkpoint.setdefault(f"{name}.weight", torch.zeros(6, 1))
    assert not flat
    converted = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    changed = [name for name in before if not torch.equal(before[name], merged[name])]
    assert len(changed) == len(tensors) // 2
    for name in changed:
        torch.testing.assert_close(converted[name], merged[name] - before[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [["attn.to_q", "attn.to_k", "attn.to_v"], ["proj_mlp", "attn.to_v"]], ids=str)
def test_flux_s_single_blocks_at_their_published_size(targets, tmp_path):
    """The loader takes LoRA of these sizes apart again; a model of these sizes is not needed for it."""
    generator, width = torch.Generator().manual_seed(0), 3072
    tensors = {}
    for target in [*targets, "proj_out", "norm.linear"]:
        out = {"proj_mlp": 4 * width, "norm.linear": 3 * width}.get(target, width)
        inputs = 5 * width if target == "proj_out" else width
        module = f"single_transformer_blocks.7.{target}"
        tensors[f"{module}.lora_A.weight"] = torch.randn(2, inputs, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(out, 2, generator=generator)
    options = {"r": 2, "lora_alpha": 5, "alpha_pattern": {"attn.to_v": 3}}
    family = family_for(tiny.build("flux_dev"))
    save_file(kohya_state_dict(tensors, options, family, {}), tmp_path / "flux.safetensors")
    loaded = FluxPipeline.lora_state_dict(tmp_path / "flux.safetensors")
    for module in {name.rsplit(".lora_", 1)[0] for name in loaded}:
        down, up = (loaded[f"{module}.lora_{factor}.weight"] for factor in "AB")
        own = module.removeprefix("transformer.")
        x = torch.randn(down.shape[1], generator=generator)
        if f"{own}.lora_A.weight" not in tensors:
            assert not (up @ (down @ x)).any()
            continue
        alpha = 3 if own.endswith("to_v") else 5
        expected = alpha / 2 * tensors[f"{own}.lora_B.weight"] @ (tensors[f"{own}.lora_A.weight"] @ x)
        torch.testing.assert_close(up @ (down @ x), expected, rtol=1e-4, atol=1e-2)
    assert {name.removeprefix("transformer.") for name in loaded} >= tensors.keys()


def test_sdxl_s_names_are_found_again_at_its_published_size():
    unet = sdxl_unet()
    wanted = [name for name, part in unet.named_modules() if isinstance(part, nn.Linear) and "block" in name]
    # One number for each layer, so that none can take another's place.
    tensors = {f"{name}.lora_{end}.weight": torch.full((1, 1), row) for row, name in enumerate(wanted) for end in "AB"}
    family = family_of_denoiser(unet)
    named = kohya_state_dict(tensors, {"lora_alpha": 1}, family, unet.config)
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight" in named
    assert "lora_unet_output_blocks_2_1_transformer_blocks_9_ff_net_2.alpha" in named
    assert "lora_unet_middle_block_1_proj_in.alpha" in named
    loaded, _ = StableDiffusionXLPipeline.lora_state_dict(named, unet_config=unet.config)
    loaded = {
        name.removeprefix("unet."): int(value) for name, value in convert_unet_state_dict_to_peft(loaded).items()
    }
    assert loaded == {name: int(value) for name, value in tensors.items()}


def test_all_but_alpha_is_what_diffusers_own_converter_writes():
    pipeline = tiny.build("stable_diffusion")
    model = with_lora(pipeline, ["to_q", "to_out.0"])
    tensors = adapter_tensors(model)
    ours = kohya_state_dict(tensors, lora_metadata(model.peft_config["default"]), family_for(pipeline), {})
    theirs = convert_state_dict_to_kohya({f"unet.{name}": tensor for name, tensor in tensors.items()})
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # The defect that ours does not have: half the strength at alpha 8 and rank 4.
        assert (ours[name] == 8 and tensor == 4) if name.endswith(".alpha") else torch.equal(ours[name], tensor)


# ---- As users ask for it ------------------------------------------------------------------------------------------


def images(pipeline: DiffusionPipeline) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return pipeline("a red circle", num_inference_steps=3, generator=generator, output_type="pt").images


@pytest.fixture
def trained(pairs, config, tmp_path):
    """A trainer with a LoRA of alpha 8 and rank 4 on a base folder, after three steps."""

    def train(**options) -> MaPOTrainer:
        build_tiny_pipeline().save_pretrained(tmp_path / "base")
        lora = LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", rank_pattern={"to_q": 2})
        trainer = MaPOTrainer(str(tmp_path / "base"), config(learning_rate=3e-3, **options), pairs, peft_config=lora)
        trainer.train()
        trainer.save_model()
        return trainer

    return train


def test_the_option_writes_a_kohya_file_beside_the_one_that_folders_load(trained, tmp_path):
    trainer = trained(lora_format="kohya", save_strategy="steps", save_steps=3)
    expected, folder = images(trainer.pipeline), Path(trainer.args.output_dir)
    base = images(DiffusionPipeline.from_pretrained(tmp_path / "base"))
    assert (expected - base).abs().max() > 1e-3
    for options in ({}, {"weight_name": KOHYA_FILE}):
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / "base")
        pipeline.load_lora_weights(folder, **options)
        assert (images(pipeline) - expected).abs().max() < 1e-5
    assert (folder / "checkpoint-3" / KOHYA_FILE).is_file()
    # Pushed with every save.
    (folder / KOHYA_FILE).unlink()
    trainer.checkpointer.copy_to_output(folder / "checkpoint-3", lora=True)
    assert (folder / KOHYA_FILE).is_file()


@pytest.mark.parametrize("source", ["", "checkpoint-3"], ids=["output", "checkpoint"])
def test_a_saved_folder_is_exported_and_merged(source, trained, tmp_path):
    trainer = trained(save_strategy="steps", save_steps=3)
    expected, folder = images(trainer.pipeline), Path(trainer.args.output_dir) / source
    assert not (folder / KOHYA_FILE).exists()
    assert export_lora(folder, tmp_path / "mine.safetensors") == tmp_path / "mine.safetensors"
    assert export_lora(folder, tmp_path / "loras") == tmp_path / "loras" / KOHYA_FILE
    assert (tmp_path / "mine.safetensors").read_bytes() == (tmp_path / "loras" / KOHYA_FILE).read_bytes()
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "base")
    pipeline.load_lora_weights(tmp_path / "mine.safetensors")
    assert (images(pipeline) - expected).abs().max() < 1e-5

    with pytest.raises(ValueError, match="trained on a local pipeline called base, whose place is not recorded"):
        merge_lora(folder, tmp_path / "merged")
    for base in (tmp_path / "base", DiffusionPipeline.from_pretrained(tmp_path / "base")):
        place = merge_lora(folder, tmp_path / f"merged-{type(base).__name__}", base=base)
        assert (images(DiffusionPipeline.from_pretrained(place)) - expected).abs().max() < 1e-5
    with pytest.raises(ValueError, match="exists already"):
        merge_lora(folder, place, base=tmp_path / "base")
    build_tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="has other weights than the one that"):
        merge_lora(folder, tmp_path / "new", base=tmp_path / "other")


def test_full_weights_and_other_folders_are_no_source(pairs, config, tmp_path):
    trainer = MaPOTrainer(build_tiny_pipeline(), config(max_steps=1), pairs)
    trainer.train()
    trainer.save_model()
    with pytest.raises(ValueError, match="holds no LoRA.*all weights were trained"):
        export_lora(trainer.args.output_dir, tmp_path / "x.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no trainer of this package saved it"):
        export_lora(tmp_path / "empty", tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is no folder here"):
        export_lora(tmp_path / "absent", tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="format='comfy' is none of kohya"):
        export_lora(tmp_path / "empty", tmp_path / "x.safetensors", format="comfy")
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "pixart_sigma",
            {},
            "no names for the layers of a PixArtSigmaPipeline; they have for ChromaPipeline, .*FluxPipeline, Qwen",
        ),
        ("stable_diffusion", {"use_dora": True}, "cannot express use_dora"),
        (
            "stable_diffusion_xl",
            {"target_modules": ["to_q", "time_embedding.linear_1"]},
            "first time_embedding.linear_1",
        ),
        ("wan", {"target_modules": "all-linear"}, "of the LoRA's layers have no name in this format, first condition"),
        (
            "wan",
            {"target_modules": r".*proj_out"},
            "1 of the LoRA's layers have no name in this format, first proj_out",
        ),
    ],
    ids=["family", "dora", "layer", "all", "pattern"],
)
def test_what_has_no_place_in_it_raises_before_training(name, options, message, pairs, tmp_path, monkeypatch):
    pipeline = tiny.build(name)
    monkeypatch.setattr(type(family_for(pipeline)), "encode_prompts", None)
    args = MaPOConfig(output_dir=str(tmp_path), resolution=16, lora_format="kohya")
    with pytest.raises(ValueError, match=message):
        MaPOTrainer(pipeline, args, pairs, peft_config=LoraConfig(r=2, **options))
    if not options:
        with pytest.raises(ValueError, match="lora_format='kohya' is for a LoRA"):
            MaPOTrainer(pipeline, args, pairs)


def test_a_carried_adapter_is_checked_too(pairs, config):
    pipeline = build_tiny_pipeline()
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], use_dora=True))
    with pytest.raises(ValueError, match="cannot express use_dora"):
        MaPOTrainer(pipeline, config(lora_format="kohya"), pairs)


def test_an_interrupted_file_leaves_none(tmp_path, monkeypatch):
    pipeline = build_tiny_pipeline()
    model = with_lora(pipeline, ["to_q"])

    def fail(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("trl_diffusion_pref.export.files.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_lora(pipeline, family_for(pipeline), model, tmp_path, kohya=True)
    assert not [path for path in tmp_path.iterdir() if "kohya" in path.name]


def test_the_record_of_a_folder_holds_no_path(trained, tmp_path):
    record = (Path(trained().args.output_dir) / "trl_diffusion_pref.json").read_text()
    assert json.loads(record)["base_folder"] == "base" and str(tmp_path) not in record
    assert load_file(export_lora(tmp_path / "output", tmp_path / "loras"))
