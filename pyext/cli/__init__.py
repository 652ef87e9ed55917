"""The `ramify` command: generate, convert, env.

Exit code 0: fine. 1: a check failed. 2: a usage or input error, told in one line on stderr; RAMIFY_TRACEBACK=1 shows where it arose.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import NoReturn, TextIO

import ramify

FINE, CHECK_FAILED, USAGE, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141


class UsageError(ValueError):
    """The command line itself is wrong. The message names the command."""


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving the process."""
        raise UsageError(f"{self.prog}: {message}. {self.prog} --help lists what it takes.")


def parser() -> Parser:
    """The parser of the whole command; each subcommand's `run` takes the parsed arguments and returns the exit code."""
    from ramify.cli import convert, env, generate

    root = Parser("ramify", description="Token-parallel decoding of language models.")
    root.add_argument("--version", action="version", version=f"ramify {ramify.__version__}")
    commands = root.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for command in (generate, convert, env):
        command.add_parser(commands)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code."""
    command = "ramify"
    try:
        _prepare_streams()
        args, unknown = parser().parse_known_args(argv)
        if unknown:
            raise UsageError(f"ramify {args.command}: unrecognized arguments: {' '.join(unknown)}. ramify {args.command} --help lists all.")
        command = f"ramify {args.command}"
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader went away, as `| head` does: nobody is left to tell
        _silence(sys.stdout)
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # one line for a person; RAMIFY_TRACEBACK shows where it came from
        if os.environ.get("RAMIFY_TRACEBACK"):
            raise
        try:
            print(_one_line(error, command), file=sys.stderr, flush=True)
        except OSError:
            _silence(sys.stderr)
        return USAGE


def _prepare_streams() -> None:
    """Text goes out whatever the locale: what a stream's encoding lacks is written as an escape. A stream may be closed from the start."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (it stays open)
    if sys.stdout is None:
        raise UsageError("ramify: standard output is closed; takes an open one. Send it to a file, or to /dev/null.")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _silence(stream: TextIO) -> None:
    """What is still to be written goes nowhere, so that the interpreter's own last flush cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _one_line(error: Exception, command: str) -> str:
    """The message of an expected error; of another one, its kind as well. What the system refused is told of the command and the path."""
    if isinstance(error, OSError) and error.strerror:
        path = f"{error.filename}: " if error.filename is not None else ""
        return f"{command}: {path}{error.strerror}."
    text = " ".join(str(error).split())
    if not (text and isinstance(error, (ValueError, TypeError, OSError, ImportError, RuntimeError))):
        text = f"{type(error).__name__}: {text}. RAMIFY_TRACEBACK=1 shows where."
    return text if isinstance(error, UsageError) else f"ramify {text}"
