"""Command-line errors that name the unknown key and the one it was probably meant to be."""

import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

# How jsonargparse says that a class, the command line, a command or a dataclass has no such key.
_UNKNOWN_KEY = re.compile(
    r"Option '(?P<a>[^']+)' is not accepted|unrecognized arguments: --(?P<b>[^\s=]+)|"
    r"(?:Subcommand|Group) '[^']+' does not accept option '(?P<c>[^']+)'"
)
_OUR_WORDS = re.compile(r"unknown key `[^`]*`\.(?: Did you mean `[^`]*`\?| `--help` lists the keys\.)")
# What it adds for each type of a union that a value might have had, and the value again.
_NOISE = re.compile(
    r"Does not validate|Subtypes:|Errors:$|- Expected a <class 'NoneType'>|Given value|Problem with given"
)


class Parser(LightningArgumentParser):
    """LightningCLI's parser with short errors: no usage of three hundred lines, and a proposal for a misspelt key.

    jsonargparse makes a parser of this class for every `class_path` too, so the proposal comes from the keys of the
    class that was given the unknown one.
    """

    def add_function_arguments(self, function: Any, *args: Any, linked_targets: Any = None, **options: Any) -> Any:
        # jsonargparse 4.53 hands the linked arguments of a class on to functions inside it, which take none.
        return super().add_function_arguments(function, *args, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        message = explain(message, [word.removeprefix("--") for word in parser._option_string_actions])
        if not self.exit_on_error:
            super().error(message, ex)
        print(f"{parser.prog.replace(' [options]', '')}: error: {message}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2)


def explain(message: str, options: Sequence[str]) -> str:
    """Say which key is unknown, if that is the error, and otherwise cut a jsonargparse message to its substance.

    Args:
        message: The parser's words, or words that this function returned for a class inside the configuration.
        options: The keys that the parser knows.
    """
    if ours := _OUR_WORDS.search(message):
        return ours[0]
    if not (match := _UNKNOWN_KEY.search(message)):
        return " ".join(line.strip() for line in message.splitlines() if line.strip() and not _NOISE.search(line))
    key = next(word for word in match.groups() if word)
    first, _, rest = key.partition(".")
    # The whole key, its first part (`modle.x`), its last part (a dataclass's field); the best of them.
    last = {option.rpartition(".")[2]: option for option in options}
    near = (
        get_close_matches(key, options, n=1, cutoff=0.8)
        or (get_close_matches(first, options, n=1) if rest else [])
        or [last[name] for name in get_close_matches(key, last, n=1)]
    )
    return f"unknown key `{key}`." + (f" Did you mean `{near[0]}`?" if near else " `--help` lists the keys.")


def constructor_error(message: str) -> str:
    """Return what the constructor of a class said, of what jsonargparse made of it; other messages stay."""
    if "Does not validate" not in message:
        return message
    return explain(message, []).removeprefix("- ")
