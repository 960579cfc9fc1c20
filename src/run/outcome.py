"""What a run has come to: its record, a sample of its text, the table at its end."""

import dataclasses
import shlex
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, TypeGuard

import torch

from nonfinite.tracer import is_invalid
from src.common import record as records
from src.common import terminal
from src.common.environment import device_facts, git_facts, versions
from src.common.run_folder import RunFolder, read_metrics
from src.config.run_config import RunConfig
from src.data import Corpus
from src.generation.prompts import WRITEUP
from src.generation.samples import first_sample, samples_markdown
from src.model import Transformer
from src.run.assemble import Assembly
from src.tracking.labels import is_measured_by
from src.training.validation import offered_weights

SAMPLES = "samples.md"


def build_record(
    config: RunConfig,
    run: Assembly,
    folder: RunFolder,
    *,
    vocab_size: int,
    config_hash: str,
    status: str,
    extras: Mapping[str, Any],
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
        extras: what its checkpoints carry: the configuration, where it began, and by what code it
            was trained, in order.
        metric_lines: that the run has written to metrics.jsonl.
    """
    recipe = config.recipe
    steps = run.trainer.global_step
    tokens = steps * recipe.tokens_per_step
    seconds = run.callbacks.metrics.train_seconds
    guard = run.callbacks.guard.summary()
    size = config.architecture.measure(vocab_size=vocab_size)
    derived_from = extras["derived_from"]
    final = records.final_values(read_metrics(folder.metrics), run.callbacks.validation.last)
    return {
        "schema": records.SCHEMA,
        "status": status,
        "outcome": _outcome(run, guard) if status == "finished" else None,
        "study": config.study,
        "variant": dataclasses.asdict(config.variant),
        "variant_name": config.variant_name,
        "seed": config.seed,
        "repeat": config.repeat,
        "config_hash": config_hash,
        **git_facts(),
        "code": "+".join(code for code, _ in extras["origins"]),
        "versions": versions(),
        "device": device_facts(torch.device(config.trainer.device_type)),
        "vocab_size": size.vocab_size,
        "params_total": size.params_total,
        "params_active": size.params_active,
        "cache_bytes_per_token": size.cache_bytes_per_token,
        "steps": steps,
        "tokens": tokens,
        "wall_seconds": run.callbacks.metrics.wall_seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        "compiled": config.compile,
        "first_step_seconds": run.callbacks.metrics.first_step_seconds,
        "init": extras["config"]["init"],
        "derived_from": derived_from,
        "own_steps": steps - (0 if derived_from is None else derived_from["step"]),
        "acts_from": config.start_step,
        "roles": {name: remedy.roles() for name, remedy in config.remedies.items()},
        "active_flops": tokens * size.flops_per_token,
        "notes": config.notes,
        "final": _own(final, config),
        "best": _own(run.callbacks.validation.best, config),
        "guard": guard,
        "spikes": run.callbacks.spikes.summary(),
        "alarms": run.callbacks.early.alarms,
        "metric_lines": metric_lines,
        "incident": _incident(run),
    }


def _own(values: Mapping[str, float], config: RunConfig) -> dict[str, float]:
    """Without what an observer has measured: it is carried for other runs and is not this one's."""
    return {k: v for k, v in values.items() if not is_measured_by(k, config.observers)}


def _outcome(run: Assembly, guard: dict[str, Any]) -> str:
    spoilt = any(is_invalid(parameter) for parameter in run.task.model.parameters())
    return records.outcome(
        guard=guard,
        stopped=run.callbacks.guard.stopped,
        weights_finite=not spoilt,
        val=run.callbacks.validation.last["val/nonfinite_frac"],
    )


def _incident(run: Assembly) -> dict[str, Any] | None:
    incident = None if run.callbacks.incidents is None else run.callbacks.incidents.incident
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


def verdict(record: dict[str, Any]) -> str | None:
    """One line on a run that was not clean, with the cause; None for one that was."""
    guard, incident = record["guard"], record["incident"]
    if guard["first_nonfinite_step"] is None:
        if record["outcome"] != "stopped":
            return None
        return f"stopped by an early warning: {record['alarms'][0]['line']}"
    begin = record["steps"] - record["own_steps"]
    # A step that ends the run by an error is not among those that were made.
    steps = max(record["steps"], *guard["nonfinite_steps"])
    # A branch has its source's steps, too.
    bad = [step for step in guard["nonfinite_steps"] if step > begin]
    what = "loss" if guard["nonfinite_loss_steps"] else "gradients"
    why = "" if incident is None else f": {incident['cause']}"
    if bad and len(bad) == steps - begin:
        how = "skipped" if guard["skipped_steps"] >= len(bad) else "not finite"
        whole = "the only step was" if len(bad) == 1 else f"all {len(bad):,} steps were"
        return f"nothing was learnt: {whole} {how} (non-finite {what} from step {bad[0]}{why})"
    first = guard["first_nonfinite_step"] if incident is None else incident["step"]
    return (
        f"{record['outcome'] or record['status']}: {len(guard['nonfinite_steps']):,} of"
        f" {steps:,} steps were not finite, the first at step {first}{why}"
    )


def show_record(record: dict[str, Any], folder: RunFolder, *, repeat: str) -> None:
    """The final table, a sample where there is one, and what went wrong.

    Args:
        record: of the run.
        folder: of the run.
        repeat: the command that runs an incident again, with `{folder}` for the incident's.
    """
    final, best = record["final"], record["best"]
    number = terminal.number
    rows = [["training loss (nats a token)", number(final.get("train/loss")), ""]]
    prefixes = sorted(name.partition("/")[0] for name in final if name.endswith("/nonfinite_frac"))
    for prefix in prefixes:
        what = "" if prefix == "val" else f", {prefix.removeprefix('val_')} weights"
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
    if guard["first_nonfinite_step"] is not None:
        incident = record["incident"]
        cause = "" if incident is None else incident["cause"]
        rows.append(["first non-finite step", number(guard["first_nonfinite_step"]), ""])
        rows.append(["its cause", cause or "not recorded", ""])
    # Records of before there was the choice say nothing.
    if record.get("compiled"):
        rows.append(["of these compiling", number(record["first_step_seconds"]), ""])
    name = f"{record['variant_name']}/{folder.path.name}"
    how = record["outcome"] or record["status"]
    variant = record["variant"]
    title = f"{name}: {how} (ffn {variant['ffn']}, preset {variant['preset']})"
    terminal.table(title, ["", "final", "best"], rows)
    samples = folder.path / SAMPLES
    if record["status"] == "finished" and how != "collapsed" and samples.is_file():
        sample = first_sample(samples.read_text(encoding="utf-8", errors="replace"))
        # A model whose logits are not finite has added nothing to the prompt.
        if sample != WRITEUP[0]:
            terminal.say(sample)
            terminal.say(f"more of its text: {samples}")
    terminal.say(f"run folder: {folder.path}")
    if record["incident"] is not None:
        _show_incident(record["incident"], folder, repeat)
    line = verdict(record)
    if line is not None:
        terminal.sentence(line)


def _show_incident(incident: dict[str, Any], folder: RunFolder, repeat: str) -> None:
    """What failed first, its page and its command, as far as the recorder wrote them."""
    place = folder.path / "incidents" / f"step-{incident['step']}"
    terminal.sentence(f"first incident: {incident['line']}")
    if (place / "incident.html").is_file():
        terminal.say(f"its page: {place / 'incident.html'}")
    if (place / "state.pt").is_file():
        terminal.say(f"to run it again: {repeat.replace('{folder}', shlex.quote(str(place)))}")
