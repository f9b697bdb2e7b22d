"""The command `arriero`: what a person types, and the one place where every command's words stand.

Handlers import what they need when they are called: `--help`, `plan` and `status` never import torch.
Exit codes: 0 success, 1 failure, 2 the user's mistake, 130 Ctrl-C.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Handler = Callable[[argparse.Namespace], int]
_OF_RANKS = ("energy-sample", "wandb-mirror")


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = _parser_of_ranks() if words and words[0] in _OF_RANKS else _parser()
    args, rest = parser.parse_known_args(words)
    if rest:  # words on both sides of an option, which argparse does not put together
        many = next((n for n in ("overrides", "runs") if isinstance(getattr(args, n, None), list)), None)
        if many is None or any(word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        setattr(args, many, [*getattr(args, many), *rest])
    from orchestrator.errors import Failure, UserError
    from slurm.request import CannotSubmit
    from slurm.virtual import ClusterError

    handler: Handler = args.handler
    try:
        return handler(args)
    except (UserError, ClusterError) as error:
        print(f"arriero: {error}", file=sys.stderr)
        return 2
    except (Failure, CannotSubmit) as error:
        print(f"arriero: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `arriero ... | head`
        sys.stderr.close()
        return 0
    except OSError as error:  # a disk, a permission, a store
        print(f"arriero: {f'{error.filename}: {error.strerror}' if error.filename else error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("arriero: stopped by Ctrl-C", file=sys.stderr)
        return 130


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="arriero",
        description="Leads a LLaMA pretraining run from a Hydra configuration to a finished model, "
        "on this machine or under Slurm, and accounts for its energy.",
        epilog="Exit codes: 0 success (a stop that saved, too), 1 failure, 2 your mistake, 130 Ctrl-C.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    config = _command(commands, "config", _config, "print the resolved configuration of a run, checked")
    _takes_overrides(config)

    plan = _command(
        commands,
        "plan",
        _plan,
        "forecast a run: memory, speed, days, failures, energy, carbon, cost",
        "What the run that the overrides describe will take, before anything is submitted. layout=auto chooses the layout.\n"
        "Example: arriero plan experiment=llama_65b carbon.zone=FRA",
    )
    _takes_overrides(plan)
    plan.add_argument(
        "--dry-run",
        action="store_true",
        help="build every rank shape with the trainer's own code, without values, and tell its memory beside the plan's "
        "(65B on 2,048 GPUs: under a minute of CPU for each shape of rank)",
    )
    _takes_json(plan)

    simulate = _command(
        commands,
        "simulate",
        _simulate,
        "live a run many times under failures: ETTR, the best checkpoint interval, what spares buy",
        "Failures of nodes and racks, failed restarts, spares and waits for nodes, at the rates of the group plan (plan.*).\n"
        "Example: arriero simulate experiment=llama_65b cluster.spare_nodes=4 --picture ettr.svg",
    )
    _takes_overrides(simulate)
    simulate.add_argument("--seeds", type=int, default=1000, help="lives (default 1000)")
    simulate.add_argument("--picture", type=Path, metavar="FILE", help="write ETTR by checkpoint interval (SVG)")
    _takes_json(simulate)

    launch = _command(
        commands,
        "launch",
        _launch,
        "train: make the run directory, prepare the data, submit, follow",
        "Trains the run that the overrides describe. Run again, the same command goes on from the newest checkpoint, or says "
        "that the run is finished.\nCtrl-C saves and stops.",
    )
    _takes_overrides(launch)
    launch.add_argument(
        "-m",
        "--multirun",
        action="store_true",
        help="a sweep, in Hydra's grammar: model=nano,tiny optim.lr=1e-3,3e-4 steps=range(100,400,100); the same command again "
        "runs what is missing or failed",
    )
    launch.add_argument("--limit-parallel", type=int, default=None, metavar="N", help="of a sweep, points at one time")
    launch.add_argument("--wait", action="store_true", help="of a sweep on Slurm, come back when all points have ended")
    launch.add_argument(
        "--halving",
        type=int,
        metavar="STEP",
        help="of a sweep, successive halving: after STEP steps the better half goes on to twice as many, and so on",
    )

    launch.add_argument("--dry-run", action="store_true", help="print the sbatch script, and submit nothing")

    rehearse = _command(
        commands,
        "rehearse",
        _rehearse,
        "run the job that launch would submit on a virtual cluster, with a requeue, a preemption and a lost node",
    )
    _takes_overrides(rehearse)
    _takes_json(rehearse)
    chaos = _command(
        commands,
        "chaos",
        _chaos,
        "do faults on purpose to small runs, and print what came of each",
        "Each fault is done to a small real run on this machine, under a virtual Slurm, or on an S3 server on loopback: was it\n"
        "seen, did the run go on, what did it cost, is the loss that of a run without it. docs/chaos.md lists them.",
    )
    chaos.add_argument("faults", nargs="*", metavar="FAULT", help="such as sigkill_rank_0 (default: all)")
    chaos.add_argument(
        "--random", type=int, metavar="N", help="instead: N random kills, run after run, and their account"
    )
    chaos.add_argument("--seed", type=int, default=1, help="draws what is random (default 1)")
    chaos.add_argument("--parallel", type=int, default=2, help="scenes at one time (default 2)")
    chaos.add_argument("--directory", type=Path, metavar="DIR", help="keep the runs here (default: only if one fails)")
    _takes_json(chaos)
    resume = _command(commands, "resume", _resume, "go on with a run as its directory says, from its newest checkpoint")
    resume.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    cancel = _command(commands, "cancel", _cancel, "stop a run, saved; `resume` goes on with it")
    cancel.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    status = _command(commands, "status", _status, "where a run stands, or all of them")
    status.add_argument("runs", nargs="*", metavar="RUN", help="run directories (default: all below runs)")
    _takes_json(status)
    runs = _command(commands, "runs", _runs, "every run below a folder: state, step, loss, speed, starts")
    runs.add_argument("folder", nargs="?", type=Path, default=Path("runs"), help="default: runs")
    _takes_json(runs)
    logs = _command(commands, "logs", _logs, "what the ranks print, errors first")
    logs.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    which = logs.add_mutually_exclusive_group()
    which.add_argument("--rank", type=int, help="of one rank (default: errors of all, the last lines of rank 0)")
    which.add_argument("--all", action="store_true", help="the last lines of every rank")
    logs.add_argument("--lines", type=int, default=20, help="the last lines of each log (default 20)")
    logs.add_argument("--follow", action="store_true", help="go on printing what comes; Ctrl-C ends")
    _takes_json(logs)

    cluster = commands.add_parser(
        "cluster",
        help="a whole Slurm on this machine, to rehearse and to test on",
        description="A real Slurm (munge, MariaDB, slurmdbd, slurmctld, many slurmd) in a directory and on ports of its own.",
    )
    cluster_commands = cluster.add_subparsers(title="commands", metavar="COMMAND", required=True)
    up = _command(cluster_commands, "up", _cluster_up, "start a cluster; it stays up until `down`")
    up.add_argument("--nodes", type=int, default=8, help="virtual nodes (default 8)")
    up.add_argument("--gpus-per-node", type=int, default=8, help="virtual GPUs on each (default 8)")
    up.add_argument("--no-accounting", action="store_true", help="without MariaDB and slurmdbd")
    down = _command(cluster_commands, "down", _cluster_down, "stop a cluster: exactly what `up` started, and its jobs")
    status = _command(cluster_commands, "status", _cluster_status, "what is up, and the nodes' states")
    for command in (up, down, status):
        command.add_argument("--name", default="virtual", help="which cluster (default: virtual)")
        command.add_argument(
            "--directory", type=Path, metavar="DIR", help="where it lives (default: in the folder for temporary files)"
        )
        _takes_json(command)

    report = commands.add_parser("report", help="account for what runs have done", description="Accounts of runs.")
    reports = report.add_subparsers(title="reports", metavar="REPORT", required=True)
    carbon = _command(
        reports,
        "carbon",
        _report_carbon,
        "energy and carbon of runs, measured beside LLaMA's formula",
        "Energy and carbon of one run, a sweep or a whole project: each physical device counts once.\n\n"
        "Without an intensity it tells energy alone; give one with carbon.zone=FRA, carbon.cloud=gcp/europe-west1,\n"
        "carbon.series=FILE.csv (time_utc,g_per_kwh) or carbon.intensity_g_per_kwh=56.",
    )
    carbon.add_argument(
        "runs", nargs="*", metavar="RUN|carbon.KEY=VALUE", help="run directories, or folders of them; overrides"
    )
    carbon.add_argument(
        "--format",
        choices=("md", "csv", "html", "prometheus", "model-card"),
        help="default md; html opens with no network; prometheus is for node_exporter's textfile collector",
    )
    carbon.add_argument("--no-slurm", action="store_true", help="leave out the cross-check with sacct")
    carbon.add_argument("--llama-table", action="store_true", help="print the LLaMA paper's table 15, recomputed")
    _takes_json(carbon)

    model_card = _command(
        reports,
        "model-card",
        _report_model_card,
        "a run's model card, in Hugging Face's form",
        "Prints the model card of a run: configuration, data, loss, evaluation, energy and carbon, as recorded.",
    )
    model_card.add_argument("run", type=Path, metavar="RUN", help="a run directory")

    export = _command(
        commands,
        "export",
        _export,
        "a run's model as a folder for transformers, vLLM and others",
        "Writes the newest checkpoint's weights (safetensors), configuration, tokenizer and model card, as transformers' "
        "LlamaForCausalLM reads them. Beside a run that goes on, too. "
        "Example: arriero export runs/mine --to mine-hf",
    )
    export.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    export.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new folder")
    export.add_argument("--step", type=int, default=None, help="of this checkpoint (default: the newest)")
    export.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the weights (default bf16)")
    _takes_json(export)

    watch = _command(commands, "watch", _watch, "a run at a glance in this terminal, until it ends or Ctrl-C")
    watch.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    watch.add_argument("--once", action="store_true", help="print one frame and end")
    watch.add_argument("--every-s", type=float, default=2.0, metavar="SECONDS", help="between two looks (default 2)")
    _takes_json(watch)

    spikes = commands.add_parser("spikes", help="loss spikes: what a rule sees in a log", description="Loss spikes.")
    spikes_commands = spikes.add_subparsers(title="commands", metavar="COMMAND", required=True)
    replay = _command(
        spikes_commands,
        "replay",
        _spikes_replay,
        "run a spike rule over loss logs, and draw what it would have done",
        "Runs a rule over any loss log: CSV (step, loss, and grad_norm if there is one; also a W&B chart's export), JSON\n"
        "lines, a run directory, or a W&B .wandb file. Prints a table and writes one SVG a log.",
    )
    replay.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="log files or run directories")
    replay.add_argument(
        "--rule", default="cusum", help="cusum (default), olmo_skip_step, kill_loss_spike, zscore, zclip"
    )
    replay.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of the rule, as spikes.params.NAME of a run; may be repeated",
    )
    replay.add_argument(
        "--declared",
        type=int,
        action="append",
        default=[],
        metavar="STEP",
        help="a step from which the loss is expected to change (learning-rate restart, new mix); may be repeated",
    )
    replay.add_argument("--undone", action="store_true", help="also the steps that a restart or rewind has undone")
    replay.add_argument("--picture", type=Path, metavar="DIR", help="write the pictures here (default: this folder)")
    replay.add_argument("--no-picture", action="store_true", help="print only")
    _takes_json(replay)

    dashboard = commands.add_parser(
        "dashboard", help="see runs: a page, a live page, W&B", description="See runs, anywhere."
    )
    dashboards = dashboard.add_subparsers(title="commands", metavar="COMMAND", required=True)
    page = _command(
        dashboards,
        "page",
        _dashboard_page,
        "one HTML file of a run, or of several beside each other, that opens with no network",
    )
    _takes_runs(page)
    page.add_argument("--output", type=Path, metavar="FILE", help="default: RUN/page.html, of several dashboard.html")
    _takes_json(page)
    serve = _command(dashboards, "serve", _dashboard_serve, "the page on this machine's loopback, refreshing itself")
    _takes_runs(serve)
    serve.add_argument("--port", type=int, default=8400, help="default 8400; 0 takes a free one")

    sync = _command(
        dashboards,
        "sync",
        _dashboard_sync,
        "upload runs to W&B: what it lacks of them, each step once",
        "Uploads what W&B lacks of each run, from the run directory: runs that were trained offline, or whose mirror was cut\n"
        "off. Doing it again uploads nothing twice. The server and the key are W&B's own: WANDB_BASE_URL, WANDB_API_KEY.",
    )
    _takes_runs(sync)
    _takes_json(sync)

    publish = _command(
        dashboards,
        "publish",
        _dashboard_publish,
        "the project's workspace and report in W&B, from the list of panels",
        "Saves a workspace and a report for the project that dashboard.project names. --dry-run prints their validated\n"
        "models and asks no server.",
    )
    publish.add_argument("overrides", nargs="*", metavar="dashboard.KEY=VALUE", help="such as dashboard.entity=my-team")
    publish.add_argument(
        "--dry-run", action="store_true", help="print what would be saved, validated; no server is asked"
    )
    _takes_json(publish)

    _add_scaling(commands)
    sweep = commands.add_parser("sweep", help="sweeps: how far, and what came out", description="Sweeps.")
    sweeps = sweep.add_subparsers(title="commands", metavar="COMMAND", required=True)
    of_sweep = _command(sweeps, "status", _sweep_status, "each point: its state, steps and loss")
    of_sweep.add_argument("sweep", type=Path, metavar="DIR", help="the sweep's directory, such as runs/NAME")
    _takes_json(of_sweep)
    told = _command(
        sweeps,
        "report",
        _sweep_report,
        "the points by their held-out loss, with energy and carbon, and one HTML page",
        "Prints the points, best first, with energy and carbon of each and of all, and writes one HTML page with parallel\n"
        "coordinates and curves, which opens with no network.",
    )
    told.add_argument("sweep", type=Path, metavar="DIR", help="the sweep's directory, such as runs/NAME")
    told.add_argument(
        "overrides",
        nargs="*",
        metavar="carbon.KEY=VALUE",
        help="in place of the points' own, as of `report carbon`: carbon.zone=FRA",
    )
    told.add_argument("--output", type=Path, metavar="FILE", help="the page (default: DIR/sweep.html)")
    _takes_json(told)

    return parser


def _parser_of_ranks() -> argparse.ArgumentParser:
    """Of the commands that ranks start, one a node: not for people, so neither in --help nor among the choices."""
    parser = argparse.ArgumentParser(prog="arriero")
    commands = parser.add_subparsers(required=True)
    sampler = commands.add_parser(_OF_RANKS[0])
    sampler.add_argument("run_dir", type=Path)
    sampler.add_argument("--attempt", type=int, required=True)
    sampler.add_argument("--watch", type=int, default=None, metavar="PID")
    sampler.add_argument("--sample-s", type=float, default=15.0)
    sampler.set_defaults(handler=_energy_sample)
    mirror = commands.add_parser(_OF_RANKS[1])
    mirror.add_argument("run_dir", type=Path)
    mirror.add_argument("--watch", type=int, required=True, metavar="PID")
    mirror.set_defaults(handler=_wandb_mirror)
    return parser


def _add_scaling(commands: Any) -> None:
    scaling = commands.add_parser(
        "scaling",
        help="scaling laws: which size and how many tokens",
        description="Laws of the loss, and their advice.",
    )
    laws = scaling.add_subparsers(title="commands", metavar="COMMAND", required=True)
    fit = _command(
        laws,
        "fit",
        _scaling_fit,
        "fit L(N, D) = E + A / N^alpha + B / D^beta to runs, with IsoFLOP minima",
        "Fits the law of Hoffmann et al. to the final held-out losses of finished runs, or to a CSV with columns\n"
        "parameters, loss and tokens (or flops). Intervals are by bootstrap.",
    )
    _takes_points(fit)
    fit.add_argument("--output", type=Path, metavar="DIR", help="write fit.json, fit.md and fit.svg there")
    _takes_json(fit)
    recommend = _command(
        laws,
        "recommend",
        _scaling_recommend,
        "the size and tokens for a training budget, or for a loss and its inference",
        "With --flops C: the size and tokens that reach the lowest loss. With --loss L, or --flops C for the loss that it\n"
        "reaches at best, and --inference-tokens T: the cheapest model at that loss, counting 6 N D FLOPs of training and\n"
        "2 N T of inference.",
    )
    _takes_points(recommend)
    recommend.add_argument("--fit", type=Path, metavar="FILE", help="a fit.json of `scaling fit --output`")
    recommend.add_argument("--law", metavar="NAME", help="a published law: hoffmann or besiroglu")
    recommend.add_argument("--flops", type=float, metavar="C", help="training budget")
    recommend.add_argument("--loss", type=float, metavar="L", help="loss to reach, nats per token")
    recommend.add_argument(
        "--inference-tokens", type=float, default=0.0, metavar="T", help="tokens to be served in all"
    )
    _takes_json(recommend)


def _takes_points(command: argparse.ArgumentParser) -> None:
    command.add_argument("sweeps", nargs="*", type=Path, metavar="SWEEP", help="folders of runs, or run directories")
    command.add_argument(
        "--csv", type=Path, metavar="FILE", help="points of anybody's: parameters, tokens or flops, loss"
    )
    command.add_argument("--bootstrap", type=int, default=500, metavar="N", help="replicates (default 500)")
    command.add_argument("--seed", type=int, default=0, help="of the bootstrap (default 0)")


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


def _takes_runs(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", nargs="+", metavar="RUN", help="run directories, or folders of them")


def _paths(words: Sequence[str]) -> list[Path]:
    return [Path(word) for word in words]


def _takes_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON for programs, with units in the keys")


def _launch(args: argparse.Namespace) -> int:
    from orchestrator import launch, spec
    from orchestrator.errors import UserError

    if args.multirun:
        if args.dry_run:
            raise UserError(
                "--dry-run prints the script of one run: leave out -m, and choose one value of what is swept"
            )
        from orchestrator.sweep import launch_sweep

        return launch_sweep(args.overrides, args.config_dir, args.limit_parallel, args.wait, args.halving)
    if args.wait or args.halving is not None or args.limit_parallel is not None:
        raise UserError("--wait, --halving and --limit-parallel are of a sweep: add -m")

    return launch.launch(spec.compose(args.overrides, args.config_dir), args.overrides, dry_run=args.dry_run)


def _rehearse(args: argparse.Namespace) -> int:
    from orchestrator import spec
    from orchestrator.rehearsal import rehearse

    return rehearse(spec.compose(args.overrides, args.config_dir), args.json)


def _chaos(args: argparse.Namespace) -> int:
    if args.random is not None:
        from orchestrator.chaos.kills import random_kills

        return random_kills(args.random, args.seed, args.parallel, args.directory, args.json)
    from orchestrator.chaos.campaign import campaign

    return campaign(args.faults, args.seed, args.parallel, args.directory, args.json)


def _resume(args: argparse.Namespace) -> int:
    from orchestrator import control

    return control.resume(args.run)


def _cancel(args: argparse.Namespace) -> int:
    from orchestrator import control

    return control.cancel(args.run)


def _status(args: argparse.Namespace) -> int:
    from orchestrator import registry

    folders = _paths(args.runs or ["runs"])
    return registry.show(registry.rows(folders), as_json=args.json, details=len(args.runs) == 1)


def _runs(args: argparse.Namespace) -> int:
    from orchestrator import registry

    return registry.show(registry.rows([args.folder]), as_json=args.json, details=False)


def _logs(args: argparse.Namespace) -> int:
    from orchestrator.logs import logs

    return logs(args.run, rank=args.rank, everyone=args.all, lines=args.lines, follow=args.follow, as_json=args.json)


def _plan(args: argparse.Namespace) -> int:
    import time

    from orchestrator import spec
    from orchestrator.plan import forecast

    run = spec.compose(args.overrides, args.config_dir)
    if args.dry_run:
        from orchestrator.plan.dry_run import dry_run

        return dry_run(run, args.json)
    found = forecast.plan(run, time.time())
    if args.json:
        print_json(found.to_json())
    else:
        print(forecast.table(found))
    return 0


def _simulate(args: argparse.Namespace) -> int:
    from orchestrator import spec
    from orchestrator.errors import UserError
    from orchestrator.plan.simulate import simulate

    if args.picture and not args.picture.parent.is_dir():
        raise UserError(f"--picture {args.picture}: the folder {args.picture.parent} does not exist")
    if args.picture and args.picture.is_dir():
        raise UserError(f"--picture {args.picture} is a folder: give a file in it, such as {args.picture / 'ettr.svg'}")
    if args.picture and args.picture.suffix != ".svg":
        raise UserError(f"--picture {args.picture}: the picture is an SVG, name it {args.picture.with_suffix('.svg')}")
    found = simulate(spec.compose(args.overrides, args.config_dir), args.seeds)
    if args.picture:
        args.picture.write_text(found.picture(), encoding="utf-8")
    if args.json:
        print_json({**found.to_json(), "picture": str(args.picture) if args.picture else None})
    else:
        print(found.table())
        if args.picture:
            print(f"drawn in {args.picture}")
    return 0


def _config(args: argparse.Namespace) -> int:
    from orchestrator import spec

    print(spec.to_yaml(spec.compose(args.overrides, args.config_dir)), end="")
    return 0


def _cluster_up(args: argparse.Namespace) -> int:
    from slurm.virtual import VirtualCluster

    cluster = VirtualCluster.up(
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        directory=args.directory,
        name=args.name,
        accounting=not args.no_accounting,
    )
    if args.json:
        print_json(cluster.status())
        return 0
    print(f"{cluster.name}: {cluster.nodes} nodes of {cluster.gpus_per_node} GPUs are up in {cluster.up_s:.1f} s")
    print(f"its files are in {cluster.directory}; every Slurm command, and `arriero launch`, speaks to it after")
    for name, value in cluster.env.items():
        print(f"  export {name}={value}")
    return 0


def _cluster_down(args: argparse.Namespace) -> int:
    cluster = _cluster(args)
    stopped = [name for name, process in cluster.daemons.items() if process.alive()]
    cluster.down()
    if args.json:
        print_json({"name": cluster.name, "daemons_stopped": len(stopped)})
    else:
        print(f"{cluster.name}: {len(stopped)} daemons stopped")
    return 0


def _cluster_status(args: argparse.Namespace) -> int:
    cluster = _cluster(args)
    status = cluster.status()
    if args.json:
        print_json(status)
        return 0 if status["controller_answers"] else 1
    if not status["controller_answers"]:
        print(
            f"{cluster.name}: "
            + ("slurmctld does not answer" if status["up"] else f"not up; its files are in {cluster.directory}")
        )
        return 1
    states = ", ".join(f"{count} {state}" for state, count in sorted(status["nodes_by_state"].items()))
    print(f"{cluster.name}: {cluster.nodes} nodes of {cluster.gpus_per_node} GPUs: {states}")
    print(f"  export SLURM_CONF={cluster.conf}")
    if status["daemons_down"]:
        print(f"  down: {', '.join(status['daemons_down'])}")
    return 0


def _cluster(args: argparse.Namespace) -> Any:
    from slurm.virtual import VirtualCluster, default_directory

    return VirtualCluster.load((args.directory or default_directory(args.name)).resolve())


def _report_carbon(args: argparse.Namespace) -> int:
    from dashboards import carbon as shown
    from orchestrator.carbon_report import accounted, run_dirs
    from orchestrator.energy.report import account
    from orchestrator.errors import UserError

    if args.json and args.format:
        raise UserError(f"--json and --format {args.format} are two forms: give one of them")
    if args.llama_table:
        print(shown.llama_table(), end="")
        return 0
    overrides = [a for a in args.runs if a.startswith("carbon.") and "=" in a]
    paths = _paths([a for a in args.runs if a not in overrides])
    if not paths:
        raise UserError("which runs? arriero report carbon RUN..., such as runs/tiny, or runs for all of them")
    statements = account([accounted(root, overrides) for root in run_dirs(paths)], ask_slurm=not args.no_slurm)
    if args.json:
        print_json(shown.to_json(statements))
    elif args.format == "model-card":
        print(shown.to_model_card(statements[-1]), end="")
    else:
        render = {
            "md": shown.to_markdown,
            "csv": shown.to_csv,
            "html": shown.to_html,
            "prometheus": shown.to_prometheus,
        }[args.format or "md"]
        print(render(statements), end="")
    return 0


def _dashboard_page(args: argparse.Namespace) -> int:
    from orchestrator.show import write_page

    path, size_bytes, runs = write_page(_paths(args.runs), args.output)
    if args.json:
        print_json({"page": str(path), "size_bytes": size_bytes, "runs": runs})
    else:
        print(path)
    return 0


def _dashboard_serve(args: argparse.Namespace) -> int:
    from orchestrator.show import serve

    serve(_paths(args.runs), args.port)
    return 0


def _dashboard_publish(args: argparse.Namespace) -> int:
    from dashboards import workspace
    from orchestrator import spec
    from orchestrator.errors import Failure

    chosen = spec.compose(args.overrides).dashboard
    if args.dry_run:
        models = workspace.models(chosen.project, chosen.entity or "ENTITY")
        if args.json:
            print_json(models)
            return 0
        print(
            f"project {chosen.project}, entity {chosen.entity or 'the account that is logged in'}; valid, nothing was sent"
        )
        for section, panels in workspace.outline():
            print(f"  {section}: {', '.join(panels)}")
        return 0
    try:
        saved = workspace.publish(chosen.project, chosen.entity)
    except Exception as error:  # whatever the client raises: not logged in, no server, refused
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise Failure(f"W&B did not take the workspace and the report: {why}") from None
    if args.json:
        print_json(saved)
    else:
        print(f"workspace  {saved['workspace']}\nreport     {saved['report']}")
    return 0


def _report_model_card(args: argparse.Namespace) -> int:
    from orchestrator.show import card

    print(card(args.run), end="")
    return 0


def _export(args: argparse.Namespace) -> int:
    from orchestrator.export import export

    return export(args.run, args.to, args.step, args.dtype, args.json)


def _watch(args: argparse.Namespace) -> int:
    from orchestrator import show

    if not (args.once or args.json):
        show.watch(args.run, args.every_s)
        return 0
    from dashboards import terminal

    view = show.followers([args.run])[0].view()
    if args.json:
        print_json(terminal.as_json(view))
    else:
        terminal.show([view])
    return 0


def _dashboard_sync(args: argparse.Namespace) -> int:
    from orchestrator.carbon_report import run_dirs
    from orchestrator.mirror import sync

    done = []
    for root in run_dirs(_paths(args.runs)):
        steps, url = sync(root)
        done.append({"run": str(root), "steps_uploaded": steps, "url": url})
        if not args.json:
            print(f"{root}: {steps:,} steps uploaded, {url}" if steps else f"{root}: W&B has all of it, {url}")
    if args.json:
        print_json(done)
    return 0


def _wandb_mirror(args: argparse.Namespace) -> int:
    from orchestrator.mirror import mirror_until_gone

    return mirror_until_gone(args.run_dir, args.watch)


def _sweep_status(args: argparse.Namespace) -> int:
    from orchestrator import sweep_report

    rows = sweep_report.status(args.sweep)
    if args.json:
        print_json(rows)
    else:
        print(sweep_report.status_table(args.sweep, rows))
    return 0


def _sweep_report(args: argparse.Namespace) -> int:
    from orchestrator import sweep_report

    found = sweep_report.report(args.sweep, args.overrides)
    page = sweep_report.write_page(found, args.output or args.sweep / "sweep.html")
    if args.json:
        print_json({**found.as_json(), "page": str(page)})
    else:
        print(sweep_report.markdown(found))
        print(f"page  {page}")
    return 0


def _scaling_fit(args: argparse.Namespace) -> int:
    _one_blas_thread()
    from orchestrator.scaling import report

    fitted = _fitted(args)
    if args.output:
        source = ", ".join(str(p) for p in (args.sweeps or [args.csv.name]))
        report.write_fit(fitted, args.output, f"Scaling law of {source}")
    if args.json:
        print_json(report.fit_as_json(fitted))
        return 0
    print(report.fit_as_markdown(fitted), end="")
    if args.output:
        print(f"\nwritten: {args.output}/fit.json, fit.md, fit.svg")
    return 0


def _scaling_recommend(args: argparse.Namespace) -> int:
    _one_blas_thread()
    from orchestrator.errors import UserError
    from orchestrator.scaling import report

    if sum(map(bool, (args.fit, args.law, args.sweeps or args.csv))) != 1:
        raise UserError("give one source of the law: SWEEP..., --csv FILE, --fit FILE, or --law hoffmann|besiroglu")
    if args.law:
        known, source = report.published(args.law), f"the published law of {args.law}"
    elif args.fit:
        known, source = report.read_fit(args.fit), str(args.fit)
    else:
        known, source = report.known(_fitted(args)), "the law fitted to these points"
    found = report.recommend(known, flops=args.flops, loss=args.loss, inference_tokens=args.inference_tokens)
    if args.json:
        print_json({"law": source, **found})
    else:
        print(report.recommendation_as_markdown(found, source), end="")
    return 0


def _one_blas_thread() -> None:
    """Before numpy is there: thousands of fits of a few numbers, whose threads only wait for each other (ten times as long on two
    busy cores)."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _fitted(args: argparse.Namespace) -> Any:
    from orchestrator.errors import UserError
    from orchestrator.scaling.fit import fit
    from orchestrator.scaling.points import from_csv, from_runs

    if bool(args.sweeps) == bool(args.csv):
        raise UserError("give the runs to fit, or --csv FILE: arriero scaling fit runs/my_sweep")
    points, notes = from_csv(args.csv) if args.csv else from_runs(args.sweeps)
    for note in notes:
        print(note, file=sys.stderr)
    return fit(points, args.bootstrap, args.seed)


def _energy_sample(args: argparse.Namespace) -> int:
    from orchestrator.energy.sampler import sample

    return sample(args.run_dir, args.attempt, args.watch, args.sample_s)


def _spikes_replay(args: argparse.Namespace) -> int:
    from orchestrator.errors import UserError
    from orchestrator.spikes import replay

    params = replay.params(args.rule, args.param)
    results = [replay.run_over(log, args.rule, args.declared, args.undone, params) for log in args.logs]
    pictures: list[Path] = []
    if not args.no_picture:
        folder = args.picture or Path()
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--picture {folder} is a file: give a folder")
        folder.mkdir(parents=True, exist_ok=True)
        for number, result in enumerate(results):
            name = f"spikes-{args.logs[number].resolve().stem}-{args.rule}.svg"
            if any(p.name == name for p in pictures):  # two logs of one name, in two folders
                name = name.replace(".svg", f"-{number + 1}.svg")
            pictures.append(folder / name)
            pictures[-1].write_text(replay.picture(result), encoding="utf-8")
    if args.json:
        drawn: list[str | None] = [str(p) for p in pictures] or [None] * len(results)
        print_json([{**r.summary(), "picture": p} for r, p in zip(results, drawn, strict=True)])
        return 0
    for number, result in enumerate(results):
        print(replay.table(result))
        if pictures:
            print(f"drawn in {pictures[number]}")
    return 0
