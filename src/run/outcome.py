"""The result of a run: its record, samples of its text, and the table shown at its end."""

import dataclasses
import shlex
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, TypeGuard

import torch

from nonfinite.finite_checks import is_invalid
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
        config: the run's configuration.
        run: the trained run.
        folder: the run folder, for its metrics.
        vocab_size: the model's vocabulary size.
        config_hash: hash of the configuration.
        status: finished, killed or failed.
        extras: the plain values that its checkpoints hold: configuration, source of a branch, and
            the versions of the code that trained it, in order.
        metric_lines: the number of lines that the run has written to metrics.jsonl.
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
        "final": _without_observers(final, config),
        "best": _without_observers(run.callbacks.validation.best, config),
        "guard": guard,
        "spikes": run.callbacks.spikes.summary(),
        "alarms": run.callbacks.early.alarms,
        "metric_lines": metric_lines,
        "incident": _incident(run),
    }


def _without_observers(values: Mapping[str, float], config: RunConfig) -> dict[str, float]:
    """The metrics of the run itself: those of its observers belong to the branches."""
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
    """Whether samples can be generated: this needs text and the KV cache of a built-in model."""
    return bool(corpus.tokenizer.token_bytes().any()) and isinstance(model, Transformer)


def save_samples(config: RunConfig, run: Assembly, corpus: Corpus, folder: RunFolder) -> None:
    """Writes samples.md: continuations of the write-up's prompts, also by averaged weights."""
    model = run.task.model
    if not writes_text(model, corpus):
        return
    offered = offered_weights(run.trainer)
    # The averaged weights of observers belong to the branches.
    own = {name: context for name, context in offered.items() if name in config.remedies}
    text = samples_markdown(
        model,
        corpus.tokenizer,
        weights={"raw": nullcontext, **own},
        seed=config.seed,
    )
    # Written to a draft and renamed, because an existing file is never written again.
    draft = folder.path / "samples.part"
    draft.write_text(text, encoding="utf-8")
    draft.replace(folder.path / SAMPLES)


def _marked(metrics: dict[str, float], prefix: str, name: str) -> str:
    """A validation metric, with the share of windows that had no finite loss, if any had none."""
    frac = metrics.get(f"{prefix}/nonfinite_frac", 0.0)
    value = terminal.number(metrics.get(f"{prefix}/{name}"))
    return value if frac == 0 else f"{value} ({frac:.0%} of windows non-finite)"


def show_record(record: dict[str, Any], folder: RunFolder, *, repeat: str) -> None:
    """Prints the final table, a sample if there is one, and what went wrong.

    Args:
        record: the run's record.
        folder: the run folder.
        repeat: the command that reruns an incident, with `{folder}` for the incident's folder.
    """
    final, best = record["final"], record["best"]
    number = terminal.number
    rows = [["training loss (nats per token)", number(final.get("train/loss")), ""]]
    prefixes = sorted(name.partition("/")[0] for name in final if name.endswith("/nonfinite_frac"))
    for prefix in prefixes:
        what = "" if prefix == "val" else f", {prefix.removeprefix('val_')} weights"
        for label, name in (("validation loss", "loss"), ("bits per byte", "bits_per_byte")):
            columns = [_marked(metrics, prefix, name) for metrics in (final, best)]
            rows.append([f"{label}{what}", *columns])
    guard, spikes = record["guard"], record["spikes"]
    rows += [
        ["steps (skipped)", f"{record['steps']:,} ({guard['skipped_steps']:,})", ""],
        ["largest gradient norm", number(spikes["grad_norm_max"]), ""],
        ["parameters (active)", f"{record['params_total']:,} ({record['params_active']:,})", ""],
        ["tokens per second", number(record["tokens_per_second"]), ""],
        ["seconds", number(record["wall_seconds"]), ""],
    ]
    if guard["first_nonfinite_step"] is not None:
        incident = record["incident"]
        cause = "" if incident is None else incident["cause"]
        rows.append(["first non-finite step", number(guard["first_nonfinite_step"]), ""])
        rows.append(["its cause", cause or "not recorded", ""])
    # Early versions could not compile, and did not record it.
    if record.get("compiled"):
        rows.append(["seconds compiling", number(record["first_step_seconds"]), ""])
    name = f"{record['variant_name']}/{folder.path.name}"
    how = record["outcome"] or record["status"]
    variant = record["variant"]
    title = f"{name}: {how} (ffn {variant['ffn']}, preset {variant['preset']})"
    terminal.table(title, ["", "final", "best"], rows)
    samples = folder.path / SAMPLES
    if record["status"] == "finished" and how != "collapsed" and samples.is_file():
        sample = first_sample(samples.read_text(encoding="utf-8", errors="replace"))
        # A model with non-finite logits adds nothing to the prompt.
        if sample != WRITEUP[0]:
            terminal.say(sample)
            terminal.say(f"more samples: {samples}")
    terminal.say(f"run folder: {folder.path}")
    if record["incident"] is not None:
        _show_incident(record["incident"], folder, repeat)
    line = records.verdict(record)
    if line is not None:
        terminal.sentence(line)


def _show_incident(incident: dict[str, Any], folder: RunFolder, repeat: str) -> None:
    """Prints the incident's line, and its page and rerun command if the recorder saved them."""
    place = folder.path / "incidents" / f"step-{incident['step']}"
    terminal.sentence(f"first incident: {incident['line']}")
    if (place / "incident.html").is_file():
        terminal.say(f"its page: {place / 'incident.html'}")
    if (place / "state.pt").is_file():
        terminal.say(f"to rerun it: {repeat.replace('{folder}', shlex.quote(str(place)))}")
