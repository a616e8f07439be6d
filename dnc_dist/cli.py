"""The command line: finds the command, imports it only when it is called, and turns exceptions into exit codes.

Exit codes: 0 done, 1 failed while running, 2 wrong input (one message, no traceback), 75 stopped on request and resumable.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import click

from dnc_dist import __version__
from dnc_dist.base.errors import EXIT_FAILED, EXIT_INPUT, EXIT_STOPPED, InputError, RunError, Stopped, exit_code, explain
from dnc_dist.base.output import end_quietly, open_streams, reader_left, unheard

# Name of the command -> its line in --help. The command is the object of that name in dnc_dist/commands/NAME.py.
COMMANDS = {
    "launch": "Train on one machine or several, one worker per GPU.",
    "train": "Run one worker; launch, torchrun and srun start it.",
    "data": "Prepare datasets and look at them.",
    "init": "Write a commented configuration for a prepared data set.",
    "evaluate": "Measure retrieval of a trained run.",
    "embed": "Write the embeddings of many images to a file.",
    "index": "Build an index of embeddings for search.",
    "search": "Find the images of an index that are nearest to given ones.",
    "export": "Write the model alone, with a model card; also as ONNX.",
    "compare": "Show runs side by side, seeds as mean and deviation.",
    "report": "Write a run's report, one self-contained HTML file.",
    "doctor": "Check this machine: environment, data, network, parity.",
    "config": "Print the resolved configuration, or all keys.",
}


class LazyGroup(click.Group):
    """A group that imports a command when it is called, so that --help and config need neither torch nor DeepSpeed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now; None if there is none."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"dnc_dist.commands.{cmd_name}"), cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. A pipe that breaks ends it without a word, as click does it, only if it is that of our reader."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            if reader_left():
                raise
            # Whatever `explain` is told to leave as it is: click would take it for our reader's.
            explained = explain(error)
            raise (RunError(str(error)) if explained is error else explained) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands of the help without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dnc-dist")
def cli() -> None:
    """Divide-and-Conquer deep metric learning on one process or many."""


def run(args: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; commands return an exit code, or nothing for 0.

    Raises:
        Exception: a bug; Python prints the traceback and exits with 1.
    """
    # Progress and messages need no reader; a result that cannot be written is an error.
    with unheard(results=False):
        return _run(args)


def _run(args: Sequence[str] | None) -> int:
    try:
        result = cli.main(args=None if args is None else list(args), prog_name="dnc-dist", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.Abort:
        print("interrupted", file=sys.stderr)
        return EXIT_FAILED
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return EXIT_INPUT
    except click.ClickException as error:
        print(f"error: {error.format_message()}", file=sys.stderr)
        if isinstance(error, click.UsageError) and error.ctx is not None:
            print(f"see `{error.ctx.command_path} --help`", file=sys.stderr)
        return EXIT_INPUT
    except Stopped as error:
        print(f"stopped: {error}" if str(error) else "stopped", file=sys.stderr)
        return EXIT_STOPPED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and reader_left():
            return EXIT_FAILED  # nothing to say: who reads our output wants no more of it
        explained = explain(error)
        if not isinstance(explained, InputError | RunError):
            raise
        end_quietly()
        print(f"error: {explained}", file=sys.stderr)
        return exit_code(explained)


def main() -> None:
    """Entry point of the console script and of ``python -m dnc_dist``."""
    open_streams()
    sys.exit(run())
