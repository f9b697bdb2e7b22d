"""The keeper of one rank: imports what the rank needs, once, and forks it, as often as the lead says (slurm/lead.py).

It is what srun (or, on this machine, the local lead) starts. It stays tiny: no thread, no CUDA, no process group, so that forking
is safe and a restart costs a fork instead of an import; and no module that takes a megabyte (dataclasses, pathlib), as thousands
share one machine in a rehearsal. It sees the end and the pulse of its rank from outside, tells the lead,
passes signals on, and ends with its rank when the lead is gone. The rank in turn dies with its keeper.

One JSON object a line, over one connection to the lead:

    keeper -> lead   {token, rank, node, pid}   {ready, port}   {gone: generation, code, words, steps}   {late, phase, step}
                     {look: {...}}   {pace: steps, own_s, step}   {stopping: "SIGTERM"}
    lead -> keeper   {do: start, generation, port, hang_s, slow_s}   {do: kill}   {do: look}   {do: end, code}
"""

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import mmap
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from slurm import signals
from slurm.pulse import SIZE_BYTES, Beat, Pulse, Watch, pulse
from slurm.rendezvous import Place, place

LEAD, TOKEN = "ARRIERO_LEAD", "ARRIERO_LEAD_TOKEN"  # host:port, and what a keeper proves itself with
GENERATION = "ARRIERO_GENERATION"  # of the rank that runs: 1 is the first, each restart takes the next
DUMP = (
    signal.SIGRTMIN + 1
)  # a rank writes its stacks down: faulthandler does it also while the interpreter's lock is held
_WORDS_BYTES = 65_536  # of a rank's last words
_PACE_S, _PACE_STEPS = 2.0, 10  # the pace is told at most so often
_CONNECT_S = 60.0

Run = Callable[[str], Any]


def keep(entry: str) -> Run | int:
    """In the keeper, once all is over: its exit code. In every rank that it forks: the function that the rank runs."""
    return _Keeper(place()).serve(entry)


class _Keeper:
    def __init__(self, here: Place) -> None:
        self.here = here
        self.child: int | None = None
        self.generation = 0
        self._port = here.master_port - 1
        self._stops: list[int] = []  # stop signals that came
        self._wake, wake = socket.socketpair()
        self._wake.setblocking(False)
        wake.setblocking(False)
        self._wake_end = wake
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        for number in (*signals.STOP_SIGNALS, signal.SIGCHLD):
            signal.signal(number, lambda number, frame: None)  # the wakeup socket tells
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.STOP_SIGNALS)  # the local lead starts it with them blocked
        self._memory = mmap.mmap(-1, SIZE_BYTES)  # shared with the rank
        self._pulse = Pulse()
        self._pulse.attach(self._memory)
        self._words = os.memfd_create("last-words")  # a rank's stacks and its last traceback
        self._watch: Watch | None = None
        self._told_late = False
        self._paced = (0.0, 0)  # when the pace was told last, and how many steps it was
        self._lead = _connect(os.environ[LEAD])
        self._buffer = b""
        self._say(token=os.environ[TOKEN], rank=here.rank, node=here.node, pid=os.getpid())

    def serve(self, entry: str) -> Run | int:
        module, _, function = entry.partition(":")
        try:
            run: Run = getattr(importlib.import_module(module), function)
        except Exception:
            import traceback

            self._say(gone=0, code=1, words=traceback.format_exc(), steps=0)
            raise
        gc.collect()
        gc.freeze()  # else the collector's marks copy every page into every rank
        self._say(ready=True, port=self._next_port())
        while True:
            orders = self._wait()
            if orders is None:
                print(f"keeper of rank {self.here.rank}: the lead is gone, so this rank ends", flush=True)
                self._end_child()
                return 1
            for order in orders:
                match order["do"]:
                    case "start" if self._fork(order):
                        return run
                    case "kill" if self.child is not None:
                        os.kill(self.child, signal.SIGKILL)
                    case "look":
                        self._say(look=self._look())
                    case "end":
                        self._end_child()
                        return int(order["code"])

    def _wait(self) -> list[dict[str, Any]] | None:
        """The lead's next orders, none where something else happened; None where the lead is gone."""
        ready, _, _ = select.select(
            [self._lead, self._wake], [], [], self._watch.every_s if self._watch and self.child else None
        )
        if self._wake in ready:
            for number in self._wake.recv(4096):
                if number in signals.STOP_SIGNALS:
                    self._stop(number)
        if self.child is not None:
            self._reap(os.WNOHANG)
        if self.child is not None:
            self._observe()
        if self._lead not in ready:
            return []
        try:
            data = self._lead.recv(65_536)
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]

    # ----------------------------------------------------------------------------------------------------- the rank

    def _fork(self, order: dict[str, Any]) -> bool:
        """Whether this is the rank, just forked."""
        self.generation, self._told_late, self._paced = int(order["generation"]), False, (time.monotonic(), 1)
        self._memory[:] = bytes(SIZE_BYTES)
        os.ftruncate(self._words, 0)
        os.lseek(self._words, 0, os.SEEK_SET)
        self._watch = Watch(order["hang_s"], order["slow_s"])
        sys.stdout.flush()
        sys.stderr.flush()
        keeper = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOP_SIGNALS)  # none is lost between two handlers
        self.child = os.fork()
        if self.child == 0:
            self._become_rank(keeper, int(order["port"]))
            return True
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.STOP_SIGNALS)
        return False

    def _become_rank(self, keeper: int, port: int) -> None:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives its keeper
        if os.getppid() != keeper:
            os._exit(1)
        signal.set_wakeup_fd(-1)
        for end in (self._lead, self._wake, self._wake_end):
            end.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signals.note_early([signal.Signals(n).name for n in self._stops])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.STOP_SIGNALS)
        faulthandler.enable(self._words)
        faulthandler.register(DUMP, self._words, all_threads=True)
        sys.excepthook = self._write_last_words
        os.environ["ARRIERO_MASTER_PORT"], os.environ[GENERATION] = str(port), str(self.generation)
        pulse.attach(self._memory)

    def _write_last_words(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        import traceback

        os.write(self._words, "".join(traceback.format_exception(kind, error, trace)).encode()[-_WORDS_BYTES:])
        sys.__excepthook__(kind, error, trace)

    def _reap(self, options: int) -> None:
        """Tells the lead, where the rank has ended."""
        assert self.child is not None
        pid, status = os.waitpid(self.child, options)
        if not pid:
            return
        self.child, code, words = None, os.waitstatus_to_exitcode(status), self._read_words(0)
        if code < 0 and words:  # the fault handler's, of a SIGSEGV: a traceback is in the log already
            print(words, file=sys.stderr, flush=True)
        self._say(gone=self.generation, code=code, words=words, steps=self._pulse.read().steps, port=self._next_port())

    def _end_child(self) -> None:
        if self.child is not None:
            os.kill(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)
            self.child = None

    def _stop(self, number: int) -> None:
        """A stop signal is the rank's; Slurm may have sent it there as well, which does no harm."""
        self._stops.append(number)
        if self.child is not None:
            os.kill(self.child, number)
        self._say(stopping=signal.Signals(number).name)

    # ------------------------------------------------------------------------------------------------ what it sees

    def _observe(self) -> None:
        assert self._watch is not None
        now_s, beat = time.monotonic(), self._pulse.read()
        late_s = self._watch.look(now_s, beat)
        if late_s is not None and not self._told_late:
            self._told_late = True
            self._say(late=late_s, phase=beat.phase, step=beat.step)
        if now_s - self._paced[0] >= _PACE_S and beat.steps - self._paced[1] >= _PACE_STEPS:
            self._paced = now_s, beat.steps
            self._say(pace=beat.steps, own_s=beat.own_s, step=beat.step)

    def _look(self) -> dict[str, Any]:
        """Where the rank stands: its pulse, its state in the system's eyes, its stacks."""
        beat: Beat = self._pulse.read()
        seen: dict[str, Any] = {"phase": beat.phase, "step": beat.step, "state": "gone", "stack": ""}
        if self.child is None:
            return seen
        status = _read(f"/proc/{self.child}/status")
        seen["state"] = next((line.split()[1] for line in status.splitlines() if line.startswith("State:")), "?")
        kernel = "\n".join(
            f"{name}: {text}" for name in ("wchan", "stack") if (text := _read(f"/proc/{self.child}/{name}").strip())
        )
        seen["stack"] = f"state {seen['state']}\n{kernel}\n"
        if seen["state"] not in "TtZX":  # a stopped process hears no signal
            seen["stack"] += self._dumped()
        return seen

    def _dumped(self) -> str:
        """The rank's stacks, as faulthandler writes them."""
        assert self.child is not None
        before = size = os.fstat(self._words).st_size
        os.kill(self.child, DUMP)
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            time.sleep(0.05)
            size, last = os.fstat(self._words).st_size, size
            if size == last > before:
                break
        return self._read_words(before) or "it writes no stacks down"

    def _read_words(self, begin: int) -> str:
        size = os.fstat(self._words).st_size
        begin = max(begin, size - _WORDS_BYTES)
        return os.pread(self._words, size - begin, begin).decode(errors="replace")

    # ------------------------------------------------------------------------------------------------------ the means

    def _say(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # the next read tells that the lead is gone
            self._lead.sendall(json.dumps(message).encode() + b"\n")

    def _next_port(self) -> int:
        """A port for the ranks' rendezvous that is free here now, another one each time: a rank of before may still ask there."""
        while True:
            self._port += 1
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("", self._port))
                    return self._port
                except OSError:
                    continue


def keep_alive(connection: socket.socket) -> None:
    """A peer whose machine has vanished is noticed within half a minute, also where nothing is said."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    until = time.monotonic() + _CONNECT_S
    while True:
        try:
            connection = socket.create_connection((host, int(port)), timeout=10.0)
        except OSError as error:
            if time.monotonic() > until:
                raise ConnectionError(f"the run's supervisor at {address} can't be reached: {error}") from None
            time.sleep(0.5)
            continue
        connection.settimeout(None)
        keep_alive(connection)
        return connection


def _read(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""
