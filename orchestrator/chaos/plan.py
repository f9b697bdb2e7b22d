"""The faults of the campaign, as data. Pure.

Faults of one scene happen to one run, one after the other, so that they share its starts. Where `faults` are named they strike
inside the ranks (orchestrator/faults.py) at steps relative to a slot of ten steps; else the scene does them from outside.
"""

from dataclasses import dataclass
from typing import Literal

from orchestrator.faults import Fault

STEPS = 60
SAVE_EVERY = 5
SLOT = 10  # steps that a fault inside the ranks has for itself
FIRST = 7  # the first slot begins here: one checkpoint is there

_DIED = r"^restarted: inside the allocation, crash"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One fault, what must be seen of it, and what it may cost."""

    name: str
    scene: str
    injected: str  # for a person
    seen: str  # a regular expression: an event ("kind: detail") or a line of a launch must match; "": the scene sees to it
    faults: tuple[Fault, ...] = ()
    repeats: int = SAVE_EVERY  # steps that may be trained again, at most
    loss: Literal["bitwise", "close", "until the rewind"] = "bitwise"  # against the control
    skips: bool = False  # whether data may be skipped


def _strike(kind: str, step: int, rank: int = 0, seconds: float = 0.0) -> Fault:
    return Fault(kind=kind, step=step, rank=rank, seconds=seconds)


PLAN: tuple[Planned, ...] = (
    Planned(
        name="sigkill_random_rank",
        scene="deaths",
        injected="SIGKILL of a rank, drawn by the seed",
        seen=_DIED,
        faults=(_strike("kill", 1, rank=-1),),
    ),
    Planned(
        name="sigkill_rank_0", scene="deaths", injected="SIGKILL of rank 0", seen=_DIED, faults=(_strike("kill", 1),)
    ),
    Planned(
        name="sigsegv", scene="deaths", injected="SIGSEGV of rank 1", seen=_DIED, faults=(_strike("segv", 1, rank=1),)
    ),
    Planned(
        name="kill_in_commit",
        scene="deaths",
        injected="SIGKILL of rank 0 between write and commit",
        seen=_DIED,
        faults=(_strike("kill_in_commit", 1),),
        repeats=2 * SAVE_EVERY,
    ),
    Planned(
        name="kill_in_resume",
        scene="deaths",
        injected="SIGKILL of rank 0, then of rank 1 while both resume",
        seen=_DIED,
        faults=(_strike("kill", 1), _strike("kill_in_resume", -3, rank=1)),
    ),
    Planned(
        name="sigstop",
        scene="hangs",
        injected="SIGSTOP of rank 1",
        seen=r"^hung: rank 1 .*stopped",
        faults=(_strike("freeze", 1, rank=1),),
    ),
    Planned(
        name="gil_held",
        scene="hangs",
        injected="rank 0 holds the interpreter's lock, in C code that never returns",
        seen=r"^hung: rank 0 ",
        faults=(_strike("gil", 1),),
    ),
    Planned(
        name="slow_rank",
        scene="hangs",
        injected="rank 1 sleeps 0.3 s before each step from there on",
        seen=r"^straggler: rank 1 ",
        faults=(_strike("slow", 1, rank=1, seconds=0.3),),
        repeats=0,
    ),
    Planned(
        name="signal_to_one_rank",
        scene="signals",
        injected="SIGUSR2 (Slurm's warning) to rank 1 alone",
        seen=r"^stopped: asked to stop \(SIGUSR2\)",
        faults=(_strike("usr2", 1, rank=1),),
        repeats=0,
    ),
    Planned(
        name="sigterm_in_save",
        scene="signals",
        injected="SIGTERM to rank 0 while a checkpoint is written",
        seen=r"^stopped: asked to stop \(SIGTERM\)",
        faults=(_strike("term_in_save", 1),),
        repeats=0,
    ),
    Planned(
        name="sigterm_in_evaluation",
        scene="signals",
        injected="SIGTERM to rank 0 while the model is evaluated",
        seen=r"^stopped: asked to stop \(SIGTERM\)",
        faults=(_strike("term_in_evaluation", 1),),
        repeats=0,
    ),
    Planned(
        name="nan_one_rank",
        scene="signals",
        injected="a NaN in one computation of rank 1's loss",
        seen=r"^recomputed: .*rank 1",
        faults=(_strike("nan", 1, rank=1),),
        repeats=0,
    ),
    Planned(
        name="bit_in_committed",
        scene="damage",
        injected="a bit flipped in COMMITTED",
        seen=r"^passed_over: step-000000043\S* passed over: .*do not belong together",
    ),
    Planned(
        name="bit_in_manifest",
        scene="damage",
        injected="a bit flipped in manifest.json",
        seen=r"^passed_over: step-000000040\S* passed over: .*do not belong together",
    ),
    Planned(
        name="bit_in_index",
        scene="damage",
        injected="a bit flipped in index.json",
        seen=r"^passed_over: step-000000035\S* passed over: index.json is damaged",
    ),
    Planned(
        name="bit_in_shard",
        scene="damage",
        injected="a bit flipped in rank-00001.safetensors",
        seen=r"^passed_over: step-000000030\S* passed over: .*rank-00001.safetensors is damaged",
    ),
    Planned(
        name="truncated_shard",
        scene="damage",
        injected="rank-00000.safetensors loses its second half",
        seen=r"^passed_over: step-000000025\S* passed over: rank-00000.safetensors has \d+ bytes, not",
    ),
    Planned(
        name="deleted_shard",
        scene="damage",
        injected="rank-00001.safetensors deleted",
        seen=r"^passed_over: step-000000020\S* passed over: rank-00001.safetensors is missing",
    ),
    Planned(
        name="malicious_pickle",
        scene="damage",
        injected="pickles that run code: in place of a shard, and as .metadata, .distcp and .pt of the checkpoint that is loaded",
        seen=r"^passed_over: step-000000015\S* passed over: rank-00000.safetensors",
    ),
    Planned(
        name="torn_records",
        scene="damage",
        injected="half a line at the end of the records and of the events",
        seen="",
        repeats=0,
    ),
    Planned(
        name="newest_two_corrupt",
        scene="newest_two",
        injected="the two newest checkpoints damaged, one in its shard, one in its marker",
        seen=r"^passed_over: .*do not belong together",
        repeats=2 * SAVE_EVERY,
    ),
    Planned(
        name="enospc",
        scene="full_disk",
        injected="a tmpfs of 8 MB that holds the whole run directory is filled, and emptied 15 steps later",
        seen=r"^save_failed: .*No space left",
        repeats=0,
    ),
    Planned(
        name="eio",
        scene="writer",
        injected="write(2) answers EIO for rank 1's file (a link to /proc/self/mem)",
        seen=r"^save_failed: .*rank 1: OSError: \[Errno 5\]",
        repeats=0,
    ),
    Planned(
        name="stalled_writer",
        scene="writer",
        injected="open(2) of rank 0's file does not return for 15 steps (a FIFO)",
        seen=r"^save_skipped: step 25 not saved: step 20 is still being written",
        repeats=0,
    ),
    Planned(
        name="launched_twice",
        scene="twice",
        injected="the same command again while it runs; then as on a host that does not see the first",
        seen=r"^fenced: epoch 1 has been taken over by epoch 2",
        repeats=2 * SAVE_EVERY,
    ),
    Planned(
        name="launched_twice_at_once",
        scene="at_once",
        injected="the same command twice at the same moment",
        seen=r"is at work already|^fenced: ",
        repeats=4 * SAVE_EVERY,
    ),
    Planned(
        name="clock_shift",
        scene="clock",
        injected="the clock of all ranks jumps a day ahead, then two days back (libfaketime)",
        seen="",
        repeats=0,
    ),
    Planned(
        name="world_4_2_8",
        scene="world",
        injected="4 ranks, then 2, then 8, at the same global batch",
        seen=r"^started: attempt 3 on 8 rank",
        repeats=0,
        loss="close",
    ),
    Planned(
        name="object_store",
        scene="object_store",
        injected="503 answers and cut uploads, some for longer than all retries, while saving and while loading",
        seen=r"^save_failed: ",
        repeats=0,
    ),
    Planned(
        name="poison_batch",
        scene="poison",
        injected="five batches of random tokens",
        seen=r"^spike: .*",
        repeats=60,
        loss="until the rewind",
        skips=True,
    ),
    Planned(
        name="preemption",
        scene="slurm",
        injected="a job of a partition with priority takes the nodes",
        seen=r"^requeued: requeued: preempted",
        repeats=0,
    ),
    Planned(
        name="node_drained",
        scene="slurm",
        injected="an operator drains one of its nodes, and requeues the job",
        seen=r"^requeued: requeued: requeued",
        repeats=0,
    ),
    Planned(
        name="scontrol_fails",
        scene="slurm",
        injected="the job is requeued, and scontrol fails eight times while the supervisor needs it",
        seen=r"^requeued: requeued: requeued",
        repeats=0,
    ),
    Planned(
        name="timeout_signal",
        scene="slurm_timeout",
        injected="Slurm's warning before the time limit",
        seen=r"^requeued: requeued: timeout",
        repeats=0,
    ),
    Planned(
        name="slurmd_killed",
        scene="slurm_zombie",
        injected="SIGKILL of the node's slurmd; the ranks on it stand still, and go on once the run is at work elsewhere",
        seen=r"^requeued: requeued: node_failure",
        repeats=2 * SAVE_EVERY,
    ),
)
