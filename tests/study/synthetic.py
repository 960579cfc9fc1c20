"""Studies that no one has trained: run folders as train and sweep leave them, made in no time.

    study = synthetic.study(
        tmp_path,
        arms={
            "none": Arm(num_failing=6),
            "shaken": Arm(num_failing=6, first=310, acts_from=240),
            "router_eps": Arm(acts_from=240),
            "early_stop": Arm(acts_from=280, steps=280),
        },
        seeds=6,
    )

`study` writes below `tmp_path / "runs"` and reads it back by `collect`; `in_memory` gives the same
runs without a file.
"""

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from src.study.read.collect import SWEEPS, Run, Study, collect

NAME = "synthetic"
"""The study's, unless given."""

SHA = "0123456789abcdef0123456789abcdef01234567"

NUM_VALIDATIONS = 11

LOG_EVERY = 40

CONFIG: dict[str, Any] = {
    "attention": {"rope_dim": 16, "q_latent_dim": 8, "kv_latent_dim": 8, "num_rope_keys": 1}
    | {"latent_norm": False, "qk_norm": False},
    "ffn": {
        "inner_dim": 64,
        "num_routed": 5,
        "num_shared": 1,
        "top_k": 2,
        "router": {"bias_use": "add", "bias_target": "one_over_experts", "bias_rate": 1.785}
        | {"norm_eps": 0.0, "z_loss_weight": 0.0},
    },
    "model": {"hidden_dim": 64, "num_layers": 6, "num_heads": 2, "init_std": 1 / 24},
    "tokenizer": {},
    "recipe": {"batch_size": 8, "seq_len": 64, "accumulate": 1, "learning_rate": 1.5e-3}
    | {"betas": [0.9, 0.95], "weight_decay": 0.01, "warmup_frac": 0.1, "schedule": "constant"}
    | {"precision": "32-true", "clip_norm": 1.0, "log_every": LOG_EVERY},
    "guard": {"check": ["loss", "gradients"], "on_nonfinite": "skip", "max_consecutive": None},
    "data": {"val_frac": 0.5, "max_chars": 40_000},
    "trainer": {"accelerator": "auto", "devices": 1, "threads": 1},
    "watch": {"routers_every": 10},
    "tracking": {"mlflow": False, "uri": None},
    "paths": {"runs": "runs", "cache": ".cache"},
}
"""What config.yaml holds beside the choices, seed and stability; max_steps joins from the arm."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One variant. Values a seed are taken round and round where there are fewer than seeds."""

    num_failing: int = 0
    """The first so many seeds have non-finite steps: `first`, then every third after it."""
    first: int = 300
    batches: int = 20
    nonfinite: Sequence[Sequence[int]] | None = None
    """Non-finite steps a seed (a run, where there are repeats), in place of the three above."""
    spikes: Sequence[Sequence[int]] = ((),)
    """Spike steps a seed, beside the non-finite ones."""
    loss: Sequence[float] = (2.10, 2.14, 2.08, 2.12, 2.11, 2.09)
    """Validation loss a seed at the end of training."""
    nonfinite_frac: float | None = None
    """val/nonfinite_frac at the end; None: 0.5 for a run with non-finite steps, else 0."""
    counts_tokens: bool = True
    """Whether validations have val/nonfinite_tokens, half of val/nonfinite_frac."""
    acts_from: int = 0
    max_steps: int = 440
    steps: int | None = None
    """Steps made; None: all."""
    repeats: int = 1
    seeds: Sequence[int] | None = None
    """Seeds that have run; None: all of the study."""
    status: str = "finished"
    outcome: str | None = None
    """None: clean, or intermittent with non-finite steps."""
    baseline: str | None = "none"
    """The key of another arm; that arm itself is compared with none."""
    stability: Sequence[str] | None = None
    """Options; None: what the key says, which is `none`, `ema` or `ema-warmdown`."""
    attention: str = "mlha"
    ffn: str = "moe_writeup_add"
    preset: str = "stress"
    model: str = "stress"
    fields: str = ""
    """What the variant's name ends in, such as `@learning_rate-0.003`."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Dotted fields of config.yaml that differ."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """Entries of record.json that differ."""
    flops_per_token: float = 1.0e6
    tokens_per_second: float = 10_000.0

    def steps_made(self) -> int:
        return self.max_steps if self.steps is None else self.steps

    def options(self, key: str) -> list[str]:
        if self.stability is not None:
            return sorted(self.stability)
        return [] if key == "none" else sorted(key.split("-"))

    def variant(self, key: str) -> str:
        """The folder's name."""
        stability = "-".join(self.options(key)) or "none"
        pieces = f"{self.attention}+{self.ffn}+{stability}"
        model = "" if self.model == "proxy" else f"@model-{self.model}"
        preset = "" if self.preset == "laptop" else f"@preset-{self.preset}"
        return f"{pieces}{model}{preset}{self.fields}"

    def nonfinite_of(self, index: int) -> list[int]:
        """The non-finite steps of the run with that place among the arm's runs."""
        if self.nonfinite is not None:
            steps = list(self.nonfinite[index % len(self.nonfinite)]) if self.nonfinite else []
        elif index // self.repeats < self.num_failing:
            steps = [self.first + 3 * number for number in range(self.batches)]
        else:
            steps = []
        return [step for step in steps if step <= self.steps_made()]


@dataclass(frozen=True, kw_only=True)
class _Files:
    """One run, before it is a folder or a Run."""

    variant: str
    baseline: str | None
    seed: int
    repeat: int
    config: dict[str, Any]
    record: dict[str, Any]
    lines: list[dict[str, float]]

    @property
    def folder_name(self) -> str:
        return f"seed-{self.seed}" + (f"-repeat-{self.repeat}" if self.repeat else "")


def study(
    folder: Path, arms: Mapping[str, Arm], seeds: int | Sequence[int] = 6, name: str = NAME
) -> Study:
    """Writes the study to `folder / "runs"` and reads it back."""
    root = folder / "runs" / name
    files = list(_files(arms, _numbers(seeds), name))
    for run in files:
        run_folder = root / run.variant / run.folder_name
        run_folder.mkdir(parents=True)
        (run_folder / "config.yaml").write_text(yaml.safe_dump(run.config, sort_keys=False))
        lines = "".join(json.dumps(line) + "\n" for line in run.lines)
        (run_folder / "metrics.jsonl").write_text(lines)
        if run.record:
            (run_folder / "record.json").write_text(json.dumps(run.record, indent=2))
    (root / SWEEPS).mkdir(parents=True)
    (root / SWEEPS / "00000001.json").write_text(json.dumps(_sweep(files)))
    return collect(folder / "runs", name)


def in_memory(arms: Mapping[str, Arm], seeds: int | Sequence[int] = 6, name: str = NAME) -> Study:
    """The same study without a file."""
    root = Path("runs") / name
    files = list(_files(arms, _numbers(seeds), name))
    runs = []
    for each in files:
        run = Run(
            folder=root / each.variant / each.folder_name,
            variant=each.variant,
            seed=each.seed,
            repeat=each.repeat,
            config=each.config,
            record=each.record,
            baseline=each.baseline,
        )
        # Where a cached property keeps its value.
        run.__dict__["lines"] = each.lines
        runs.append(run)
    return Study(name=name, folder=root, runs=runs, sweeps=[_sweep(files)])


def _numbers(seeds: int | Sequence[int]) -> list[int]:
    return list(range(seeds)) if isinstance(seeds, int) else list(seeds)


def _files(arms: Mapping[str, Arm], seeds: Sequence[int], name: str) -> Iterator[_Files]:
    for key, arm in arms.items():
        reference = arms.get(arm.baseline) if arm.baseline not in (None, key) else None
        baseline = None if reference is None else reference.variant(str(arm.baseline))
        ran = seeds if arm.seeds is None else arm.seeds
        for place, seed in enumerate(ran):
            for repeat in range(arm.repeats):
                index = place * arm.repeats + repeat
                config = _config(arm, key, seed=seed, repeat=repeat, name=name)
                nonfinite = arm.nonfinite_of(index)
                averages = "ema" in arm.options(key)
                lines = _lines(arm, index, nonfinite, averages=averages)
                yield _Files(
                    variant=arm.variant(key),
                    baseline=baseline,
                    seed=seed,
                    repeat=repeat,
                    config=config,
                    record=_record(arm, key, config, index, nonfinite, lines),
                    lines=lines,
                )


def _config(arm: Arm, key: str, *, seed: int, repeat: int, name: str) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    options = arm.options(key)
    config["stability"] = {option: {} for option in options}
    config["recipe"]["max_steps"] = arm.max_steps
    config["choices"] = {
        "attention": arm.attention,
        "ffn": arm.ffn,
        # A list of options has no name of its own.
        "stability": (options or ["none"])[0] if len(options) < 2 else None,
        "model": arm.model,
        "data": "shakespeare",
        "tokenizer": "char",
        "preset": arm.preset,
        "trainer": "auto",
        "tracking": "local",
    }
    config["kinds"] = {"attention": arm.attention, "ffn": arm.ffn.split("_")[0]}
    config |= {"seed": seed, "repeat": repeat, "study": name, "config_hash": "f" * 16}
    for dotted, value in arm.config.items():
        *path, last = dotted.split(".")
        section = config
        for part in path:
            section = section[part]
        section[last] = value
    return config


def _loss_at(arm: Arm, index: int, step: int) -> float:
    """A curve that falls from 4.2 and ends at the arm's loss."""
    end = arm.loss[index // arm.repeats % len(arm.loss)] + 0.001 * (index % arm.repeats)
    return end + (4.2 - end) * (math.exp(-5 * step / arm.max_steps) - math.exp(-5))


def _lines(
    arm: Arm, index: int, nonfinite: Sequence[int], *, averages: bool
) -> list[dict[str, float]]:
    made, recipe = arm.steps_made(), CONFIG["recipe"]
    lines: dict[int, dict[str, float]] = {}
    for step in sorted({1, made, *range(LOG_EVERY, made + 1, LOG_EVERY)}):
        failed = sum(bad <= step for bad in nonfinite)
        lines[step] = {
            "step": step,
            "train/loss": _loss_at(arm, index, step) - 0.05,
            "grad/norm": 0.7 + 0.1 * math.sin(step),
            "grad/clip_frac": 0.2,
            "lr": recipe["learning_rate"],
            "guard/nonfinite_loss": failed,
            "guard/nonfinite_grad": failed,
            "guard/skipped": failed,
            "spike/loss_score": 0.0,
            "spike/grad_score": 0.0,
            "moe/layer_0/max_violation": 0.3,
            "moe/layer_0/bias_mean": -0.357 * step,
            "moe/layer_0/topk_sum_min": math.exp(-0.2 * step),
            "moe/layer_0/picked_logit_min": -0.2 * step,
            "speed/tokens_per_second": arm.tokens_per_second,
        }
        if step in nonfinite:
            del lines[step]["train/loss"], lines[step]["grad/norm"]
    marks = {round(arm.max_steps * k / NUM_VALIDATIONS) for k in range(1, NUM_VALIDATIONS + 1)}
    for step in sorted({made, *(mark for mark in marks if mark <= made)}):
        frac = 0.5 if nonfinite and step >= nonfinite[0] else 0.0
        if step == made and arm.nonfinite_frac is not None:
            frac = arm.nonfinite_frac
        line = lines.setdefault(step, {"step": step})
        line["val/nonfinite_frac"] = frac
        if arm.counts_tokens:
            line["val/nonfinite_tokens"] = frac / 2
        if frac < 1:
            line["val/loss"] = _loss_at(arm, index, step)
        if averages:
            line |= {
                "val_ema/nonfinite_frac": 0.0,
                "val_ema/nonfinite_tokens": 0.0,
                "val_ema/loss": _loss_at(arm, index, step) - 0.02,
            }
    return [lines[step] for step in sorted(lines)]


def _record(
    arm: Arm,
    key: str,
    config: Mapping[str, Any],
    index: int,
    nonfinite: Sequence[int],
    lines: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    if arm.status == "unfinished":
        return {}
    made, recipe = arm.steps_made(), config["recipe"]
    tokens = made * recipe["batch_size"] * recipe["seq_len"] * recipe["accumulate"]
    seconds = tokens / arm.tokens_per_second
    spikes = sorted({*nonfinite, *(s for s in arm.spikes[index % len(arm.spikes)] if s <= made)})
    final = {k: v for k, v in lines[-1].items() if k != "step"}
    validated = [line for line in lines if "val/nonfinite_frac" in line]
    best = min(validated, key=lambda line: (line["val/nonfinite_frac"], line.get("val/loss", 99)))
    outcome = arm.outcome or ("intermittent" if nonfinite else "clean")
    incident = {
        "step": nonfinite[0] if nonfinite else None,
        "module": "model.layers.2.ffn.router",
        "cause": "router underflow",
        "line": "6 of 512 tokens have a top-2 score sum of exactly 0 (0/0)",
    }
    return {
        "schema": 1,
        "status": arm.status,
        "outcome": outcome if arm.status == "finished" else None,
        "study": config["study"],
        "variant": {
            "attention": arm.attention,
            "ffn": arm.ffn,
            "stability": "-".join(arm.options(key)) or "none",
            "model": arm.model,
            "preset": arm.preset,
        },
        "variant_name": arm.variant(key),
        "seed": config["seed"],
        "repeat": config["repeat"],
        "config_hash": config["config_hash"],
        "git_sha": SHA,
        "git_dirty": False,
        "code": "c" * 16,
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu"},
        "device": {"type": "cpu", "name": "cpu", "threads": 1, "cores": 2},
        "vocab_size": 59,
        "params_total": 493_470,
        "params_active": 272_286,
        "steps": made,
        "acts_from": arm.acts_from,
        "own_steps": made - arm.acts_from,
        "tokens": tokens,
        "active_flops": tokens * arm.flops_per_token,
        "wall_seconds": seconds,
        "tokens_per_second": arm.tokens_per_second,
        "derived_from": {"run": "none", "step": arm.acts_from} if arm.acts_from else None,
        "notes": [],
        "final": final,
        "best": {**{k: v for k, v in best.items() if k.startswith("val")}, "step": best["step"]},
        "guard": {
            "nonfinite_loss_steps": len(nonfinite),
            "nonfinite_grad_steps": len(nonfinite),
            "skipped_steps": len(nonfinite),
            "skipped_tail_frac": 0.1 if nonfinite else 0.0,
            "first_nonfinite_step": nonfinite[0] if nonfinite else None,
            "nonfinite_steps": list(nonfinite),
        },
        "spikes": {
            "loss_score": len(spikes) / made,
            "grad_score": len(spikes) / made,
            "first_step": spikes[0] if spikes else None,
            "steps": spikes,
            "norm_over_5_medians": 0,
            "norm_over_100": 0,
            "grad_norm_max": 2.2,
            "grad_norm_max_step": 2,
        },
        "incident": incident if nonfinite else None,
        **arm.record,
    }


def _sweep(files: Sequence[_Files]) -> dict[str, Any]:
    return {
        "sweep_id": "00000001",
        "command": "python -m src.train --multirun stability=...",
        "git_sha": SHA,
        "steps_saved": 0,
        "cells": [
            {
                "variant": run.variant,
                "baseline": run.baseline,
                "seed": run.seed,
                "repeat": run.repeat,
            }
            for run in files
        ],
    }
