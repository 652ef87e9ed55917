"""The `ramify` command: generate, convert, env.

Exit code 0: fine. 1: a check failed. 2: a usage or input error, told in one line on stderr; RAMIFY_TRACEBACK=1 shows where it arose.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import ramify

FINE, CHECK_FAILED, USAGE, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141


class UsageError(ValueError):
    """The command line itself is wrong."""


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving the process."""
        raise UsageError(f"{self.prog.removeprefix('ramify ')}: {message}. {self.prog} --help lists what it takes.")


def parser() -> Parser:
    """The parser of the whole command; each subcommand's `run` takes the parsed arguments and returns the exit code."""
    from ramify.cli import convert, env, generate

    root = Parser("ramify", description="Token-parallel decoding of language models.")
    root.add_argument("--version", action="version", version=f"ramify {ramify.__version__}")
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for command in (generate, convert, env):
        command.add_parser(commands)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code."""
    try:
        args = parser().parse_args(argv)
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader went away, as `| head` does: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # one line for a person; RAMIFY_TRACEBACK shows where it came from
        if os.environ.get("RAMIFY_TRACEBACK"):
            raise
        print(f"ramify {_one_line(error)}", file=sys.stderr)
        return USAGE


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
