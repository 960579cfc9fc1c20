"""What a run has come to: its record, a sample of its text, the table at its end."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, TypeGuard

import torch

from src import terminal
from src.config import RunConfig
from src.data import Corpus
from src.generation.samples import first_sample, samples_markdown
from src.model import Transformer
from src.run.assemble import Assembly
from src.tracking import record as records
from src.tracking.facts import device_facts, git_facts, versions
from src.tracking.folder import RunFolder, read_metrics
from src.tracking.labels import variant_of
from src.training.validate import offered_weights
from src.watch.trace import is_spoilt

SAMPLES = "samples.md"


def build_record(
    config: RunConfig,
    run: Assembly,
    folder: RunFolder,
    *,
    vocab_size: int,
    config_hash: str,
    status: str,
    derived_from: dict[str, Any] | None,
    origins: Sequence[Sequence[str]],
    metric_lines: int,
) -> dict[str, Any]:
    """The content of record.json.

    Args:
        config: of the run.
        run: what was trained.
        folder: where its metrics lie.
        vocab_size: tokens that its model knows.
        config_hash: of the configuration.
        status: how it ended.
        derived_from: the record's entry of this name.
        origins: by what code it was trained, in order.
        metric_lines: that the run has written to metrics.jsonl.
    """
    recipe = config.recipe
    steps = run.trainer.global_step
    tokens = steps * recipe.tokens_per_step
    seconds = run.metrics.train_seconds
    guard = run.guard.summary()
    size = config.architecture.measure(vocab_size=vocab_size)
    return {
        "schema": records.SCHEMA,
        "status": status,
        "outcome": _outcome(run, guard) if status == "finished" else None,
        "study": config.study,
        "variant": variant_of(config.plain()),
        "variant_name": config.variant_name,
        "seed": config.seed,
        "repeat": config.repeat,
        "config_hash": config_hash,
        **git_facts(),
        "code": "+".join(code for code, _ in origins),
        "versions": versions(),
        "device": device_facts(torch.device(config.trainer.device_type)),
        "vocab_size": size.vocab_size,
        "params_total": size.params_total,
        "params_active": size.params_active,
        "cache_bytes_per_token": size.cache_bytes_per_token,
        "steps": steps,
        "tokens": tokens,
        "wall_seconds": run.metrics.wall_seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        "compiled": config.compile,
        "first_step_seconds": run.metrics.first_step_seconds,
        "init": config.plain()["init"],
        "derived_from": derived_from,
        "own_steps": steps - (0 if derived_from is None else derived_from["step"]),
        "acts_from": config.acts_from,
        "active_flops": tokens * size.flops_per_token,
        "notes": config.notes,
        "final": records.final_values(read_metrics(folder.metrics), run.validation.last),
        "best": run.validation.best,
        "guard": guard,
        "spikes": run.spikes.summary(),
        "alarms": run.early.alarms,
        "metric_lines": metric_lines,
        "incident": _incident(run),
    }


def _outcome(run: Assembly, guard: dict[str, Any]) -> str:
    spoilt = any(is_spoilt(parameter) for parameter in run.task.model.parameters())
    return records.outcome(
        guard=guard,
        stopped=run.guard.stopped,
        weights_finite=not spoilt,
        val=run.validation.last["val/nonfinite_frac"],
    )


def _incident(run: Assembly) -> dict[str, Any] | None:
    incident = None if run.incidents is None else run.incidents.incident
    if incident is None:
        return None
    return {name: incident[name] for name in ("step", "module", "cause", "line")}


def writes_text(model: Any, corpus: Corpus) -> TypeGuard[Transformer]:
    """Whether a model has samples: text takes a cache, which only our models have."""
    return bool(corpus.tokenizer.token_bytes().any()) and isinstance(model, Transformer)


def save_samples(config: RunConfig, run: Assembly, corpus: Corpus, folder: RunFolder) -> None:
    """Writes samples.md: the write-up's prompts continued, by averaged weights too."""
    model = run.task.model
    if not writes_text(model, corpus):
        return
    offered = offered_weights(run.trainer)
    # Those that are only looked on for others are no part of this run.
    own = {name: context for name, context in offered.items() if name in config.remedies}
    text = samples_markdown(
        model,
        corpus.tokenizer,
        weights={"raw": nullcontext, **own},
        seed=config.seed,
    )
    # Whole or not at all: what is there is never made again.
    draft = folder.path / "samples.part"
    draft.write_text(text, encoding="utf-8")
    draft.replace(folder.path / SAMPLES)


def _marked(figures: dict[str, float], prefix: str, name: str) -> str:
    """A validation figure, marked where windows without a finite loss stand behind it."""
    frac = figures.get(f"{prefix}/nonfinite_frac", 0.0)
    value = terminal.number(figures.get(f"{prefix}/{name}"))
    return value if frac == 0 else f"{value} ({frac:.0%} of windows non-finite)"


def show_record(record: dict[str, Any], folder: RunFolder) -> None:
    """The final table and a sample."""
    final, best = record["final"], record["best"]
    number = terminal.number
    rows = [["training loss (nats a token)", number(final.get("train/loss")), ""]]
    for prefix, what in (("val", ""), ("val_ema", ", averaged weights")):
        if f"{prefix}/nonfinite_frac" in final:
            for label, name in (("validation loss", "loss"), ("bits a byte", "bits_per_byte")):
                columns = [_marked(figures, prefix, name) for figures in (final, best)]
                rows.append([f"{label}{what}", *columns])
    guard, spikes = record["guard"], record["spikes"]
    rows += [
        ["steps (skipped)", f"{record['steps']:,} ({guard['skipped_steps']:,})", ""],
        ["greatest gradient norm", number(spikes["grad_norm_max"]), ""],
        ["parameters (active)", f"{record['params_total']:,} ({record['params_active']:,})", ""],
        ["tokens a second", number(record["tokens_per_second"]), ""],
        ["seconds", number(record["wall_seconds"]), ""],
    ]
    # Records of before there was the choice say nothing.
    if record.get("compiled"):
        rows.append(["of these compiling", number(record["first_step_seconds"]), ""])
    name = f"{record['variant_name']}/{folder.path.name}"
    how = record["outcome"] or record["status"]
    variant = record["variant"]
    title = f"{name}: {how} (ffn {variant['ffn']}, preset {variant['preset']})"
    terminal.table(title, ["", "final", "best"], rows)
    samples = folder.path / SAMPLES
    if record["status"] == "finished" and samples.is_file():
        terminal.say(first_sample(samples.read_text(encoding="utf-8", errors="replace")))
        terminal.say(f"more of its text: {samples}")
    for note in record["notes"]:
        terminal.warn(note)
    terminal.say(f"run folder: {folder.path}")
