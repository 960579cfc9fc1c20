"""Paragraphs of docs/configuration.md that depend on no field."""

INTRO = """\
This page lists every field of every command. Type a field as `field=value`, in any order:

    python -m src.train attention=gqa recipe.learning_rate=1e-3 recipe.max_steps=200

An unknown field or a wrong value ends the command with exit code 2 and one line, which names the
field, the value and what is allowed.

Four flags look at a configuration without training: `--cfg job` prints it with all values filled
in, `--info` lists all options and folders, `--help` explains the command, and `plan=true` adds size
and cost. The Tab key completes fields and options after

    eval "$(python -m src.train --shell-completion install=bash)"

`--config-dir FOLDER` adds options, presets and experiments of your own from a folder that is laid
out like `conf/`. The file of a preset begins with the line `# @package _global_`. An option of
attention, ffn, model, data or tokenizer begins with the same `defaults` as the files in `conf/`. A
file in `stability/` sets fields of remedies below their names, such as `clip03: {{norm: 0.1}}`;
what differs from the remedy's default becomes part of the run folder's name, as if typed.

<contents>

## Where a value comes from

1. `conf/base.yaml` and the file of each chosen option, such as `conf/model/proxy.yaml`, hold the
   defaults.
2. A preset, such as `conf/preset/smoke.yaml`, overrides them. It may set any field except `init`.
3. What you type on the command line overrides both.
4. A remedy may set fields outside its own section. Typing such a field together with the remedy is
   an error, and so are two remedies that set the same field.

The tables show the values of the default configuration:

    {defaults}

"Presets" and "options" in a table name those that set another value; "remedies" names the remedies
that set the field.

## Hash, name and branches

Every run has a hash. Two runs with the same hash give the same numbers, so a finished run is not
trained again. The run folder's name, `runs/<study>/<name>/seed-<n>`, shows the chosen options and
the typed values. The line above each table says whether its fields are part of the hash and the
name; a field that differs says so in the table. [Branches](sweeps.md#branches) start from the saved
state of another run: they inherit the values that were typed for it, and some fields must be the
same.
"""

OPTIONS = """\
Each option is a file in `conf/`. Remedies, the options of `stability`, have a [section of their
own](#remedies-stability)."""
