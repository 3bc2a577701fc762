"""Families from outside the package, by a call or through an entry point."""

import pytest
from diffusers import DDPMPipeline, FluxPipeline
from helpers import tiny
from helpers.pipelines import build_tiny_pipeline

from trl_diffusion_pref import MaPOConfig, MaPOTrainer, families
from trl_diffusion_pref.evaluation import preference_accuracy
from trl_diffusion_pref.families import Family, family_for, register_family, supported_pipelines
from trl_diffusion_pref.families.flux import FluxFamily
from trl_diffusion_pref.families.stable_diffusion import StableDiffusionFamily
from trl_diffusion_pref.shapes import preference_pairs


class OtherFamily(StableDiffusionFamily):
    pipeline_class = "DDPMPipeline"


@pytest.fixture(autouse=True)
def families_of_this_test_only(monkeypatch):
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    families._register_entry_points.cache_clear()
    yield
    families._register_entry_points.cache_clear()


@pytest.fixture
def other_pipeline():
    tiny = build_tiny_pipeline()
    return DDPMPipeline(unet=tiny.unet, scheduler=tiny.scheduler)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package with one module and one entry point."""

    def installed(module: str, source: str, target: str) -> None:
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[trl_diffusion_pref.families]\nother = {module}:{target}\n")
        monkeypatch.syspath_prepend(tmp_path)

    return installed


MODULE = """
from trl_diffusion_pref.families.stable_diffusion import StableDiffusionFamily

class OtherFamily(StableDiffusionFamily):
    pipeline_class = {pipeline_class!r}

made = OtherFamily()
"""


def test_a_registered_family_is_found(other_pipeline):
    family = OtherFamily()
    register_family(family)
    assert family_for(other_pipeline) is family
    assert "DDPMPipeline" in supported_pipelines()


def test_registering_the_same_class_again_replaces_it(other_pipeline):
    register_family(OtherFamily())
    again = OtherFamily()
    register_family(again)
    assert family_for(other_pipeline) is again


def test_two_families_for_one_pipeline_are_refused():
    class Mine(StableDiffusionFamily):
        pass

    with pytest.raises(ValueError, match="Mine and .*StableDiffusionFamily both serve StableDiffusionPipeline"):
        register_family(Mine())
    assert type(family_for(build_tiny_pipeline())) is StableDiffusionFamily


def test_what_is_no_family_is_refused():
    with pytest.raises(TypeError, match="got the class OtherFamily, not an instance"):
        register_family(OtherFamily)
    with pytest.raises(TypeError, match="got a str, not an instance"):
        register_family("DDPMPipeline")


def test_a_family_without_its_attributes_is_refused():
    class Bare(Family):
        pipeline_class = "DDPMPipeline"
        encode_prompts = encode_samples = decode_samples = predict = resolution = None

    with pytest.raises(TypeError, match="Bare does not set denoiser_name, encoder_names, lora_target_modules"):
        register_family(Bare())


@pytest.mark.parametrize(
    ("unsupported", "nearest", "why"),
    [
        # Another sampler around a supported denoiser; of UNets, of which there are several, the one of a similar name.
        ("FluxImg2ImgPipeline", "FluxPipeline", "the transformer of both is a FluxTransformer2DModel"),
        ("StableDiffusionXLPAGPipeline", "StableDiffusionXLPipeline", "the unet of both is a UNet2DConditionModel"),
        ("StableDiffusionPAGPipeline", "StableDiffusionPipeline", "the unet of both is a UNet2DConditionModel"),
        # It takes no image, as the pipeline of the most similar name does.
        ("LatentConsistencyModelPipeline", "StableDiffusionPipeline", "the unet of both is a UNet2DConditionModel"),
        # A UNet of the same class as Stable Diffusion's, for spectrograms.
        ("AudioLDMPipeline", "AudioLDM2Pipeline", "its name is similar"),
        ("LuminaPipeline", "Lumina2Pipeline", "its name is similar"),
    ],
)
def test_an_unsupported_pipeline_is_told_the_nearest_one_and_why(unsupported, nearest, why):
    with pytest.raises(TypeError) as caught:
        families.family_named(unsupported)
    message = str(caught.value)
    assert f"The nearest of them is {nearest}: {why}." in message
    assert f"{nearest}.from_pretrained(...)" in message
    family = type(families.family_named(nearest))
    assert f"subclass {family.__module__}.{family.__name__} with pipeline_class = '{unsupported}'" in message


def test_a_pipeline_derived_from_a_supported_one_is_nearest_to_that():
    class Mine(FluxPipeline):
        pass

    with pytest.raises(TypeError, match="Mine is not supported.*The nearest of them is FluxPipeline: Mine is derived"):
        family_for(Mine(**tiny.build("flux_dev").components))


def test_nothing_is_near_to_a_pipeline_of_another_kind(other_pipeline):
    with pytest.raises(TypeError, match="DDPMPipeline is not supported.*To train it all the same, subclass") as caught:
        family_for(other_pipeline)
    assert "nearest" not in str(caught.value)


@pytest.mark.parametrize(
    ("text_to_image", "expected"),
    [
        ("StableDiffusionPipeline", "StableDiffusionEdit, whose unet is a UNet2DConditionModel too, or FluxEdit"),
        ("FluxPipeline", "FluxEdit, whose transformer is a FluxTransformer2DModel too, or StableDiffusionEdit"),
        # By the name alone.
        ("StableAudioPipeline", "StableDiffusionEdit, FluxEdit"),
    ],
)
def test_of_the_editing_pipelines_the_nearest_is_named_first(text_to_image, expected, monkeypatch):
    class StableDiffusionEdit(StableDiffusionFamily):
        pipeline_class, condition_images = "StableDiffusionEdit", ("image",)

    class FluxEdit(FluxFamily):
        pipeline_class, condition_images = "FluxEdit", ("image",)

    others = [family for family in families.all_families() if not family.condition_images]
    made = {family.pipeline_class: family for family in (*others, StableDiffusionEdit(), FluxEdit())}
    monkeypatch.setattr(families, "_FAMILIES", made)
    assert families.editing_pipelines(families.family_named(text_to_image)) == expected


def test_an_unsupported_pipeline_is_told_the_supported_ones_and_how_to_register(other_pipeline):
    with pytest.raises(TypeError) as caught:
        family_for(other_pipeline)
    message = str(caught.value)
    assert message.startswith("DDPMPipeline is not supported.")
    for name in ("FluxPipeline", "StableDiffusionXLPipeline", "register_family", "'trl_diffusion_pref.families'"):
        assert name in message


@pytest.mark.parametrize("target", ["OtherFamily", "made"], ids=["class", "instance"])
def test_an_entry_point_names_a_family(target, install, other_pipeline):
    install(f"outside_{target.lower()}", MODULE.format(pipeline_class="DDPMPipeline"), target)
    assert type(family_for(other_pipeline)).__module__ == f"outside_{target.lower()}"


def test_entry_points_wait_for_the_first_lookup(install):
    # The module raises when it is imported.
    install("outside_raises", "raise RuntimeError('no backend')", "OtherFamily")
    register_family(OtherFamily())
    for _ in range(2):
        with pytest.raises(
            ImportError, match="entry point other = outside_raises:.*package outside_raises.*no backend"
        ):
            supported_pipelines()


def test_an_entry_point_for_a_pipeline_that_has_a_family_is_refused(install):
    install("outside_clash", MODULE.format(pipeline_class="FluxPipeline"), "made")
    with pytest.raises(ValueError, match="package outside_clash.*both serve FluxPipeline"):
        supported_pipelines()


def test_an_entry_point_that_is_no_family_is_refused(install):
    install("outside_number", "number = 3", "number")
    with pytest.raises(TypeError, match="package outside_number.*got a int, not an instance"):
        supported_pipelines()


@pytest.mark.parametrize(
    ("name", "part"),
    [("flux_dev", "text_encoder_2"), ("stable_diffusion_xl", "text_encoder"), ("stable_diffusion", "vae")],
)
def test_a_pipeline_without_a_part_that_encodes_is_refused(name, part, tmp_path):
    pipeline = tiny.build(name)
    setattr(pipeline, part, None)
    message = f"The {type(pipeline).__name__} was loaded without {part}, and prompts and samples are encoded"
    with pytest.raises(ValueError, match=message):
        MaPOTrainer(pipeline, MaPOConfig(output_dir=str(tmp_path)), preference_pairs(2))
    with pytest.raises(ValueError, match=message):
        preference_accuracy(pipeline, preference_pairs(2))


@pytest.mark.parametrize("size", [None, [8, 12]])
def test_a_unet_that_says_no_square_needs_a_resolution(size):
    pipeline = build_tiny_pipeline()
    pipeline.unet.register_to_config(sample_size=size)
    with pytest.raises(ValueError, match="is no side of a square. Set resolution"):
        family_for(pipeline).resolution(pipeline)
    pipeline.unet.register_to_config(sample_size=[8, 8])
    assert family_for(pipeline).resolution(pipeline) == 16


def test_a_pipeline_that_says_no_factor_demands_none_of_its_sizes():
    pipeline = build_tiny_pipeline()
    family = family_for(pipeline)
    del pipeline.vae_scale_factor
    assert family.size_step(pipeline) == 1


def test_a_pipeline_that_diffusers_lacks_is_missing_with_its_version(monkeypatch):
    rows = [("WanPipeline", "0.37", "wan", "WanFamily"), ("NewPipeline", "9.9", "new", "NewFamily")]
    known, missing = families._load_built_in(rows)
    assert (list(known), missing) == (["WanPipeline"], {"NewPipeline": "9.9"})
    monkeypatch.setattr(families, "_MISSING", missing)
    assert "NewPipeline" not in supported_pipelines()
    with pytest.raises(TypeError, match="NewPipeline needs diffusers >= 9.9, but .* is installed"):
        families.family_named("NewPipeline")
