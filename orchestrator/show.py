"""What `arriero dashboard`, `watch` and `report model-card` do: run directories in, pages, frames and uploads out."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from dashboards.model_card import model_card
from dashboards.page import buckets_for, page
from dashboards.serve import HOST, server
from dashboards.terminal import frame
from orchestrator.carbon_report import run_dirs
from orchestrator.errors import UserError
from orchestrator.page_data import ENDED, RunFollower
from orchestrator.run_dir import RunDir


def followers(paths: Sequence[Path]) -> list[RunFollower]:
    """Run directories, or folders of them (a sweep). Raises UserError where there are none."""
    roots = list(dict.fromkeys(root.resolve() for root in run_dirs(paths)))
    return [RunFollower(root, buckets_for(len(roots))) for root in roots]


def write_page(paths: Sequence[Path], output: Path | None = None) -> tuple[Path, int, int]:
    """Writes the page: where, its bytes, and of how many runs. One run's goes into its directory."""
    runs = followers(paths)
    text = page([run.view() for run in runs]).encode()
    if output is None:
        output = RunDir(runs[0].paths.root).page if len(runs) == 1 else Path("dashboard.html")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: name a file")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.new")
    temporary.write_bytes(text)
    temporary.replace(output)
    return output, len(text), len(runs)


def serve(paths: Sequence[Path], port: int) -> None:
    """Serves until Ctrl-C."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: ports are 1 to 65535, and 0 takes a free one")
    runs = followers(paths)

    def fingerprint() -> str:  # the minute too: a run that falls silent writes nothing
        return " ".join([str(int(time.time() // 60)), *(run.fingerprint() for run in runs)])

    try:
        serving = server(fingerprint, lambda: [run.view() for run in runs], port)
    except OSError as error:
        raise UserError(f"--port {port}: {error.strerror}. Choose another with --port (0 takes a free one)") from None
    print(f"http://{HOST}:{serving.server_address[1]}/  (this machine only; Ctrl-C ends it)", flush=True)
    with serving, contextlib.suppress(KeyboardInterrupt):
        serving.serve_forever()


def watch(root: Path, every_s: float) -> None:
    """A frame that refreshes until the run ends, or Ctrl-C."""
    from rich.live import Live

    follower = followers([root])[0]
    view, seen = follower.view(), follower.fingerprint()
    with contextlib.suppress(KeyboardInterrupt), Live(frame(view), auto_refresh=False) as live:
        while view.state not in ENDED:
            time.sleep(every_s)
            now = follower.fingerprint()
            if now != seen or view.state in ("training", "stopping"):  # a run that falls silent writes nothing
                view, seen = follower.view(), now
                live.update(frame(view), refresh=True)


def card(root: Path) -> str:
    return model_card(followers([root])[0].view())
