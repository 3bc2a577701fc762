"""What a step of MaPO computes, against values worked out by hand from the same draws."""

import copy

import pytest
import torch
from datasets import IterableDataset
from helpers.pipelines import assert_equal_weights, build_tiny_pipeline, weights_of
from peft import LoraConfig

from trl_diffusion_pref import MaPOConfig, MaPOTrainer
from trl_diffusion_pref.algorithms.mapo.loss import MaPOOptions, mapo_loss
from trl_diffusion_pref.diffusion.randomness import TRAINING, generator_for
from trl_diffusion_pref.families.stable_diffusion import StableDiffusionFamily
from trl_diffusion_pref.shapes import preference_pairs


METRICS = {"loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
METRICS |= {"mse/chosen", "mse/rejected"}


def latents_of(pipeline, image, noise):
    pixels = pipeline.image_processor.preprocess(image.resize((16, 16), resample=1))
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
    return (posterior.mean[0] + posterior.std[0] * noise) * pipeline.vae.config.scaling_factor


def by_hand(pipeline, row, key) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen and rejected error of a row, through the scheduler, the text encoder and the UNet themselves."""
    generator = generator_for(*key)
    t = torch.randint(1000, (1,), generator=generator)
    noise, *posterior_noise = (torch.randn(4, 8, 8, generator=generator) for _ in range(3))
    tokens = pipeline.tokenizer(row["prompt"], padding="max_length", max_length=16, return_tensors="pt").input_ids
    embeds = pipeline.text_encoder(tokens)[0]
    errors = []
    for column, extra in zip(("chosen", "rejected"), posterior_noise, strict=True):
        x_t = pipeline.scheduler.add_noise(latents_of(pipeline, row[column], extra)[None], noise[None], t)
        errors.append((pipeline.unet(x_t, t, embeds).sample[0] - noise).square().mean())
    return tuple(errors)


def test_the_first_step_s_loss_metrics_and_gradient_are_those_worked_out_by_hand(pairs, config):
    pipeline = build_tiny_pipeline()
    reference = copy.deepcopy(pipeline)
    cfg = config(max_steps=1, per_device_train_batch_size=2, optim="sgd", learning_rate=0.1, max_grad_norm=0.0)
    cfg.cache_dtype = "float32"
    cfg.train_sampling_strategy = "sequential"
    trainer = MaPOTrainer(pipeline, cfg, pairs.select(range(2)), optimizers=(None, None))
    trainer.train()
    logged = trainer.state.log_history[0]

    errors = [by_hand(reference, pairs[row], (42, TRAINING, 0, 0, row)) for row in range(2)]
    chosen, rejected = (torch.stack(side) for side in zip(*errors, strict=True))
    loss = mapo_loss(chosen, rejected, MaPOOptions("mapo", 0.1, 0.5, 1000))[0].mean()
    reference.unet.requires_grad_(True)
    loss.backward()
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert logged["mse/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-4)
    assert logged["mse/rejected"] == pytest.approx(rejected.mean().item(), rel=1e-4)
    assert logged["rewards/margins"] == pytest.approx(logged["rewards/chosen"] - logged["rewards/rejected"], abs=1e-3)
    exact = [1000 * (e / 2 / torch.expm1(e / 2) - 1) for e in (chosen.double(), rejected.double())]
    assert logged["rewards/chosen"] == pytest.approx(exact[0].mean().item(), rel=1e-4)
    assert logged["rewards/accuracies"] == (exact[0] > exact[1]).double().mean().item()
    for (name, tuned), base in zip(pipeline.unet.named_parameters(), reference.unet.parameters(), strict=True):
        decay = 1 - 0.1 * 0.01 if "norm" not in name and "bias" not in name else 1.0
        expected = base.detach() * decay - 0.1 * base.grad
        torch.testing.assert_close(tuned.detach(), expected, rtol=1e-4, atol=2e-6, msg=name)


def test_what_is_logged(pairs, config, tiny_pipeline):
    trainer = MaPOTrainer(tiny_pipeline, config(eval_strategy="steps", eval_steps=2), pairs, pairs.select(range(5)))
    trainer.train()
    training = [entry for entry in trainer.state.log_history if "loss" in entry]
    evaluation = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(training) == 3 and all(METRICS <= entry.keys() for entry in training)
    assert {f"eval_{name}" for name in METRICS - {"grad_norm"}} <= evaluation[0].keys()


def test_logged_metrics_are_means_over_the_interval(pairs, config):
    each = MaPOTrainer(build_tiny_pipeline(), config(logging_steps=1, max_steps=4), pairs)
    each.train()
    every_other = MaPOTrainer(build_tiny_pipeline(), config(logging_steps=2, max_steps=4), pairs)
    every_other.train()
    single, double = ([e for e in t.state.log_history if "loss" in e] for t in (each, every_other))
    for name in ("loss", "mse/chosen", "rewards/accuracies"):
        for index in range(2):
            mean = (single[2 * index][name] + single[2 * index + 1][name]) / 2
            assert double[index][name] == pytest.approx(mean, rel=1e-5)


def test_evaluation_averages_over_samples_and_repeats_to_the_last_digit(pairs, config, tiny_pipeline):
    trainer = MaPOTrainer(tiny_pipeline, config(), pairs, pairs.select(range(5)))  # batches of 4 and 1
    first, second = trainer.evaluate(), trainer.evaluate()
    timing = ("runtime", "per_second", "preparation")
    values = [{k: v for k, v in result.items() if not any(t in k for t in timing)} for result in (first, second)]
    assert values[0] == values[1]
    alone = [trainer.evaluate(pairs.select([row])) for row in range(1)]
    assert alone[0]["eval_loss"] != first["eval_loss"]
    whole = trainer.evaluate(pairs.select(range(5)))
    assert whole["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-6)
    trainer.args.per_device_eval_batch_size = 1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-5)


def test_evaluation_on_a_data_set_with_new_prompts_and_on_several(pairs, config, tiny_pipeline):
    other = preference_pairs(6, seed=123)
    trainer = MaPOTrainer(tiny_pipeline, config(), pairs.select(range(2)), {"a": pairs, "b": other})
    results = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss"} <= results.keys()
    assert trainer.evaluate(other)["eval_loss"] == pytest.approx(results["eval_b_loss"], rel=1e-6)


def test_the_callers_config_is_unchanged_and_serves_a_second_trainer(pairs, config):
    cfg = config(activation_checkpointing=True)
    before = copy.deepcopy(cfg.to_dict())
    weights = []
    for _ in range(2):
        pipeline = build_tiny_pipeline()
        trainer = MaPOTrainer(pipeline, cfg, pairs)
        trainer.train()
        assert pipeline.unet.is_gradient_checkpointing
        weights.append(weights_of(pipeline.unet))
    assert cfg.to_dict() == before
    assert_equal_weights(*weights)


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_changes_nothing(lora, pairs, config):
    weights = []
    for checkpointing in (False, True):
        pipeline = build_tiny_pipeline()
        peft_config = LoraConfig(r=4, init_lora_weights="gaussian") if lora else None
        MaPOTrainer(pipeline, config(activation_checkpointing=checkpointing), pairs, peft_config=peft_config).train()
        assert pipeline.unet.is_gradient_checkpointing is checkpointing
        weights.append(weights_of(pipeline.unet))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-5, atol=1e-6)


def test_a_denoiser_that_cannot_checkpoint_trains_without_unless_it_was_asked_for(pairs, config, monkeypatch, caplog):
    monkeypatch.setattr(StableDiffusionFamily, "gradient_checkpointing", False)
    pipeline = build_tiny_pipeline()
    with pytest.raises(ValueError, match="unet of StableDiffusionPipeline .* Set activation_checkpointing=False"):
        MaPOTrainer(pipeline, config(activation_checkpointing=True), pairs)
    cfg = config(activation_checkpointing=None)
    assert cfg.activation_checkpointing
    MaPOTrainer(pipeline, cfg, pairs).train()
    assert not pipeline.unet.is_gradient_checkpointing
    said = [record for record in caplog.records if "activation checkpointing" in record.getMessage()]
    assert len(said) == 1
    # the caller's own config still says what it said
    assert cfg.activation_checkpointing


def test_accumulating_four_batches_of_one_equals_one_batch_of_four(pairs, config):
    weights, losses = [], []
    for batch, accumulation in ((4, 1), (1, 4)):
        pipeline = build_tiny_pipeline()
        cfg = config(
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=1e-2,
        )
        trainer = MaPOTrainer(pipeline, cfg, pairs)
        trainer.train()
        weights.append(weights_of(pipeline.unet))
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-5, atol=1e-5)


def test_lora_trains_the_adapter_alone_on_the_family_s_targets(pairs, config, tiny_pipeline):
    before = weights_of(tiny_pipeline.unet)
    trainer = MaPOTrainer(tiny_pipeline, config(), pairs, peft_config=LoraConfig(r=2))
    assert all("lora_" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    targets = {
        name.split(".lora_")[0].rsplit("attn", 1)[1][2:]
        for name, p in trainer.model.named_parameters()
        if "lora_" in name
    }
    assert targets == {"to_q", "to_k", "to_v", "to_out.0"}
    trainer.train()
    after = {name.replace(".base_layer", ""): tensor for name, tensor in weights_of(tiny_pipeline.unet).items()}
    assert_equal_weights(before, {name: tensor for name, tensor in after.items() if "lora_" not in name})
    trained = [tensor for name, tensor in after.items() if "lora_B" in name]
    assert trained and all(tensor.abs().max() > 0 for tensor in trained)


def test_only_the_denoiser_is_trained(pairs, config, tiny_pipeline):
    before = weights_of(tiny_pipeline.vae), weights_of(tiny_pipeline.text_encoder)
    MaPOTrainer(tiny_pipeline, config(), pairs).train()
    assert_equal_weights(before[0], weights_of(tiny_pipeline.vae))
    assert_equal_weights(before[1], weights_of(tiny_pipeline.text_encoder))


def test_eight_bit_adam_keeps_two_bytes_per_parameter(pairs, config, tiny_pipeline):
    trainer = MaPOTrainer(tiny_pipeline, config(optim="adamw_bnb_8bit"), pairs)
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    large = {p: state for p, state in optimizer.state.items() if p.numel() >= 4096}
    parameters = sum(p.numel() for p in large)
    # by storage, since all parameters share one pair of quantisation maps
    tensors = [value for state in large.values() for value in state.values() if torch.is_tensor(value)]
    state_bytes = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    assert parameters > 100_000
    assert 2.0 <= state_bytes / parameters < 2.1


def test_prompt_dropout_gives_the_empty_prompt_to_its_share(pairs, config, tiny_pipeline, monkeypatch):
    trainer = MaPOTrainer(
        tiny_pipeline, config(prompt_dropout=0.3, per_device_train_batch_size=16, max_steps=40), pairs
    )
    seen = []

    def predict(denoiser, x_t, timestep, conditioning):
        seen.append(conditioning["prompt_embeds"])
        return torch.zeros_like(x_t, requires_grad=True) * next(denoiser.parameters()).sum()

    monkeypatch.setattr(type(trainer.family), "predict", lambda self, *args: predict(*args))
    trainer.train()
    empty = trainer.encoder.empty_prompt["prompt_embeds"][0]
    batches = torch.stack(seen)
    dropped = (batches == empty).flatten(2).all(dim=2)
    assert torch.equal(dropped[:, :16], dropped[:, 16:]), "both images of a pair share the decision"
    # 640 decisions: standard error 0.018
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.073)


@pytest.mark.newest
def test_a_streamed_data_set_trains_like_a_stored_one(pairs, config):
    weights = []
    for dataset in (pairs, pairs.to_iterable_dataset()):
        pipeline = build_tiny_pipeline()
        cfg = config(shuffle_buffer=0)
        cfg.train_sampling_strategy = "sequential"
        MaPOTrainer(pipeline, cfg, dataset).train()
        weights.append(weights_of(pipeline.unet))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_keeps_errors_and_losses_in_float32(pairs, config, tiny_pipeline):
    trainer = MaPOTrainer(tiny_pipeline, config(bf16=True, use_cpu=True, max_steps=1), pairs)
    seen = {}

    original = trainer.compute_losses

    def compute_losses(model, batch, mode):
        values = original(model, batch, mode)
        seen["errors"], seen["loss"] = (values["mse/chosen"].dtype, values["mse/rejected"].dtype), values["loss"].dtype
        return values

    trainer.compute_losses = compute_losses
    trainer.train()
    assert seen == {"errors": (torch.float32, torch.float32), "loss": torch.float32}
    assert next(tiny_pipeline.unet.parameters()).dtype == torch.float32


def test_a_half_precision_base_trains_a_float32_lora(pairs, config, tiny_pipeline):
    tiny_pipeline.unet.to(torch.bfloat16)
    trainer = MaPOTrainer(tiny_pipeline, config(), pairs, peft_config=LoraConfig(r=2))
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()
    assert {p.dtype for n, p in trainer.model.named_parameters() if "lora_" not in n} == {torch.bfloat16}


def test_group_norms_are_not_decayed(pairs, config, tiny_pipeline):
    trainer = MaPOTrainer(tiny_pipeline, config(), pairs)
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    norms = {
        f"{name}.{part}"
        for name, module in tiny_pipeline.unet.named_modules()
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm))
        for part in ("weight", "bias")
    }
    assert norms and not decayed & norms
    assert not [name for name in decayed if name.endswith("bias")]
    assert {n for n, p in tiny_pipeline.unet.named_parameters() if p.dim() > 1} <= decayed


def test_training_again_from_a_checkpoint_equals_a_fresh_trainer(pairs, config):
    """In one session: train, then resume an earlier checkpoint with the same trainer."""
    cfg = config(save_strategy="steps", save_steps=2, max_steps=5, logging_steps=3)
    trainer = MaPOTrainer(build_tiny_pipeline(), cfg, pairs)
    trainer.train()
    first = weights_of(trainer.model)
    trainer.train(resume_from_checkpoint=f"{cfg.output_dir}/checkpoint-4")
    assert_equal_weights(first, weights_of(trainer.model))


def test_the_callers_pipeline_is_untouched_where_the_data_are_refused(pairs, config, tiny_pipeline):
    bad = pairs.map(lambda row, index: {"prompt": "" if index == 3 else row["prompt"]}, with_indices=True)
    with pytest.raises(ValueError, match="row 3, column 'prompt': is empty"):
        MaPOTrainer(tiny_pipeline, config(), bad, peft_config=LoraConfig(r=2))
    MaPOTrainer(tiny_pipeline, config(), pairs, peft_config=LoraConfig(r=2)).train()


def test_after_training_the_pipeline_samples_without_dropout(pairs, config, tiny_pipeline):
    MaPOTrainer(tiny_pipeline, config(), pairs, peft_config=LoraConfig(r=2, lora_dropout=0.5)).train()
    assert not tiny_pipeline.unet.training


def test_nested_options_of_the_caller_are_not_written_to(pairs, config):
    cfg = config(
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": False}},
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )
    for _ in range(2):
        MaPOTrainer(build_tiny_pipeline(), cfg, pairs).train()


@pytest.mark.parametrize("options", [{"bf16_full_eval": True}, {"eval_do_concat_batches": False}])
def test_evaluation_options_of_the_host_loop_work(options, pairs, config, tiny_pipeline):
    plain = MaPOTrainer(build_tiny_pipeline(), config(), pairs, pairs.select(range(6))).evaluate()
    cfg = config(use_cpu=True, **options)
    result = MaPOTrainer(tiny_pipeline, cfg, pairs, pairs.select(range(6))).evaluate()
    assert result["eval_loss"] == pytest.approx(plain["eval_loss"], rel=0.02 if "bf16_full_eval" in options else 1e-6)


def test_a_data_set_with_a_column_called_row_is_encoded(pairs, config, tiny_pipeline):
    trainer = MaPOTrainer(tiny_pipeline, config(), pairs, pairs)
    with_row = pairs.add_column("row", list(range(16)))
    assert trainer.evaluate(with_row)["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


def test_stored_training_and_streamed_evaluation_data_go_together(pairs, config, tiny_pipeline):
    other = preference_pairs(6, seed=123)
    stored = MaPOTrainer(build_tiny_pipeline(), config(), pairs.select(range(3)), other).evaluate()
    streamed = MaPOTrainer(tiny_pipeline, config(), pairs.select(range(3)), other.to_iterable_dataset()).evaluate()
    assert streamed["eval_loss"] == pytest.approx(stored["eval_loss"], rel=1e-4)


def test_a_stream_without_declared_columns_trains(pairs, config, tiny_pipeline):
    rows = list(pairs)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = MaPOTrainer(tiny_pipeline, config(max_steps=2), stream)
    trainer.train()
    assert trainer.state.global_step == 2


def test_loader_workers_give_the_same_training(pairs, config):
    weights = []
    for workers in (0, 2):
        pipeline = build_tiny_pipeline()
        MaPOTrainer(pipeline, config(dataloader_num_workers=workers), pairs).train()
        weights.append(weights_of(pipeline.unet))
    assert_equal_weights(*weights)


def test_predictions_of_a_data_set_are_not_offered(pairs, config, tiny_pipeline):
    with pytest.raises(NotImplementedError, match="trainer.pipeline"):
        MaPOTrainer(tiny_pipeline, config(), pairs).predict(pairs)


def test_a_distilled_denoiser_is_refused(pairs, config, tiny_pipeline):
    tiny_pipeline.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(ValueError, match="is distilled: it takes the guidance scale as an input"):
        MaPOTrainer(tiny_pipeline, config(), pairs)


def test_deepspeed_needs_the_options_that_it_reads_before_the_model_is_known(tmp_path):
    with pytest.raises(ValueError, match="With DeepSpeed.*set learning_rate and weight_decay"):
        MaPOConfig(output_dir=str(tmp_path), deepspeed={"zero_optimization": {"stage": 2}})
