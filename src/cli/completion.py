"""Completion of fields and options in a shell: --shell-completion install=bash."""

from collections.abc import Mapping
from typing import Any

from src.cli.flags import SWITCHES, VALUED
from src.cli.name_checks import SWEEP_FIELDS, SWEEP_SWITCHES
from src.common import terminal
from src.common.errors import InputError
from src.common.override_grammar import GROUPS
from src.config.field_names import COMPOSED, fields_of, names_in
from src.config.hydra_compose import option_names

SHELLS = ("bash", "zsh")

FUNCTION = "_smoldeepseek_complete"

SCRIPT = f"""
{FUNCTION}() {{
  local line=${{COMP_LINE:0:COMP_POINT}} module word found
  [[ $line =~ -m[[:space:]]+(src\\.[a-z]+)[[:space:]] ]] || return
  module=${{BASH_REMATCH[1]}} word=${{line##* }}
  found=$("${{COMP_WORDS[0]}}" -m "$module" --shell-completion "query=$word" 2>/dev/null) || return
  COMPREPLY=($found)
  # The shell completes what follows the last = alone.
  [[ $word == *=* ]] && COMPREPLY=("${{COMPREPLY[@]#"${{word%"${{word##*=}}"}}"}}")
}}
complete -o default -o nospace -F {FUNCTION} python python3
"""
"""Completes `python -m src.<command> ...`; every other command of Python keeps file names."""


def complete(request: str, config_name: str) -> int:
    """Answers --shell-completion; returns the exit code.

    Args:
        request: install=bash prints what `eval` needs, uninstall=bash what takes it back, and
            query=WORD what WORD can become.
        config_name: the command's file in conf/.
    """
    what, _, value = request.partition("=")
    if what == "query":
        terminal.say("\n".join(candidates(value, config_name)))
        return 0
    if what not in ("install", "uninstall") or value not in SHELLS:
        raise InputError(
            f'--shell-completion {request}: type eval "$(python -m src.{config_name}'
            ' --shell-completion install=bash)", or install=zsh'
        )
    before = "autoload -U +X bashcompinit && bashcompinit\n" if value == "zsh" else ""
    undo = f"complete -r python python3; unset -f {FUNCTION}"
    terminal.say(before + SCRIPT.strip() if what == "install" else undo)
    return 0


def candidates(word: str, config_name: str) -> list[str]:
    """Everything that a word of a command line can become."""
    of_a_run = config_name in COMPOSED
    fields = fields_of(config_name, [])
    key, equals, _ = word.partition("=")
    if word.startswith("-"):
        found = [flag for flag in (*SWITCHES, *VALUED) if flag.startswith("--")]
    elif not equals:
        names = names_in(config_name, fields)
        sections = [name for name in names if isinstance(_value(fields, name), dict)]
        found = [f"{name}=" for name in names if name in GROUPS or name not in sections]
        found += [f"{name}=" for name in SWEEP_FIELDS] if config_name == "train" else []
    elif of_a_run and key in (*GROUPS, "experiment", "hydra/launcher"):
        found = [f"{key}={option}" for option in option_names(key)]
    else:
        is_switch = isinstance(_value(fields, key), bool) or key in SWEEP_SWITCHES
        found = [f"{key}=true", f"{key}=false"] if is_switch else []
    return sorted(name for name in dict.fromkeys(found) if name.startswith(word))


def _value(fields: Mapping[str, Any], name: str) -> Any:
    """The value of a dotted field; None if it has none."""
    inner: Any = fields
    for part in name.split("."):
        inner = inner.get(part) if isinstance(inner, Mapping) else None
    return inner
