"""What to type in place of a word from another program: lr, epochs, --batch-size, hydra.run.dir.

Only words that no rule finds are listed. The rules find a field by its last part (`batch_size`), in
another spelling (`Recipe.Max-Steps`), and the option of a group by its name (`ema=true`).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from src.common.override_grammar import GROUPS
from src.config.hydra_compose import conf_folders, option_names


def _by_word(words: Mapping[str, str]) -> dict[str, str]:
    """Turns {meaning: "word word"} into {word: meaning}."""
    return {word: meaning for meaning, several in words.items() for word in several.split()}


FIELDS = _by_word(
    {
        "recipe.learning_rate": "lr rate max_lr peak_lr",
        "recipe.batch_size": "batch bs micro_batch_size train_batch_size"
        " per_device_train_batch_size",
        "recipe.max_steps": "steps num_steps n_steps iters max_iters train_steps total_steps"
        " iterations",
        "recipe.seq_len": "block_size context context_length max_seq_len max_length seq_length"
        " n_ctx",
        "recipe.accumulate": "grad_accum accum accumulate_grad_batches gradient_accumulation_steps",
        "recipe.clip_norm": "clip grad_clip clip_grad max_grad_norm gradient_clip_val",
        "recipe.weight_decay": "wd decay",
        "recipe.precision": "dtype amp mixed_precision",
        "recipe.schedule": "scheduler lr_scheduler lr_schedule",
        "recipe.log_every": "log_every_n_steps log_interval logging_steps",
        "recipe.checkpoint_every": "save_every save_steps save_interval",
        "model.num_layers": "layers n_layers n_layer depth num_hidden_layers",
        "model.num_heads": "heads n_heads n_head num_attention_heads",
        "model.hidden_dim": "d_model dim width hidden hidden_size n_embd embed_dim",
        "model.inner_dim": "d_ff ffn_dim intermediate_size",
        "ffn.num_routed": "experts n_experts num_experts",
        "ffn.top_k": "topk num_experts_per_tok",
        "resume": "resume_from resume_from_checkpoint ckpt ckpt_path",
        "init": "pretrained weights load_from",
        "paths.runs": "output output_dir out out_dir save_dir log_dir run_dir default_root_dir",
        "paths.cache": "cache_dir",
        "study": "name run_name project experiment_name exp",
        "seed": "random_seed manual_seed rng",
        "compile": "torch_compile use_compile",
        "trainer.threads": "num_threads num_workers",
        "trainer.activation_checkpointing": "gradient_checkpointing",
        "tracking.uri": "tracking_uri mlflow_uri",
    }
)
"""The field that people mean, by the last part of the name that they type."""

ADVICE = _by_word(
    {
        "type trainer=gpu": "gpu cuda",
        "type trainer=cpu": "cpu",
        "type trainer=auto, trainer=cpu or trainer=gpu": "device accelerator",
        "type trainer=gpu, or trainer=ddp trainer.devices=<number> for several": "gpus num_gpus"
        " n_gpus nproc_per_node",
        "type tracking=mlflow or tracking=local": "wandb logger report_to tensorboard",
        "type data=text data.path=FILE": "dataset datamodule corpus file train_file data_dir"
        " data_path",
        "type attention=gqa or attention=mlha": "attn attention_type",
        "type ffn=mlp or ffn=moe": "mlp_type ffn_type feed_forward",
        "type stability=<remedy>": "remedy remedies option options",
        "type preset=<name>, or --config-dir=FOLDER to add presets of your own": "config conf"
        " config_file",
        "type --multirun seed=0,1,2": "seeds num_seeds",
        "type plan=true": "dry_run dryrun preview",
        "type rerun=true": "overwrite force",
        "type --multirun n_jobs=<number>": "jobs num_jobs workers parallel",
        "a run is measured in optimizer steps; type recipe.max_steps=<number>": "epoch epochs"
        " num_epochs n_epochs max_epochs num_train_epochs",
        "warm-up is a share of the run; type recipe.warmup_frac=<0 to 1>": "warmup warmup_steps"
        " num_warmup_steps warmup_iters warmup_ratio",
        "AdamW is the only optimizer; type recipe.learning_rate, recipe.betas, recipe.eps or"
        " recipe.weight_decay": "optimizer optim momentum",
        "type recipe.betas=[0.9,0.95]": "beta1 beta2",
        "there is no dropout; leave it out": "dropout attn_dropout resid_pdrop embd_pdrop",
        "type recipe.num_validations=<number of validations in a run>": "eval_interval eval_every"
        " eval_steps val_every val_check_interval",
        "leave it out; the same seed always gives the same numbers": "deterministic benchmark",
    }
)
"""What to type where no single field means the same, by the last part of the typed name."""

FLAGS = _by_word(
    {
        "each command has one configuration; type --config-dir=FOLDER to add options and"
        " experiments of your own": "--config-name -cn --config-path -cp",
        "leave it out; without --multirun one run is trained": "--run -r",
        "type field=value to change a field": "--package -p",
        "type --help": "--hydra-help -help",
        "leave it out; --cfg job shows resolved values": "--resolve",
        "type the same command again, with rerun=true": "--experimental-rerun",
        "type --info, which shows versions and options": "--version -V --list",
        "leave it out; train.log in the run folder holds the details": "--verbose -v --debug",
        "type plan=true": "-n",
    }
)
"""What to type in place of a flag of another program, Hydra among them."""

HYDRA = {
    "hydra.run": "type paths.runs=FOLDER and study=NAME; a run's folder is"
    " <paths.runs>/<study>/<variant>/seed-<n>",
    "hydra.sweep": "type paths.runs=FOLDER and study=NAME; a run's folder is"
    " <paths.runs>/<study>/<variant>/seed-<n>",
    "hydra.job.name": "type study=NAME",
    "hydra.job.chdir": "leave it out; a command stays in the folder it was started in",
    "hydra.output_subdir": "leave it out; config.yaml is written into the run folder",
    "hydra.verbose": "leave it out; train.log in the run folder holds the details",
    "hydra.job_logging": "leave it out; train.log in the run folder holds the details",
    "hydra.hydra_logging": "leave it out; train.log in the run folder holds the details",
    "hydra.searchpath": "type --config-dir=FOLDER",
    "hydra.mode": "type --multirun to start a sweep",
    "hydra.sweeper": "type --multirun field=a,b,c, or write a file in conf/experiment",
}
"""What to type in place of a setting of Hydra's, by its name or that of a section above it."""

VALUES = {
    "recipe.precision": _by_word(
        {"bf16-mixed": "16 bf16 fp16 bfloat16 16-mixed", "32-true": "32 fp32 float32 32-full"}
    ),
    # Of a saved model, people name the dtype of its weights.
    "precision": _by_word(
        {
            "bf16-true": "bf16 bfloat16 torch.bfloat16",
            "16-true": "16 fp16 float16 half torch.float16",
            "32-true": "32 fp32 float32 torch.float32",
            "64-true": "64 fp64 float64 double torch.float64",
        }
    ),
}
"""The value that people mean by another one, by field."""

OPTIONS = {
    "attention": _by_word({"mlha": "mla latent", "gqa": "mha mqa gpa multihead"}),
    "ffn": _by_word({"mlp": "dense swiglu", "moe": "experts", "moe_writeup": "writeup"}),
    "stability": _by_word(
        {
            "clip03": "clip clipping grad_clip clip_norm",
            "ema": "average averaging swa",
            "none": "baseline off false no",
            "fp32_full": "float32 32",
        }
    ),
    "model": _by_word(
        {
            "proxy": "tiny base default",
            "smollm2_135m": "smollm smollm2",
            "smoldeepseek_916m": "deepseek smoldeepseek writeup",
            "external": "llama mixtral gpt2 hf own",
        }
    ),
    "data": _by_word({"text": "file txt own custom", "tokens": "bin ids"}),
    "tokenizer": _by_word({"char": "character", "byte": "bytes", "smollm2": "hf gpt2"}),
    "preset": _by_word({"smoke": "tiny debug test quick", "laptop": "default"}),
    "trainer": _by_word({"gpu": "cuda gpus", "ddp": "multi distributed dp", "auto": "default"}),
    "tracking": _by_word({"local": "none off false no offline", "mlflow": "true on wandb"}),
    "hydra/launcher": _by_word({"slurm": "submitit submitit_slurm"}),
}
"""The option of a group that people mean by another name."""


def for_field(key: str, value: str, fields: Sequence[str]) -> str | None:
    """What to type in place of `key=value`; None if nothing fits well.

    Args:
        key: a field that does not exist, as typed.
        value: as typed; empty if there was none.
        fields: all fields and groups of the command.
    """
    name = key.lstrip("+~-").replace("-", "_").replace("/", ".").lower()
    if name.startswith("with.") and "with" in fields:
        return f"values to change have a plus sign: type +{key}={value or '<value>'}"
    last = name.rpartition(".")[2]
    same = [field for field in fields if field.lower() == name]
    # Sizes are the defaults of other fields, which are easier to find.
    ends = sorted(f for f in fields if f.lower().rpartition(".")[2] == last and ".sizes." not in f)
    of_a_run = "attention" in fields
    # Other commands have fields of the same meaning without a section, such as precision.
    field = FIELDS.get(last, "") if of_a_run else FIELDS.get(last, "").rpartition(".")[2]
    meant = [field] if field in fields else []
    if not same and of_a_run and last in ADVICE:
        return ADVICE[last]
    found = same or meant or ends
    if found:
        return f"type {' or '.join(_typed(field, value) for field in found)}"
    return _option_named(last, value) if of_a_run else None


def _typed(field: str, value: str) -> str:
    # Free text has been quoted for Hydra.
    value = value.strip("'")
    return f"{field}={VALUES.get(field, {}).get(value.lower(), value) or '<value>'}"


def _option_named(word: str, value: str) -> str | None:
    """What to type if a word is the name of an option: ema=true, use_ema=1, --ema."""
    name = re.sub(r"^(use|with|enable)_", "", word)
    is_on = value.lower() in ("", "true", "1", "yes", "on")
    for group in ("stability", "attention", "ffn", "preset") if is_on and name != "none" else ():
        if name in option_names(group):
            return f"type {group}={name}"
    return None


def for_section(key: str) -> str | None:
    """Which option of a group has the field `key`, if the selected one lacks it."""
    section, _, field = key.partition(".")
    if section not in GROUPS or section == "stability" or not field:
        return None
    pattern = re.compile(rf"^(?:  )?{re.escape(field.partition('.')[0])}:", re.MULTILINE)
    having = [
        file.stem
        for conf in conf_folders()
        for file in sorted((conf / section).glob("*.yaml"))
        if pattern.search(file.read_text(encoding="utf-8", errors="replace"))
    ]
    # A field that many options have is no reason to choose one of them.
    if not having or len(having) > 2:
        return None
    return f"is a field of {' and '.join(f'{section}={name}' for name in having)}"


def for_option(group: str, option: str) -> str | None:
    """What to type in place of an option that its group lacks; None if nothing fits well."""
    name = option.replace("-", "_").lower()
    several = re.split(r"[+&|]", name)
    if group == "stability" and len(several) > 1 and set(several) <= set(option_names(group)):
        return f"type stability=[{','.join(several)}]"
    if name in option_names(group):
        return f"type {group}={name}"
    meant = OPTIONS.get(group, {}).get(name)
    return _place(group, option) if meant is None else f"type {group}={meant}"


def _place(group: str, text: str) -> str | None:
    """What to type if a file, a folder or a function was typed in place of an option."""
    if group == "model" and re.fullmatch(r"[\w.]+:\w+", text):
        return f"type model=external model.target={text}"
    is_place = "/" in text or "." in text or Path(text).exists()
    options = {"data": "tokens" if text.endswith(".bin") else "text", "tokenizer": "checkpoint"}
    if group not in options or not is_place:
        return None
    return f"type {group}={options[group]} {group}.path={text}"


def for_flag(flag: str, following: str | None, fields: Sequence[str]) -> str | None:
    """What to type in place of a flag; None if nothing fits well.

    Args:
        flag: as typed, such as --lr or --lr=3e-3.
        following: the next argument; None: there is none.
        fields: all fields and groups of the command.
    """
    name, equals, value = flag.partition("=")
    if name in FLAGS:
        return FLAGS[name]
    if not equals:
        value = _as_value(following)
    return for_field(name, value, fields)


def for_brackets(value: str) -> str | None:
    """Which bracket of a value lacks its partner; None if all are in pairs."""
    if any(quote in value for quote in "'\""):
        return None
    for opening, closing in ("[]", "{}", "()"):
        missing = value.count(opening) - value.count(closing)
        if missing > 0:
            return f"the closing {closing} is missing"
        if missing < 0:
            return f"the opening {opening} is missing"
    return None


def for_word(word: str, following: str | None, fields: Sequence[str]) -> str | None:
    """What to type in place of an argument without `=`; None if nothing fits well.

    Args:
        word: as typed.
        following: the next argument; None: there is none.
        fields: all fields and groups of the command.
    """
    if word == "=":
        return "type field=value without blanks"
    if word == "help":
        return "type --help"
    return for_field(word, _as_value(following), fields)


def _as_value(argument: str | None) -> str:
    """An argument that is meant as the value of the one before it; empty if it is not."""
    return "" if argument is None or re.search("=|^-", argument) else argument


def for_deleted(key: str) -> str | None:
    """What to type in place of `~key`; None if nothing fits."""
    return {"stability": "type stability=none", "tracking": "type tracking=local"}.get(
        key, f"type {key}=null" if "." in key else None
    )


def for_hydra(key: str) -> str | None:
    """What to type in place of a setting of Hydra's; None if nothing replaces it."""
    name = key.replace("/", ".")
    while name and name not in HYDRA:
        name = name.rpartition(".")[0]
    return HYDRA.get(name)
