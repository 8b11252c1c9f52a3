"""The command line: ``warpdecode info``, ``warpdecode bench`` and ``warpdecode generate``.

``warpdecode --help`` and a wrong argument answer at once: what a command needs (torch, transformers) is imported when
it runs, and each command declares its own arguments in its own module.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "info": "print what this installation is and which kernels it can run",
    "bench": "measure the kernels on this machine",
    "generate": "sample from a Hugging Face MoE model, resumably; without arguments, from the demo model",
}


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="warpdecode",
        description="Mixture-of-Experts decode kernels.",
        epilog="Exit codes: 0 done, 1 failed with a sentence on stderr, 2 wrong usage, 130 interrupted by Ctrl-C.",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    # Only the chosen command's module is imported. No option of the main parser takes a value, so the command is the
    # first argument that is not an option.
    chosen = next((argument for argument in argv if not argument.startswith("-")), None)
    for name, help_line in COMMANDS.items():
        command = commands.add_parser(name, help=help_line, description=help_line.capitalize() + ".")
        if name == chosen and name != "info":
            importlib.import_module(f"warpdecode.{name}").add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments after the program's name; ``sys.argv``'s by default.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser(argv)
    args = parser.parse_args(argv)
    import warpdecode

    try:
        if args.version:
            print(f"warpdecode {warpdecode.__version__}")
            return 0
        if args.command is None:
            parser.print_help(sys.stderr)
            return 2
        try:
            warpdecode.get_num_threads()
        except ValueError as error:  # an environment variable, which concerns every command
            print(f"warpdecode: {error}", file=sys.stderr)
            return 1
        if args.command == "info":
            print(warpdecode.info())
            return 0
        return importlib.import_module(f"warpdecode.{args.command}").run(args)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
