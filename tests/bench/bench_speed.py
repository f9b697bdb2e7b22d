"""Whole training steps against peers, in one run: `make bench`, or this file by itself.

    python tests/bench/bench_speed.py [--shape S] [--rounds 2] [--steps 6] [--contenders arriero litgpt] [--precision bf16]
        [--into FILE]
    python tests/bench/speed_step.py arriero S tuned 0 bf16    where one step of one contender goes

Every contender runs in a process of its own, one after the other, `rounds` times around: as it comes out of the box, and tuned
(torch.compile, and jemalloc with decay off and huge pages). Ours is what `arriero launch` gives, without jemalloc: it keeps
glibc's heap itself. All compute in bf16 where the processor has it, else in fp32, as precision=auto would. Prints medians, the
share of others in the processor's time, peak memory and ratios to the best peer.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from model.device import has_bf16
from model.heap import WITHOUT_THREAD_CACHES

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE.parents[1] / ".venv" / "peers"
PEERS = ("litgpt", "torchtitan", "transformers")
# Each without its dependencies, and then what its model needs: none may bring another torch.
PACKAGES = (
    "litgpt==0.5.13", "torchtitan==0.2.2", "transformers", "lightning-utilities", "jsonargparse", "psutil", "lightning",
    "pytorch-lightning", "torchmetrics", "triton", "torchdata", "tensorboard", "absl-py", "grpcio", "tyro",
    "docstring_parser", "typeguard",
)  # fmt: skip
JEMALLOC = "libjemalloc.so.2"
DECAY_OFF = "thp:always,dirty_decay_ms:-1,muzzy_decay_ms:-1"
FLOOR_BYTES = 16  # a parameter, its gradient and AdamW's two moments in fp32


def peers_python() -> str:
    """The interpreter of the peers' environment, made on first use; it sees this environment's torch."""
    python, installed = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "installed"
    if not installed.exists() or installed.read_text() != " ".join(PACKAGES):
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, *PACKAGES], check=True)
        (site,) = ENVIRONMENT.glob("lib/python*/site-packages")
        (site / "shared.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
        installed.write_text(" ".join(PACKAGES))
    return str(python)


def measure(
    contender: str, shape: str, tuned: bool, steps: int, precision: str, jemalloc: str | None
) -> dict[str, Any]:
    """One process of one contender. Raises RuntimeError with the end of what it said where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    if tuned and contender == "arriero":
        environment = WITHOUT_THREAD_CACHES | environment  # as its ranks are started
    elif tuned and jemalloc:
        environment |= {"LD_PRELOAD": jemalloc, "MALLOC_CONF": DECAY_OFF}
    python = sys.executable if contender == "arriero" else peers_python()
    asked = [contender, shape, "tuned" if tuned else "stock", str(steps), precision]
    command = [python, str(HERE / "speed_step.py"), *asked]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{contender} {shape}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def table(results: Sequence[dict[str, Any]], busy_elsewhere: float = 0.05) -> str:
    """One line a contender. Steps during which others took more of the processor than `busy_elsewhere` are left out where
    there are others; the column says how many count."""
    lines = [
        f"{'contender':<14}{'shape':<7}{'':<7}{'tokens/s':>9}{'peak MiB':>10}{'warm s':>8}{'steps':>8}{'others':>8}"
    ]
    speed: dict[tuple[str, str, bool], tuple[float, float]] = {}
    for key in dict.fromkeys((r["shape"], r["contender"], r["tuned"]) for r in results):
        runs = [r for r in results if (r["shape"], r["contender"], r["tuned"]) == key]
        steps = [(s, o) for r in runs for s, o in zip(r["step_s"], r["others"], strict=True)]
        alone = [s for s, o in steps if o <= busy_elsewhere] or [s for s, _ in steps]
        tokens_per_s = runs[0]["tokens"] / statistics.median(alone)
        memory = statistics.median(r["peak_memory_bytes"] for r in runs) / 2**20
        speed[key] = (tokens_per_s, memory)
        lines.append(
            f"{key[1]:<14}{key[0]:<7}{'tuned' if key[2] else 'stock':<7}{tokens_per_s:>9,.0f}{memory:>10,.0f}"
            f"{statistics.median(r['warm_s'] for r in runs):>8.0f}{len(alone):>4}/{len(steps):<3}"
            f"{statistics.median(o for _, o in steps):>8.1%}   loss {runs[0]['losses'][-1]:.3f}"
        )
    for shape in dict.fromkeys(k[0] for k in speed):
        for tuned in (True, False):
            peers = {k[1]: v for k, v in speed.items() if k[0] == shape and k[1] != "arriero" and k[2] is tuned}
            ours = speed.get((shape, "arriero", True))
            if ours and peers:
                best = max(peers, key=lambda name: peers[name][0])
                lines.append(
                    f"{shape}: {ours[0] / peers[best][0]:.2f} times {best} {'tuned' if tuned else 'out of the box'}, "
                    f"at {ours[1] / peers[best][1]:.2f} of its memory"
                )
    return "\n".join(lines)


def find_jemalloc() -> str | None:
    """Where the dynamic linker would find it (Debian: libjemalloc2)."""
    found = subprocess.run([shutil.which("ldconfig") or "/sbin/ldconfig", "-p"], capture_output=True, text=True).stdout
    lines = [line.split(" => ")[-1] for line in found.splitlines() if JEMALLOC in line]
    return os.environ.get("JEMALLOC") or (lines[0] if lines else None)


def test_print_speed_against_peers() -> None:
    main(["--rounds", "1", "--steps", "3"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="*", default=["S", "M"])
    parser.add_argument("--contenders", nargs="*", default=["arriero", *PEERS])
    parser.add_argument("--kinds", nargs="*", default=["tuned", "stock"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--into", type=Path, help="results are added to this file, one JSON line a process")
    chosen = parser.parse_args(arguments)
    jemalloc = find_jemalloc()
    if jemalloc is None:
        print("no libjemalloc.so.2 (Debian: libjemalloc2; or set JEMALLOC): tuned peers run with glibc as it is")
    computed = has_bf16(torch.device("cpu"))
    if chosen.steps < 1:
        parser.error("--steps must be at least 1")
    precision = ("bf16" if computed else "fp32") if chosen.precision == "auto" else chosen.precision
    print(f"all in {precision}" + ("" if computed or precision == "fp32" else ", which this processor emulates"))
    results = []
    for shape in chosen.shape:
        for _ in range(chosen.rounds):
            for kind in chosen.kinds:
                for contender in chosen.contenders:
                    results.append(measure(contender, shape, kind == "tuned", chosen.steps, precision, jemalloc))
                    if chosen.into:
                        with chosen.into.open("a") as file:
                            file.write(json.dumps(results[-1]) + "\n")
    if chosen.into:
        results = [json.loads(line) for line in chosen.into.read_text().splitlines()]
        results = [r for r in results if r["precision"] == precision]
    print("\n" + table(results))


if __name__ == "__main__":
    main()
