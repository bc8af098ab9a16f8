"""The processes of one call, each with a limit of time, and one archive of what they leave, however they or the call end."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FINISH = 40  # seconds for what was begun in time
EVERY = 30  # seconds between archives, so that a call which is killed loses no more
LARGEST = 32 << 20  # bytes of a file that are packed, its last ones: a core dump takes longer than there is
PRINTED = 6000  # characters of the logs of all parts that failed
LINE = 120  # characters of the last line of a log
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
NAMES = {number.value: number.name for number in signal.Signals}


class Part(NamedTuple):
    """One process."""

    name: str
    command: tuple[str, ...]  # after the Python
    seconds: float  # limit
    environment: dict[str, str] = {}  # noqa: RUF012


class End(NamedTuple):
    """What became of a part."""

    name: str
    ended: str
    seconds: float


class Running(NamedTuple):
    """A part at work."""

    name: str
    process: subprocess.Popen[bytes]
    began: float  # on the monotonic clock, as is `limit`
    limit: float


def perform(name: str, plan: list[list[Part]], results: Path, seconds: float) -> int:
    """Run the parts within `seconds`, leaving RESULTS/<name>_call.tar.gz.

    Args:
        plan: rounds, one after the other; the parts of a round run side by side.

    Returns:
        0; 1 if a part did not end as it should; 128 + the number of the signal that stopped the call.
    """
    call = Call(_fresh(results / f"{name}_call"), time.monotonic() + seconds)
    call.ends = {part.name: End(part.name, "not begun yet", 0.0) for part in itertools.chain(*plan)}
    with _noting(call.signals):
        for parts in plan:
            call.round(parts)
        lacks = call.save()
    bad = [part for part in call.ends.values() if part.ended != "well"]
    print(f"{name}: {len(call.ends) - len(bad)} of {len(call.ends)} parts ended well; {call.out}.tar.gz has", end=" ")
    print(f"not all, so {call.out} stays: {lacks}" if lacks else "everything")
    for part in bad:
        print(f"{part.name}: {part.ended}")
    logs = [part.name for part in bad if call.log(part.name, PRINTED)]
    for log in logs:
        print(f"\n== {log}: the end of its log\n{call.log(log, PRINTED // len(logs))}")
    if not lacks:
        shutil.rmtree(call.out, ignore_errors=True)
    return 128 + call.signals[0] if call.signals else int(bool(bad or lacks))


class Call:
    """A call under way.

    Attributes:
        out: folder of what its parts write.
        ends: by the name of a part, in the order of the plan.
        signals: that asked the call to stop.
    """

    def __init__(self, out: Path, end: float):
        self.out = out
        self.ends: dict[str, End] = {}
        self.signals: list[signal.Signals] = []
        self._end, self._saved = end, 0.0

    def round(self, parts: list[Part]) -> None:
        """One round, until each of its parts has ended or was ended. Nothing that they started outlives it."""
        running: list[Running] = []
        try:
            for part in parts:
                if why := self._why_not(part):
                    self._note(End(part.name, f"never begun: {why}", 0.0))
                else:
                    running.append(self._begin(part))
            self.save()
            while running:
                for one in [*running]:
                    if ended := _ended(one, self.signals):
                        _kill(one.process)
                        running.remove(one)
                        self._note(End(one.name, ended, round(time.monotonic() - one.began, 1)))
                if time.monotonic() - self._saved > EVERY:
                    self.save()
                time.sleep(0.05)
        finally:
            for one in running:  # an error of ours, as a closed standard output
                _kill(one.process)
            self.save()

    def save(self) -> str:
        """Write parts.json and the archive; what the archive lacks."""
        self._saved = time.monotonic()
        try:
            ends = json.dumps([part._asdict() for part in self.ends.values()], indent=1)
            (self.out / "parts.json").write_text(ends + "\n", "utf-8")
            return ", ".join(_pack(self.out))
        except OSError as error:
            return f"it could not be written: {error}"

    def log(self, name: str, size: int) -> str:
        """The last `size` characters of what a part printed."""
        path = self.out / f"{name}.log"
        # any terminal can show ASCII
        return _last(path, 2 * size).decode("ascii", "backslashreplace").strip()[-size:] if path.exists() else ""

    def _why_not(self, part: Part) -> str:
        """Why a part is not begun, if it is not."""
        if self.signals:
            return f"the call was stopped by {self.signals[0].name}"
        return "no time was left" if self._seconds(part) <= 0 else ""

    def _seconds(self, part: Part) -> int:
        """For how long a part may begin something."""
        return round(min(part.seconds, self._end - time.monotonic()) - FINISH)

    def _begin(self, part: Part) -> Running:
        command = [sys.executable, *(word.format(out=self.out, seconds=self._seconds(part)) for word in part.command)]
        for word in command:
            if word.startswith("--junitxml="):
                Path(word.removeprefix("--junitxml=")).touch()  # stays empty if time runs out
        began, environment = time.monotonic(), {**os.environ, **part.environment}
        with (self.out / f"{part.name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
            )
        self.ends[part.name] = End(part.name, "at work when this was written", 0.0)
        return Running(part.name, process, began, min(began + part.seconds, self._end))

    def _note(self, end: End) -> None:
        """For parts.json, and in one line for whoever looks on: of tests, that line ends in how many passed."""
        self.ends[end.name] = end
        after = f" after {end.seconds:.0f} s" if end.seconds else ""
        line = self.log(end.name, LINE).splitlines()[-1:]
        print(f"== {end.name}: {end.ended}{after}", *line, sep=" | ", flush=True)


def _ended(one: Running, signals: list[signal.Signals]) -> str:
    """How a part ended, or why it must end now; "" if it may go on."""
    status = one.process.poll()
    if status is not None:
        return outcome(status)
    if signals:
        return f"killed: the call was stopped by {signals[0].name}"
    return "out of time: killed, what it had written is kept" if time.monotonic() >= one.limit else ""


def outcome(status: int) -> str:
    """What a process's status says."""
    if status < 0:
        return f"killed by {NAMES.get(-status, f'signal {-status}')}"
    return f"exit status {status}" if status else "well"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """A part and all that it started, of which something may be at work when the part itself has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the driver holds nothing up
        process.wait(2)


@contextlib.contextmanager
def _noting(signals: list[signal.Signals]) -> Iterator[None]:
    """Signals that stop a process are noted and do nothing else, so that packing is not cut off; ignored ones stay so."""
    before = {number: signal.getsignal(number) for number in STOPS}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}  # `nohup`
    for number in before:
        signal.signal(number, lambda number, _: signals.append(signal.Signals(number)))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fresh(out: Path) -> Path:
    """An empty folder of this name. One that is there, of a call that was killed, is moved aside."""
    if out.exists():
        aside = next(path for i in itertools.count(1) if not (path := out.with_name(f"{out.name}.{i}")).exists())
        out.rename(aside)
        print(f"{out} was there, of a call that was killed: it is now {aside}")
    out.mkdir(parents=True)
    return out


def _pack(out: Path) -> list[str]:
    """Anew, and in one move: a call that is killed leaves the archive before. Returns what is not all in it."""
    archive, lacks = out.with_suffix(".tar.gz"), []
    new = archive.with_suffix(".new")
    with tarfile.open(new, "w:gz", compresslevel=6) as file:
        for path in sorted(Path(folder, name) for folder, _, names in os.walk(out) for name in names):
            member = tarfile.TarInfo(path.relative_to(out.parent).as_posix())
            try:
                if not path.is_file():
                    continue
                content, status = _last(path, LARGEST), path.stat()  # parts may be writing
            except OSError as error:
                lacks.append(f"{path.name} ({error.strerror})")
                continue
            if status.st_size > LARGEST:
                lacks.append(f"{path.name} (the last {LARGEST >> 20} of {status.st_size >> 20} MiB)")
            member.size, member.mtime = len(content), int(status.st_mtime)
            file.addfile(member, io.BytesIO(content))
    new.replace(archive)
    return lacks


def _last(path: Path, size: int) -> bytes:
    """The end of a file."""
    with path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - size, 0))
        return file.read(size)
