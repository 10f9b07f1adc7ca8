"""What people call our fields and values, the search for the one that was meant, and how much of a text is shown.

One table serves configurations, options of the command line and Python alike: the names of TRL, flow_grpo,
Flow-Factory, diffusers' scripts and transformers' trainer on the left, ours on the right.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from difflib import SequenceMatcher, get_close_matches

SCREEN = 80
"""Characters of a value in a message, and of a name that is compared: the search is quadratic in them."""

PATH = 240
"""Characters of a path in a message."""

EMBEDDED_MODELS: Mapping[str, str] = {"shapes": "weights", "shapes_tokens": "tokens"}
"""Models that come with the package -> their folder in `tempflow/shapes`. These names are no paths."""

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""What "owner/name" on a hub looks like."""

_RATE, _NAME, _OUTPUT = ("optimizer.learning_rate",), ("name",), ("output",)
_KL, _CLIP, _CLIP_HIGH = ("algorithm.kl",), ("algorithm.clip",), ("algorithm.clip_high",)
_GROUP = ("algorithm.group", "algorithm.branches")
_STEPS = ("algorithm.steps",)
_NOISE, _STD = ("algorithm.noise_level", "algorithm.eta"), ("algorithm.std", "algorithm.std_group")
_ADVANTAGE = ("algorithm.advantage_clip", "algorithm.advantage_max")
_GUIDANCE, _DTYPE, _PATH = ("model.guidance",), ("model.dtype",), ("model.path", "what")
_SIZE = ("model.height",)
_ITERATIONS, _UPDATES = ("iterations",), ("optimizer.updates_per_iteration",)
_PROMPTS, _TRAIN_ROWS, _ROLLOUT_ROWS = ("data.prompts_per_iteration",), ("train_rows",), ("rollout_rows", "rows")
_TRAIN_DATA, _SAVE, _KEEP = ("data.train", "prompts"), ("checkpoint.every",), ("checkpoint.keep",)
_VALIDATE, _TEST_ROWS = ("evaluation.every",), ("rollout_rows", "rows")
_WARMUP, _EMA, _LORA = ("optimizer.warmup_iterations",), ("optimizer.ema_decay",), ("model.training",)
_TRACK, _START, _REWARD = ("track.to",), ("model.start",), ("rewards.0.name", "rewards")

FIELDS: Mapping[str, tuple[str, ...]] = {
    # optimizer
    "lr": _RATE,
    "train_learning_rate": _RATE,
    "adam_beta1": ("optimizer.beta1",),
    "adam_beta2": ("optimizer.beta2",),
    "betas": ("optimizer.beta1",),
    "adam_epsilon": ("optimizer.eps",),
    "adam_weight_decay": ("optimizer.weight_decay",),
    "wd": ("optimizer.weight_decay",),
    "grad_clip": ("optimizer.max_grad_norm",),
    "grad_norm": ("optimizer.max_grad_norm",),
    "max_norm": ("optimizer.max_grad_norm",),
    "gradient_clipping": ("optimizer.max_grad_norm",),
    "use_8bit_adam": ("optimizer.kind",),
    "optim": ("optimizer.kind",),
    "optimizer_type": ("optimizer.kind",),
    "warmup_steps": _WARMUP,
    "lr_warmup_steps": _WARMUP,
    "warmup": _WARMUP,
    "lr_scheduler": ("optimizer.decay",),
    "lr_scheduler_type": ("optimizer.decay",),
    "lr_decay": ("optimizer.decay",),
    "num_iterations": _UPDATES,  # TRL's μ: updates on the same samples
    "num_inner_epochs": _UPDATES,
    "ppo_epochs": _UPDATES,
    "num_ppo_epochs": _UPDATES,
    "gradient_step_per_epoch": _UPDATES,
    "ema": _EMA,
    "use_ema": _EMA,
    # how long, how much at once
    "num_epochs": _ITERATIONS,
    "num_train_epochs": _ITERATIONS,
    "epochs": _ITERATIONS,
    "max_epochs": _ITERATIONS,
    "max_steps": _ITERATIONS,
    "max_train_steps": _ITERATIONS,
    "num_train_steps": _ITERATIONS,
    "train_steps": _ITERATIONS,
    "total_steps": _ITERATIONS,
    "training_steps": _ITERATIONS,
    "batch_size": _PROMPTS,
    "num_batches_per_epoch": _PROMPTS,
    "sample_num_batches_per_epoch": _PROMPTS,
    "unique_sample_num_per_epoch": _PROMPTS,
    "prompts_per_step": _PROMPTS,
    "num_prompts": _PROMPTS,
    "train_batch_size": _TRAIN_ROWS,
    "per_device_batch_size": _TRAIN_ROWS,
    "per_device_train_batch_size": _TRAIN_ROWS,
    "train.batch_size": _TRAIN_ROWS,
    "micro_batch_size": _TRAIN_ROWS,
    "mini_batch_size": _TRAIN_ROWS,
    "gradient_accumulation_steps": _TRAIN_ROWS,
    "grad_accum": _TRAIN_ROWS,
    "sample.train_batch_size": _ROLLOUT_ROWS,
    "sample_batch_size": _ROLLOUT_ROWS,
    "sample.batch_size": _ROLLOUT_ROWS,
    "generation_batch_size": _ROLLOUT_ROWS,
    "test_batch_size": _TEST_ROWS,
    "per_device_eval_batch_size": _TEST_ROWS,
    "eval_batch_size": _TEST_ROWS,
    "num_workers": ("threads",),
    "num_threads": ("threads",),
    "n_threads": ("threads",),
    # the algorithm
    "algo": ("algorithm.name",),
    "algorithm_name": ("algorithm.name",),
    "trainer_type": ("algorithm.name",),
    "loss_type": ("algorithm.name",),
    "method": ("algorithm.name",),
    "beta": _KL,
    "kl_beta": _KL,
    "kl_coef": _KL,
    "kl_coeff": _KL,
    "kl_weight": _KL,
    "kl_reward": _KL,
    "kl_ratio": _KL,
    "init_kl_coef": _KL,
    "kl_type": ("algorithm.kl_form",),
    "kl_estimator": ("algorithm.kl_form",),
    "epsilon": _CLIP,
    "clip_range": _CLIP,
    "cliprange": _CLIP,
    "clip_ratio": _CLIP,
    "clip_eps": _CLIP,
    "eps_clip": _CLIP,
    "train_clip_range": _CLIP,
    "epsilon_low": _CLIP,
    "clip_range_low": _CLIP,
    "epsilon_high": _CLIP_HIGH,
    "clip_range_high": _CLIP_HIGH,
    "clip_ratio_high": _CLIP_HIGH,
    "group": _GROUP,
    "group_size": _GROUP,
    "num_generations": _GROUP,
    "num_image_per_prompt": _GROUP,
    "num_images_per_prompt": (*_GROUP, "samples_per_prompt"),
    "images_per_prompt": (*_GROUP, "samples_per_prompt"),
    "num_samples_per_prompt": (*_GROUP, "samples_per_prompt"),
    "samples": ("samples_per_prompt", *_GROUP),
    "k": _GROUP,
    "num_branches": ("algorithm.branches",),
    "num_seeds": ("algorithm.seeds",),
    "num_steps": _STEPS,
    "num_inference_steps": _STEPS,
    "inference_steps": _STEPS,
    "sampling_steps": _STEPS,
    "sample_num_steps": _STEPS,
    "denoising_steps": _STEPS,
    "eval_num_steps": ("evaluation.steps",),
    "eval_num_inference_steps": ("evaluation.steps",),
    "noise": _NOISE,
    "eta": _NOISE,
    "sample_eta": _NOISE,
    "noise_scale": _NOISE,
    "sde_type": ("algorithm.dynamics", "algorithm.kind"),
    "dynamics_type": ("algorithm.dynamics", "algorithm.kind"),
    "sde_window_size": ("algorithm.window",),
    "window_size": ("algorithm.window",),
    "sde_window_range": ("algorithm.window_end",),
    "sde_steps": ("algorithm.train_steps",),
    "num_sde_steps": ("algorithm.train_steps",),
    "timestep_fraction": ("algorithm.train_steps", "algorithm.fraction"),
    "train_timestep_fraction": ("algorithm.train_steps", "algorithm.fraction"),
    "same_latent": ("algorithm.shared_noise",),
    "init_same_noise": ("algorithm.shared_noise",),
    "global_std": _STD,
    "scale_rewards": _STD,
    "per_prompt_stat_tracking": _STD,
    "adv_clip_max": _ADVANTAGE,
    "adv_clip": _ADVANTAGE,
    "adv_clip_range": _ADVANTAGE,
    "clip_advantages": _ADVANTAGE,
    "advantage_clip_max": _ADVANTAGE,
    "train_adv_clip_max": _ADVANTAGE,
    "beta_dpo": ("algorithm.beta",),
    # the model
    "model": _PATH,
    "model_id": _PATH,
    "model_name": _PATH,
    "model_path": _PATH,
    "model_name_or_path": _PATH,
    "pretrained_model": _PATH,
    "pretrained_model_name_or_path": _PATH,
    "checkpoint_path": _PATH,
    "variant": ("model.revision",),
    "cfg": _GUIDANCE,
    "train_cfg": _GUIDANCE,
    "cfg_scale": _GUIDANCE,
    "guidance_scale": _GUIDANCE,
    "sample_guidance_scale": _GUIDANCE,
    "classifier_free_guidance": _GUIDANCE,
    "eval_guidance_scale": ("evaluation.guidance",),
    "resolution": _SIZE,
    "image_size": _SIZE,
    "size": _SIZE,
    "img_size": _SIZE,
    "precision": _DTYPE,
    "mixed_precision": _DTYPE,
    "torch_dtype": _DTYPE,
    "weight_dtype": _DTYPE,
    "fp16": _DTYPE,
    "bf16": _DTYPE,
    "half": _DTYPE,
    "use_lora": _LORA,
    "lora": _LORA,
    "use_peft": _LORA,
    "finetune_type": _LORA,
    "full_finetune": _LORA,
    "rank": ("model.lora_rank",),
    "lora_r": ("model.lora_rank",),
    "r": ("model.lora_rank",),
    "lora_dim": ("model.lora_rank",),
    "network_dim": ("model.lora_rank",),
    "network_alpha": ("model.lora_alpha",),
    "lora_path": _START,
    "init_from": _START,
    "ref_model": ("model.reference",),
    "reference_model": ("model.reference",),
    # data, rewards, evaluation
    "dataset": _TRAIN_DATA,
    "dataset_dir": _TRAIN_DATA,
    "dataset_name": _TRAIN_DATA,
    "dataset_path": _TRAIN_DATA,
    "data_path": _TRAIN_DATA,
    "prompt_file": _TRAIN_DATA,
    "prompts_file": _TRAIN_DATA,
    "prompt_fn": _TRAIN_DATA,
    "train_data": _TRAIN_DATA,
    "validation_prompt": ("data.validation",),
    "reward": _REWARD,
    "reward_fn": _REWARD,
    "reward_func": _REWARD,
    "reward_funcs": _REWARD,
    "reward_model": _REWARD,
    "reward_weights": ("rewards.0.weight",),
    "eval_steps": _VALIDATE,
    "eval_freq": _VALIDATE,
    "eval_every": _VALIDATE,
    "eval_interval": _VALIDATE,
    "validation_steps": _VALIDATE,
    # the run
    "run_name": _NAME,
    "experiment_name": _NAME,
    "exp_name": _NAME,
    "out": _OUTPUT,
    "to": _OUTPUT,
    "out_dir": _OUTPUT,
    "output_dir": _OUTPUT,
    "output_path": _OUTPUT,
    "logdir": _OUTPUT,
    "log_dir": _OUTPUT,
    "logging_dir": _OUTPUT,
    "save_dir": _OUTPUT,
    "save_path": _OUTPUT,
    "save_freq": _SAVE,
    "save_steps": _SAVE,
    "save_every": _SAVE,
    "save_interval": _SAVE,
    "checkpointing_steps": _SAVE,
    "save_total_limit": _KEEP,
    "num_checkpoint_limit": _KEEP,
    "checkpoints_total_limit": _KEEP,
    "resume_from": ("resume",),
    "resume_from_checkpoint": ("resume",),
    "report_to": _TRACK,
    "log_with": _TRACK,
    "logger": _TRACK,
    "logging_backend": _TRACK,
    "tracker": _TRACK,
    "wandb_project": ("track.project",),
    "random_seed": ("seed",),
    "data_seed": ("seed",),
    "manual_seed": ("seed",),
    "sample.seed": ("seed",),
    "gpu": ("device",),
    "accelerator": ("device",),
    "fsdp": ("parallel.mode",),
    "ddp": ("parallel.mode",),
    "distributed_type": ("parallel.mode",),
    # the other verbs'
    "n": ("count",),
    "num_images": ("count",),
    "limit": ("count",),
    "text": ("prompt",),
    "lora_weights": ("what",),
    "base_model": ("base",),
    "run": ("runs", "run", "what"),
    "format": ("form",),
}
"""A foreign name, a path of its owner's or its last part -> paths of ours, the likeliest first: the first that the
command or configuration at hand has is proposed, where there are no sections by its last part. A name that is itself a
field there is never looked up."""

VALUES: Mapping[str, tuple[str, ...]] = {
    "fp16": ("float16",),
    "half": ("float16",),
    "16": ("float16",),
    "bf16": ("bfloat16",),
    "bf16-mixed": ("bfloat16",),
    "16-mixed": ("float16",),
    "torch.float16": ("float16",),
    "torch.bfloat16": ("bfloat16",),
    "amp": ("bfloat16",),
    "fp32": ("float32",),
    "float": ("float32",),
    "single": ("float32",),
    "32": ("float32",),
    "torch.float32": ("float32",),
    "tf32": ("float32",),
    "fp64": ("float32",),
    "float64": ("float32",),
    "double": ("float32",),
    "no": ("float32", "off", "none"),
    "fp8": ("float8",),
    "gpu": ("cuda", "auto"),
    "cuda0": ("cuda:0",),
    "gpu:0": ("cuda:0",),
    "metal": ("mps",),
    "peft": ("lora",),
    "qlora": ("lora",),
    "grpo": ("flow_grpo",),
    "ppo": ("ddpo",),
    "nft": ("diffusion_nft",),
    "dpo": ("online_dpo",),
    "tempflow": ("tempflow_grpo", "shapes_tempflow"),
    "tb": ("tensorboard",),
    "sum": ("merged",),
    "last": ("policy",),
    "latest": ("policy",),
    "final": ("policy",),
    "true": ("warn",),
    "false": ("off",),
}
"""A value that people write -> ours; the first that is valid where it stands is proposed."""


def cut(text: str, length: int = SCREEN) -> str:
    """`text` on one line, with "…" for its middle where it is longer than `length`."""
    if len(text) > 4 * length:
        text = f"{text[: 2 * length]} … {text[-2 * length :]}"
    line = " ".join(text.split())
    if len(line) <= length:
        return line
    tail = (length - 1) // 3
    return f"{line[: length - 1 - tail]}…{line[-tail:]}"


def nearest(value: object, valid: Iterable[object]) -> str:
    """The valid value that `value` most likely means, as Python writes it; "none" where nothing is valid."""
    options = {str(v): v for v in valid}
    asked = str(value)[:SCREEN].strip().lower()
    for meant in VALUES.get(asked, ()):
        if meant in options:
            return repr(options[meant])
    close = get_close_matches(asked, list(options), n=1, cutoff=0.0)
    return repr(options[close[0]]) if close else "none"


def likeliest(asked: str, fields: Collection[str]) -> str | None:
    """The field that `asked` most likely means; None where none is like it.

    asked   a dotted path, or a single name; hyphens count as underscores
    fields  dotted paths of what there is, in the order in which doubtful cases are settled
    """
    path = asked.strip("-").replace("-", "_").lower()[:SCREEN]
    if path in fields:
        return path
    section, _, leaf = path.rpartition(".")
    inside = [f for f in fields if f.rpartition(".")[0] == section]
    known = [t for name in (path, leaf) for t in _ours(name, fields)]
    here = [t for t in known if t in inside]
    same = [f for f in fields if f.rpartition(".")[2] == leaf]
    same = sorted(same, key=lambda f: SequenceMatcher(None, f.rpartition(".")[0], section).ratio() < 0.6)
    for found in (here, _close(leaf, inside, 0.8), known, same, _stripped(leaf, fields), _close(leaf, inside, 0.55)):
        if found:
            return found[0]
    close = _close(leaf, fields, 0.75) or get_close_matches(path, list(fields), n=1, cutoff=0.75)
    return close[0] if close else None


def _ours(name: str, fields: Collection[str]) -> list[str]:
    """What the table says of a name, as far as there is such a field."""
    told = FIELDS.get(name, ())
    return [t for t in told if t in fields] + [t.rpartition(".")[2] for t in told if t.rpartition(".")[2] in fields]


def _stripped(leaf: str, fields: Collection[str]) -> list[str]:
    """What `leaf` means without the section that some write into the name itself: "sample_num_steps"."""
    for prefix in ("sample_", "train_", "eval_", "grpo_"):
        name = leaf.removeprefix(prefix)
        if name != leaf:
            return _ours(name, fields) or [f for f in fields if f.rpartition(".")[2] == name]
    return []


def _close(leaf: str, fields: Collection[str], cutoff: float) -> list[str]:
    """Those whose last part reads like `leaf`, the closest first."""
    ratio = {f: SequenceMatcher(None, f.rpartition(".")[2], leaf).ratio() for f in fields}
    return sorted((f for f in fields if ratio[f] >= cutoff), key=lambda f: -ratio[f])
