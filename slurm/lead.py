"""The lead of all keepers (slurm/keeper.py): starts the ranks, hears of their ends and hangs, ends them all, starts them again.

One thread, one connection to each rank's keeper. A restart is a generation: every rank is killed, also those that are blocked
in a collective, each keeper says that it is gone, and all are forked anew with another port. What an incident means for the
run is not decided here (`Run`). A keeper that is lost ends the lead: its node may be gone, and whoever started the keepers
goes on.
"""

import contextlib
import hmac
import json
import re
import resource
import secrets
import selectors
import socket
import statistics
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from slurm.keeper import LEAD, TOKEN, keep_alive
from slurm.pulse import PHASES

_TICK_S = 0.2
_GRACE_S = 0.3  # after the first bad end, for those that say more about its cause
_GRACE_AT_START_S = 3.0  # the same before the first step: do all ranks fail alike?
_LOOK_S = 4.0  # within which a keeper says where its rank stands
_GONE_S = 15.0  # within which a killed rank is gone
_STRANGER_S = 60.0  # within which a connection proves itself
_HELLO_BYTES = 4096
_LINE_BYTES = 1 << 20
_ROUND_S = 2.0  # between two comparisons of the ranks' paces
_ROUNDS = 3  # in a row, after which a rank is slow
_FRESH_S = 60.0  # what a pace counts for
# The innermost Python frame of a rank that waits for others.
_WAITS = re.compile(r"distributed_c10d\.py|_functional_collectives\.py|_fsdp_collectives\.py|pipelining/schedules\.py")


@dataclass(frozen=True, kw_only=True)
class Incident:
    """Why a generation has ended. `rank` is the one at fault, as far as can be told."""

    cause: Literal["crash", "hung", "lost"]
    rank: int | None
    node: str
    detail: str
    exit_code: int = 1  # as a shell has it
    words: str = ""  # the rank's last: its traceback or stacks
    at_start: bool = False  # every rank has raised an exception before its first step of the first generation
    phase: str = ""
    step: int = 0
    stacks: str = ""  # of a hang: of the rank at fault, and of some that wait


@dataclass(frozen=True, kw_only=True)
class Slow:
    """A rank that computes more slowly than the others, by itself."""

    rank: int
    node: str
    step: int
    ratio: float  # of its own seconds a step to the median of all ranks'
    own_s: float
    median_s: float


class Run(Protocol):
    """What the lead tells, and asks, of the run that it leads."""

    def may_restart(self, incident: Incident) -> bool: ...
    def restarted(self, incident: Incident, generation: int, seconds: float) -> None: ...
    def straggles(self, slow: Slow) -> None: ...


@dataclass(eq=False)
class _Keeper:
    connection: socket.socket
    buffer: bytes = b""
    rank: int = -1  # until it has proved itself
    node: str = "?"
    ready: bool = False
    port: int = 0
    alive: bool = False  # its rank
    since_s: float = field(default_factory=time.monotonic)


class _Lost(Exception):
    """A keeper is gone, or does not answer."""

    def __init__(self, rank: int | None, node: str, why: str) -> None:
        super().__init__(why if rank is None else f"rank {rank}{f' on {node}' if node else ''}: {why}")
        self.rank, self.node = rank, node


class Lead:
    """Leads `ranks` keepers, that are started with its `environment`. `serve` in a thread, or as all that a process does."""

    def __init__(
        self, ranks: int, host: str, run: Run, hang_s: float | None, slow_s: float, slow_ratio: float, bind: str = ""
    ) -> None:
        self.ranks, self.run, self.hang_s, self.slow_s = ranks, run, hang_s, slow_s
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection a rank
        self._listener = socket.create_server((bind, 0), backlog=4096)
        self._listener.setblocking(False)
        self._token = secrets.token_hex(16)
        self.environment = {LEAD: f"{host}:{self._listener.getsockname()[1]}", TOKEN: self._token}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._keepers: dict[int, _Keeper] = {}
        self._strangers: list[_Keeper] = []  # that have not said who they are
        self._well: list[_Keeper] = []  # whose ranks have ended well: the run is over, for good or for now
        self._paces = Paces(ranks, slow_ratio)
        self.generation = 0
        self.stopping = False  # a stop signal came: what ends now is not started again
        self.incident: Incident | None = None  # the one that ended it; None where all ranks ended well
        self._closing = False

    def serve(self) -> None:
        """Until all ranks have ended and are not to be started again, and their keepers with them."""
        try:
            try:
                self.incident = self._lead()
            except _Lost as lost:
                self.incident = Incident(cause="lost", rank=lost.rank, node=lost.node, detail=str(lost))
            self._end(self.incident.exit_code if self.incident else 0)
        except Exception as error:
            traceback.print_exc()
            self.incident = Incident(cause="lost", rank=None, node="", detail=f"the lead itself failed: {error}")
        finally:  # the keepers end, where they have not
            for key in list(self._selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]
            self._selector.close()

    def close(self) -> None:
        """Ends `serve`, from another thread: those whose keepers these are have ended."""
        self._closing = True

    # -------------------------------------------------------------------------------------------------- generations

    def _lead(self) -> Incident | None:
        if incident := self._gather():
            return incident
        self._start()
        while (incident := self._until_incident()) is not None:
            noticed_s = time.monotonic()
            if self.stopping or self._well or not self.run.may_restart(incident):
                return incident
            self._kill()
            self._start()
            self.run.restarted(incident, self.generation, time.monotonic() - noticed_s)
        return None

    def _gather(self) -> Incident | None:
        """Waits until every rank's keeper is ready."""
        until = time.monotonic() + self.slow_s
        failed: list[tuple[_Keeper, dict[str, Any]]] = []
        while sum(k.ready for k in self._keepers.values()) < self.ranks:
            for keeper, said in self._hear():
                if "ready" in said:
                    keeper.ready, keeper.port = True, int(said["port"])
                elif "gone" in said:  # what it was to run can't be imported
                    failed.append((keeper, said))
            if failed:
                return self._crash(failed)
            if time.monotonic() > until:
                missing = [r for r in range(self.ranks) if r not in self._keepers or not self._keepers[r].ready]
                raise _Lost(missing[0], "", f"{len(missing)} of {self.ranks} ranks did not start in {self.slow_s:g} s")
        return None

    def _start(self) -> None:
        self.generation += 1
        self._well.clear()
        self._paces.reset()
        order = {"do": "start", "generation": self.generation, "port": self._keepers[0].port, "hang_s": self.hang_s,
                 "slow_s": self.slow_s}  # fmt: skip
        for keeper in self._keepers.values():
            keeper.alive = True
            self._tell(keeper, order)

    def _until_incident(self) -> Incident | None:
        """Until the ranks have all ended well, or something is wrong."""
        bad: list[tuple[_Keeper, dict[str, Any]]] = []
        until = float("inf")
        while any(k.alive for k in self._keepers.values()) and time.monotonic() < until:
            for keeper, said in self._hear():
                if "gone" in said and int(said["gone"]) == self.generation:
                    self._ended(keeper, said)
                    if said["code"] == 0:
                        self._well.append(keeper)
                        continue
                    at_start = said["code"] > 0 and not said["steps"]
                    if not bad:
                        until = time.monotonic() + (_GRACE_AT_START_S if at_start else _GRACE_S)
                    elif not at_start:
                        until = min(until, time.monotonic() + _GRACE_S)
                    bad.append((keeper, said))
                elif "late" in said and not bad:
                    return self._hung(keeper, said)
                elif "pace" in said:
                    for slow in self._paces.heard(keeper.rank, keeper.node, said, time.monotonic()):
                        self.run.straggles(slow)
        return self._crash(bad) if bad else None

    def _crash(self, bad: Sequence[tuple[_Keeper, dict[str, Any]]]) -> Incident:
        keeper, said = min(bad, key=lambda b: blame(int(b[1]["code"]), str(b[1]["words"])))
        code, words = int(said["code"]), str(said["words"]).strip()
        last_line = words.splitlines()[-1] if words and code > 0 else ""
        return Incident(
            cause="crash",
            rank=keeper.rank,
            node=keeper.node,
            detail=f"rank {keeper.rank} on {keeper.node} {_how_it_ended(code)}{f': {last_line}' if last_line else ''}",
            exit_code=code if code > 0 else 128 - code,
            words=words,
            at_start=self.generation <= 1
            and len(bad) == self.ranks
            and all(s["code"] > 0 and not s["steps"] for _, s in bad),
        )

    def _hung(self, first: _Keeper, late: Mapping[str, Any]) -> Incident:
        """Asks all keepers where their ranks stand, and tells the guilty from those that wait."""
        seen: dict[int, dict[str, Any]] = {}
        until = time.monotonic() + _LOOK_S
        for keeper in self._keepers.values():
            self._tell(keeper, {"do": "look"})
        while len(seen) < self.ranks and time.monotonic() < until:
            for keeper, said in self._hear():
                if "look" in said:
                    seen[keeper.rank] = said["look"]
                elif "gone" in said:
                    self._ended(keeper, said)
        if silent := [r for r in self._keepers if r not in seen]:
            raise _Lost(silent[0], self._keepers[silent[0]].node, "its keeper does not answer")
        ranks, why = guilty(seen)
        rank = ranks[0] if ranks else first.rank
        node = self._keepers[rank].node
        stood = f"in {late['phase']} of step {late['step']} for {late['late']:.0f} s"
        shown = [*ranks[:8], *[r for r in seen if r not in ranks][:2]]
        who = f"rank {', '.join(map(str, ranks[:8]))}{' ...' if len(ranks) > 8 else ''} on {node}" if ranks else "ranks"
        return Incident(
            cause="hung",
            rank=rank if ranks else None,
            node=node if ranks else "",
            detail=f"{who} hung: {why}; rank {first.rank} has stood {stood}",
            exit_code=1,
            phase=str(seen[rank]["phase"]),
            step=int(seen[rank]["step"]),
            stacks="\n".join(
                f"==> rank {r} on {self._keepers[r].node}, in {seen[r]['phase']} of step {seen[r]['step']}\n{seen[r]['stack']}"
                for r in shown
            ),
        )

    def _kill(self) -> None:
        """Every rank is gone when it returns. SIGKILL: a rank in a collective hears nothing else, and SIGTERM asks to save."""
        for keeper in self._keepers.values():
            if keeper.alive:
                self._tell(keeper, {"do": "kill"})
        until = time.monotonic() + _GONE_S
        while left := [k for k in self._keepers.values() if k.alive]:
            for keeper, said in self._hear():
                if "gone" in said:
                    self._ended(keeper, said)
            if time.monotonic() > until:
                raise _Lost(left[0].rank, left[0].node, f"not gone {_GONE_S:g} s after SIGKILL")

    def _end(self, code: int) -> None:
        """The keepers end, with this exit code, and what is left of their ranks."""
        for keeper in self._keepers.values():
            self._tell(keeper, {"do": "end", "code": code})
        until = time.monotonic() + _GONE_S
        while self._keepers and time.monotonic() < until and not self._closing:
            self._hear(losing=True)

    def _ended(self, keeper: _Keeper, said: Mapping[str, Any]) -> None:
        keeper.alive, keeper.port = False, int(said.get("port", 0)) or keeper.port

    # ------------------------------------------------------------------------------------------------------ messages

    def _hear(self, losing: bool = False) -> list[tuple[_Keeper, dict[str, Any]]]:
        """What has been said, after at most a moment. Raises _Lost for a keeper that is gone, but not while `losing` them."""
        heard: list[tuple[_Keeper, dict[str, Any]]] = []
        if self._closing and not losing:
            raise _Lost(None, "", "the ranks' processes have ended" if self._keepers else "no rank has started")
        lost: _Keeper | None = None
        for key, _ in self._selector.select(_TICK_S):
            if key.data is None:
                self._accept()
                continue
            keeper: _Keeper = key.data
            said = self._read(keeper)
            if said is None:
                self._drop(keeper)
                if self._keepers.get(keeper.rank) is keeper:
                    lost = self._keepers.pop(keeper.rank)
                continue
            for message in said:
                if "stopping" in message:
                    self.stopping = True
                heard.append((keeper, message))
        for stranger in [s for s in self._strangers if time.monotonic() - s.since_s > _STRANGER_S]:
            self._drop(stranger)
        if lost is not None and not losing:
            detail = "its keeper is gone"
            if self.generation == 0:
                detail += f" before all {self.ranks} ranks had come: if the launch failed, rank 0's log has its words"
            raise _Lost(lost.rank, lost.node, detail)
        return heard

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # until there is none left
            while True:
                connection, _ = self._listener.accept()
                connection.settimeout(10.0)  # for what is sent: a few bytes, that fit into the system's buffers
                keep_alive(connection)
                stranger = _Keeper(connection)
                self._strangers.append(stranger)
                self._selector.register(connection, selectors.EVENT_READ, stranger)

    def _drop(self, keeper: _Keeper) -> None:
        if keeper in self._strangers:
            self._strangers.remove(keeper)
        self._selector.unregister(keeper.connection)
        keeper.connection.close()

    def _read(self, keeper: _Keeper) -> list[dict[str, Any]] | None:
        """Whole lines of one keeper, none of them its greeting; None where the connection is to be closed."""
        try:
            data = keeper.connection.recv(65_536)
        except OSError:
            return None
        *lines, keeper.buffer = (keeper.buffer + data).split(b"\n")
        if not data or len(keeper.buffer) > (_LINE_BYTES if keeper.rank >= 0 else _HELLO_BYTES):
            return None
        try:
            said: list[dict[str, Any]] = [json.loads(line) for line in lines]
            if said and keeper.rank < 0:
                self._welcome(keeper, said.pop(0))
        except (ValueError, KeyError, TypeError):
            return None
        return said

    def _welcome(self, keeper: _Keeper, hello: Mapping[str, Any]) -> None:
        """Raises ValueError for one that is not ours."""
        rank = int(hello["rank"])
        ours = hmac.compare_digest(str(hello["token"]).encode(), self._token.encode())
        if not ours or rank in self._keepers or not 0 <= rank < self.ranks:
            raise ValueError
        self._strangers.remove(keeper)
        keeper.rank, keeper.node = rank, str(hello["node"])
        self._keepers[rank] = keeper

    def _tell(self, keeper: _Keeper, order: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the next read tells that it is gone
            keeper.connection.sendall(json.dumps(order).encode() + b"\n")


def blame(code: int, words: str) -> int:
    """The smaller, the likelier it is that a rank which ended so is at fault and no victim of another's end."""
    if code < 0 and code != -6:  # SIGABRT is also how a communication library gives up
        return 0
    return 2 if code == -6 or _is_waiting(words) else 1


def guilty(seen: Mapping[int, Mapping[str, Any]]) -> tuple[list[int], str]:
    """Which ranks of a hung generation are at fault, none where it can't be told, and why they are held for it.

    seen: rank -> its phase, step, state (as in /proc) and stack. Those that wait in a collective wait for others.
    """
    if stopped := [r for r in seen if seen[r]["state"] in "Tt"]:
        return stopped, "stopped by a signal (state T)"
    if dead := [r for r in seen if seen[r]["state"] in ("gone", "Z", "X")]:
        return dead, "its process has ended"
    working = [r for r in seen if seen[r]["phase"] != "collective" and not _is_waiting(str(seen[r]["stack"]))]
    behind = _furthest_behind(seen, working or seen)
    if working:
        state = "in uninterruptible sleep (state D)" if seen[behind[0]]["state"] == "D" else "not in a collective"
        return behind, f"{state}, in {seen[behind[0]]['phase']} of step {seen[behind[0]]['step']}"
    if len(behind) < len(seen):
        return behind, f"furthest behind, in {seen[behind[0]]['phase']} of step {seen[behind[0]]['step']}"
    return [], "every rank waits in a collective and none is behind the others"


def _furthest_behind(seen: Mapping[int, Mapping[str, Any]], ranks: Iterable[int]) -> list[int]:
    place = {r: (int(seen[r]["step"]), PHASES.index(str(seen[r]["phase"]))) for r in ranks}
    return [r for r in place if place[r] == min(place.values())]


def _is_waiting(trace: str) -> bool:
    """Whether a traceback, or a dump of stacks, shows a main thread that waits for other ranks."""
    frames = [line for line in trace.splitlines() if line.lstrip().startswith("File ")]
    if not frames:
        return False
    if "most recent call first" in trace:  # faulthandler's; the main thread comes last
        main = trace.rpartition("most recent call first")[2]
        return bool(_WAITS.search(next((f for f in main.splitlines() if f.lstrip().startswith("File ")), "")))
    return bool(_WAITS.search(frames[-1]))


def _how_it_ended(code: int) -> str:
    return f"ended with exit code {code}" if code > 0 else f"was ended by signal {-code}"


class Paces:
    """Compares what the ranks compute by themselves in a step. Pure: told the time."""

    def __init__(self, ranks: int, slow_ratio: float) -> None:
        self._ranks, self._slow_ratio = ranks, slow_ratio
        self.reset()

    def reset(self) -> None:
        self._last: dict[int, tuple[int, float]] = {}  # steps and own seconds so far
        self._pace: dict[int, tuple[float, float, str, int]] = {}  # own seconds a step, when heard, node, step
        self._suspects: dict[int, int] = {}  # rounds in a row
        self._told: set[int] = set()
        self._round_s = 0.0

    def heard(self, rank: int, node: str, said: Mapping[str, Any], now_s: float) -> list[Slow]:
        """Those that are slow from now on, by `slow_ratio` in three comparisons in a row; each once, until it recovers."""
        steps, own_s = int(said["pace"]), float(said["own_s"])
        steps_before, own_before_s = self._last.get(rank, (0, 0.0))
        self._last[rank] = steps, own_s
        if steps_before and steps > steps_before:
            self._pace[rank] = (own_s - own_before_s) / (steps - steps_before), now_s, node, int(said["step"])
        fresh = {r: p for r, p in self._pace.items() if now_s - p[1] < _FRESH_S}
        if len(fresh) < self._ranks or self._ranks < 2 or now_s - self._round_s < _ROUND_S:
            return []
        self._round_s = now_s
        median_s = statistics.median_low(p[0] for p in fresh.values())
        found = []
        for r, (pace_s, _, its_node, step) in fresh.items():
            if pace_s < self._slow_ratio * median_s:
                self._suspects.pop(r, None)
                self._told.discard(r)
                continue
            self._suspects[r] = self._suspects.get(r, 0) + 1
            if self._suspects[r] >= _ROUNDS and r not in self._told:
                self._told.add(r)
                found.append(
                    Slow(rank=r, node=its_node, step=step, ratio=pace_s / median_s, own_s=pace_s, median_s=median_s)
                )
        return found
