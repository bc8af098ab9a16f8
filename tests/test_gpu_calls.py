"""The three calls for a GPU, with stand-ins for what they launch: order, limits, and what is left behind."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from experiments import gpu
from experiments.bench import parts
from experiments.bench.parts import Part, perform


@pytest.fixture(autouse=True)
def _little_time(monkeypatch):
    monkeypatch.setattr(parts, "FINISH", 0)


def code(text):
    return ("-c", text)


def left(tmp_path, call="some"):
    """What the archive holds: file name -> text."""
    with tarfile.open(tmp_path / f"{call}_call.tar.gz") as archive:
        return {os.path.basename(m.name): archive.extractfile(m).read().decode() for m in archive if m.isfile()}


def ended(tmp_path):
    """What parts.json says: name -> how it ended."""
    return {part["name"]: part["ended"] for part in json.loads(left(tmp_path)["parts.json"])}


def begun(tmp_path, call):
    """A process that performs this plan (source text), once the text "begun" is in a log of it."""
    source = f"import sys; sys.path.insert(0, {str(gpu.ROOT)!r}); from pathlib import Path\n"
    source += "from experiments.bench import parts; from experiments.bench.parts import Part\n"
    source += f"parts.FINISH = 0; parts.EVERY = 0.2; results = Path({str(tmp_path)!r})\n"
    process = subprocess.Popen([sys.executable, "-c", source + f"sys.exit(parts.perform('some', {call}, results, 60))"])
    until(lambda: "begun" in "".join(log.read_text() for log in tmp_path.glob("some_call/*.log")))
    return process


def until(true):
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def over(pids):
    """Fail unless the processes with the numbers in this file have ended, long before they would by themselves."""
    until(lambda: not any(_at_work(pid) for pid in pids.read_text().split()))


def _at_work(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_everything_lands_in_one_archive_whatever_becomes_of_the_parts(tmp_path, capfd):
    fails = Part("fails", code("print('before'); 1 / 0"), 60)
    hangs = Part(
        "hangs", ("-c", "import sys, time; print(sys.argv[1], flush=True); time.sleep(60)", "--junitxml={out}/x.xml"), 3
    )
    well = Part("well", code("import os, sys; open(sys.argv[1], 'w').write(os.environ['MARK'])"), 60, {"MARK": "seen"})
    well = well._replace(command=(*well.command, "{out}/table.md"))
    assert perform("some", [[fails, hangs], [well]], tmp_path, 60) == 1
    assert os.listdir(tmp_path) == ["some_call.tar.gz"]
    found = left(tmp_path)
    assert ended(tmp_path) == {
        "fails": "exit status 1",
        "hangs": "out of time: killed, what it had written is kept",
        "well": "well",
    }
    assert "before" in found["fails.log"] and "ZeroDivisionError" in found["fails.log"]
    assert "--junitxml" in found["hangs.log"] and found["x.xml"] == ""
    assert found["table.md"] == "seen"
    assert "ZeroDivisionError" in capfd.readouterr().out


def test_what_there_is_no_time_for_is_said(tmp_path):
    slow, late = Part("slow", code("import time; time.sleep(60)"), 50), Part("late", code(""), 50)
    assert perform("some", [[slow], [late]], tmp_path, 1) == 1
    found = ended(tmp_path)
    assert found["slow"].startswith("out of time") and found["late"] == "never begun: no time was left"


def test_a_part_without_time_to_finish_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "FINISH", 40)
    assert perform("some", [[Part("late", code("print(1)"), 50)]], tmp_path, 30) == 1
    assert ended(tmp_path) == {"late": "never begun: no time was left"} and "late.log" not in left(tmp_path)


def test_a_benchmark_is_told_how_long_it_may_begin_something(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "FINISH", 40)
    part = Part("told", ("-c", "import sys; print(sys.argv[1:])", "{seconds}"), 500)
    assert perform("some", [[part]], tmp_path, 100) == 0
    assert left(tmp_path)["told.log"].strip() == f"['{100 - parts.FINISH}']"


CHILD = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(os.getpid(), child.pid, file=open("PIDS", "w"), flush=True)
print("begun", flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_call_that_is_stopped_leaves_nothing_at_work_and_everything_packed(tmp_path, how):
    pids = tmp_path / "pids"
    long = CHILD.replace("PIDS", str(pids)) + "time.sleep(60)"
    call = begun(tmp_path, f"[[Part('long', ('-c', {long!r}), 60)], [Part('next', ('-c', ''), 60)]]")
    call.send_signal(how)
    assert call.wait(30) == 128 + how
    over(pids)
    assert ended(tmp_path) == {
        "long": f"killed: the call was stopped by {how.name}",
        "next": f"never begun: the call was stopped by {how.name}",
    }
    assert left(tmp_path)["long.log"] == "begun\n" and not (tmp_path / "some_call").exists()


def test_a_call_under_nohup_goes_on_when_the_terminal_is_closed(tmp_path):
    hangs_up = "import os, signal; os.kill(os.getppid(), signal.SIGHUP)"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert (
            perform("some", [[Part("hangs up", code(hangs_up), 60)], [Part("next", code(""), 60)]], tmp_path, 60) == 0
        )
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_call_that_is_killed_leaves_what_there_was_shortly_before(tmp_path, capfd):
    pid = tmp_path / "pid"
    long = (
        f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); print('begun', flush=True); time.sleep(60)"
    )
    call = begun(tmp_path, f"[[Part('long', ('-c', {long!r}), 60)], [Part('next', ('-c', ''), 60)]]")
    until(lambda: "begun" in left(tmp_path).get("long.log", ""))
    call.kill()
    call.wait()
    os.kill(int(pid.read_text()), signal.SIGKILL)
    assert ended(tmp_path) == {"long": "at work when this was written", "next": "not begun yet"}
    assert perform("some", [[Part("again", code(""), 60)]], tmp_path, 60) == 0
    assert (tmp_path / "some_call.1/long.log").read_text() == "begun\n"  # kept, and said
    assert f"it is now {tmp_path / 'some_call.1'}" in capfd.readouterr().out


def test_an_error_of_the_call_itself_leaves_nothing_at_work(tmp_path, monkeypatch):
    pids = tmp_path / "pids"

    def broken(one, signals):
        until(lambda: pids.exists() and pids.read_text())
        raise BrokenPipeError

    monkeypatch.setattr(parts, "_ended", broken)
    with pytest.raises(BrokenPipeError):
        perform("some", [[Part("long", code(CHILD.replace("PIDS", str(pids)) + "time.sleep(60)"), 60)]], tmp_path, 60)
    over(pids)
    assert "parts.json" in left(tmp_path)


@pytest.mark.parametrize("last", ["os.kill(os.getpid(), 9)", ""])
def test_nothing_that_a_part_started_outlives_it(tmp_path, last):
    pids = tmp_path / "pids"
    perform("some", [[Part("dies", code(CHILD.replace("PIDS", str(pids)) + last), 60)]], tmp_path, 60)
    assert ended(tmp_path) == {"dies": "killed by SIGKILL" if last else "well"}
    over(pids)


def test_seconds_of_parts_side_by_side_are_their_own(tmp_path):
    slow, quick = Part("slow", code("import time; time.sleep(2)"), 60), Part("quick", code(""), 60)
    perform("some", [[slow, quick]], tmp_path, 60)
    seconds = {part["name"]: part["seconds"] for part in json.loads(left(tmp_path)["parts.json"])}
    assert seconds["slow"] >= 2 > 1.5 > seconds["quick"]


def test_what_is_printed_of_many_failures_is_bounded_and_begins_with_the_sum(tmp_path, capfd):
    failing = [
        Part(f"tree_attention.{i}", code("print(300 * 'yyyyyyyyy\\n'); raise SystemExit(1)"), 60) for i in range(20)
    ]
    assert perform("some", [failing], tmp_path, 60) == 1
    printed = capfd.readouterr().out
    assert len(printed) < 12_000
    assert printed.index("0 of 20 parts ended well") < printed.index("the end of its log")
    assert printed.count("the end of its log") == 20 and printed.count("yyyyyyyyy") > 400


def test_counts_of_green_tests_are_printed(tmp_path, capfd):
    perform("some", [[Part("law.1", code("print('.s'); print('1 passed, 1 skipped in 0.01s')"), 60)]], tmp_path, 60)
    assert "== law.1: well after" in (printed := capfd.readouterr().out)
    assert "| 1 passed, 1 skipped in 0.01s\n" in printed


def test_whatever_a_part_leaves_the_call_ends_and_so_does_the_next(tmp_path):
    makes = "import os, sys; os.chdir(sys.argv[1]); os.mkdir('core'); open('core/1', 'w').write('x'); "
    makes += "os.mkfifo('pipe'); os.symlink('nowhere', 'link')"
    for _ in range(2):
        assert perform("some", [[Part("makes", ("-c", makes, "{out}"), 60)]], tmp_path, 60) == 0
        assert left(tmp_path)["1"] == "x" and os.listdir(tmp_path) == ["some_call.tar.gz"]


def test_of_a_large_file_the_end_is_packed_and_the_whole_is_kept(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(parts, "LARGEST", 1000)
    part = Part("dumps", ("-c", "import sys; open(sys.argv[1], 'w').write(2000 * 'a' + 'end')", "{out}/core"), 60)
    assert perform("some", [[part]], tmp_path, 60) == 1
    assert left(tmp_path)["core"] == 997 * "a" + "end" and (tmp_path / "some_call/core").stat().st_size == 2003
    assert "core (the last" in capfd.readouterr().out


def test_a_report_is_made_where_it_is_looked_for_also_in_a_folder_with_an_equals_sign(tmp_path):
    part = Part("cut", ("-c", "", "--junitxml={out}/x.xml"), 60)
    assert perform("some", [[part]], tmp_path / "a=b", 60) == 0
    assert left(tmp_path / "a=b")["x.xml"] == ""


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("version_info", "3.11 or later is needed"),
        ("NEEDED", "has no nowhere_to_be_found: install"),
        ("RESULTS", "nothing can be written to"),
        ("KERNELS", "cannot be unpacked"),
        ("DEVICE", "torch sees no GPU here"),
    ],
)
def test_what_a_call_lacks_is_one_sentence(tmp_path, monkeypatch, value, says):
    (tmp_path / "file").write_text("not an archive")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "smoke"])
    monkeypatch.setattr(gpu, "NEEDED", ("nowhere_to_be_found",) if value == "NEEDED" else ("torch", "pytest"))
    monkeypatch.setattr(gpu, "DEVICE", "raise SystemExit(1)" if value == "DEVICE" else "")
    if value == "version_info":
        monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    folders = {
        "RESULTS": "results",
        "KERNELS": "",
        "TRITON_CACHE_DIR": "cache",
        **({value: "file"} if value.isupper() else {}),
    }
    for name in ("RESULTS", "KERNELS", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / folders[name]) if folders[name] else "")
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(SystemExit) as refused:
        gpu.main()
    assert says in refused.value.code and "\n" not in refused.value.code
    assert not (tmp_path / "results/smoke_call").exists()


@pytest.mark.parametrize("call", gpu.PLANS)
def test_plans_fit_their_nine_minutes_and_run_what_there_is(call):
    *firsts, last = gpu.PLANS[call]
    assert gpu.SECONDS <= 540
    left = gpu.SECONDS - sum(max(part.seconds for part in parts) for parts in firsts)
    assert left >= 100 and all(part.seconds > 40 for parts in firsts for part in parts) and last
    for round_ in gpu.PLANS[call]:
        for part in round_:
            scripts = [word for word in part.command if word.endswith(".py")]
            assert scripts and all((gpu.ROOT / script).exists() for script in scripts)


def test_every_file_of_tests_on_a_device_is_run_and_every_kernel_timed():
    named = [word for rounds in gpu.PLANS.values() for parts in rounds for part in parts for word in part.command]
    tests = {f"kernels/tests/gpu/{path.name}" for path in (gpu.ROOT / "kernels/tests/gpu").glob("test_*.py")}
    benchmarks = {f"kernels/bench/{path.name}" for path in (gpu.ROOT / "kernels/bench").glob("bench_*.py")}
    assert len(tests) >= 7 and len(benchmarks) >= 7 and tests | benchmarks <= set(named)


def test_a_dry_run_leaves_the_table_of_a_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "smoke", "--dry-run"])
    monkeypatch.setattr(
        gpu, "PLANS", {"smoke": [parts for parts in gpu.PLANS["smoke"] if parts[0].name == "bench_splits"]}
    )
    for name, value in (("RESULTS", tmp_path), ("COMMIT", "abc"), ("TRITON_CACHE_DIR", tmp_path / "cache")):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 0
    found = left(tmp_path, "smoke")
    (table,) = (json.loads(text) for name, text in found.items() if name.endswith("_splits.json"))
    assert table["commit"] == "abc" and [row["splits"] for row in table["rows"]] == [None, 2]
    assert all(row["us"] > 0 for row in table["rows"])
