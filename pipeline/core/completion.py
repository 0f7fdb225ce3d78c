"""What bash needs to complete a command line: commands, their keys, and the choices of groups, written out.

Nothing of this program runs when Tab is pressed.
"""

from collections.abc import Mapping, Sequence

from pipeline.core.groups import config_groups, defaults
from pipeline.core.trees import dotted_keys

_SCRIPT = r"""# bash completion of squeezewire; made by: squeezewire completion bash
_squeezewire() {
    local line=${COMP_LINE:0:COMP_POINT} words
    local current=${line##*[[:space:]]}
    case ${COMP_WORDS[1]-} in
CASES
    *) words='COMMANDS' ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
    if [[ $current == *=* ]]; then
        # No choices: a path. What stands before the last `=` is no part of the word to readline.
        if [ ${#COMPREPLY[@]} -eq 0 ]; then
            mapfile -t COMPREPLY < <(compgen -f -- "${current#*=}")
        elif [[ $COMP_WORDBREAKS == *=* ]]; then
            COMPREPLY=("${COMPREPLY[@]#"${current%%=*}="}")
        fi
    fi
    if [[ ${COMPREPLY[0]-} == *= ]]; then compopt -o nospace 2> /dev/null; fi
}
complete -F _squeezewire squeezewire"""


def bash_script(configurations: Mapping[str, str], others: Sequence[str]) -> str:
    """Return the script.

    Args:
        configurations: By command, the name of its file in conf/.
        others: Commands without one.
    """
    cases = [
        f"    {command}) words='{' '.join([*words_of(configuration), '--help', '--cfg', '--multirun'])}' ;;"
        for command, configuration in configurations.items()
    ]
    commands = " ".join([*configurations, *others, "--help", "--version"])
    return _SCRIPT.replace("CASES", "\n".join(cases)).replace("COMMANDS", commands)


def words_of(command: str) -> list[str]:
    """Return what a command line may hold, for a shell to complete: `model=NAME` of groups, `KEY=` of keys."""
    keys = set(dotted_keys(defaults(command)))
    groups = {group: choices for group, choices in config_groups().items() if group in keys}
    of_groups = [f"{group}={choice}" for group, choices in groups.items() for choice in choices]
    return [*of_groups, *sorted(f"{key}=" for key in keys - groups.keys())]
