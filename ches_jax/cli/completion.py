"""Shell completion: verbs, their options, the values of closed lists, and file names everywhere else."""

from collections.abc import Mapping
from typing import Any

from ches_jax.cli.options import options_of

SHELLS = ("bash", "zsh", "fish")


def script(shell: str, commands: Mapping[str, type[Any]]) -> str:
    """A script that the shell reads: ``eval "$(ches completion bash)"``.

    Args:
      shell: one of ``SHELLS``. zsh reads the script of bash through its own ``bashcompinit``.
      commands: verb -> its options.
    """
    if shell == "fish":
        return _fish(commands)
    return (_ZSH if shell == "zsh" else "") + _bash(commands)


_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def _bash(commands: Mapping[str, type[Any]]) -> str:
    cases = []
    for verb, command in commands.items():
        options = options_of(verb, command)
        flags = " ".join(flag for option in options for flag in option.flags)
        cases.append(f"    {verb}) words='{flags} --help' ;;")
        for option in options:
            if option.choices and option.flags:
                cases.append(f"    {verb}\\ --{option.name}) words='{' '.join(option.choices)}' ;;")
    return f"""_ches() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} verb=${{COMP_WORDS[1]}} words=
  if [ "$COMP_CWORD" = 1 ]; then
    words='{" ".join(commands)} --help --version'
  else
    local of=$verb
    case "$before" in --*) of="$verb $before" ;; esac
    case "$word" in -*) of=$verb ;; esac
    case "$of" in
{chr(10).join(cases)}
    esac
    case "$word$of" in -*|*\\ *) ;; *) words= ;; esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -o bashdefault -F _ches ches
"""


def _fish(commands: Mapping[str, type[Any]]) -> str:
    lines = [f"complete -c ches -n __fish_use_subcommand -f -a '{verb}'" for verb in commands]
    for verb, command in commands.items():
        for option in options_of(verb, command):
            for flag in option.flags:
                values = f" -x -a '{' '.join(option.choices)}'" if option.choices else "" if option.switch else " -r"
                lines.append(f"complete -c ches -n '__fish_seen_subcommand_from {verb}' -l {flag[2:]}{values}")
    return "\n".join(lines) + "\n"
