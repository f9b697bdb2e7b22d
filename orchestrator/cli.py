"""The command `arriero`: what a person types, and the one place where every command's words stand.

Handlers import what they need when they are called: `--help`, `plan` and `status` never import torch.
Exit codes: 0 success, 1 failure, 2 the user's mistake.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Handler = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    from orchestrator.errors import Failure, UserError

    handler: Handler = args.handler
    try:
        return handler(args)
    except UserError as error:
        print(f"arriero: {error}", file=sys.stderr)
        return 2
    except Failure as error:
        print(f"arriero: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `arriero ... | head`
        sys.stderr.close()
        return 0


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="arriero",
        description="Leads a LLaMA pretraining run from a Hydra configuration to a finished model, "
        "on this machine or under Slurm, and accounts for its energy.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    config = _command(commands, "config", _config, "print the resolved configuration of a run, checked")
    _takes_overrides(config)

    launch = _command(
        commands,
        "launch",
        _launch,
        "train: make the run directory, prepare the data, submit, follow",
        "Trains the run that the overrides describe. Run again, the same command goes on from the newest checkpoint, or says "
        "that the run is finished.\nCtrl-C saves and stops.",
    )
    _takes_overrides(launch)
    return parser


def _command(
    commands: Any, name: str, handler: Handler, summary: str, details: str | None = None
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=details or summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(handler=handler)
    return command


def _takes_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides, such as model=llama_7b optim.lr=1e-4"
    )
    command.add_argument(
        "--config-dir", type=Path, metavar="DIR", help="a folder of your own config groups, beside the package's"
    )


def _takes_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON for programs, with units in the keys")


def _launch(args: argparse.Namespace) -> int:
    from orchestrator import launch, spec

    return launch.launch(spec.compose(args.overrides, args.config_dir), args.overrides)


def _config(args: argparse.Namespace) -> int:
    from orchestrator import spec

    print(spec.to_yaml(spec.compose(args.overrides, args.config_dir)), end="")
    return 0
