"""The page of results says what the files say, and needs nothing else."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from experiments.bench.by_task import ALL, by_setting, lowest, picture, tables
from experiments.bench.measure import AGAIN
from experiments.bench.report import COLUMNS, cells
from experiments.page import chart, markdown, page, read

RESULTS = Path(__file__).resolve().parents[1] / "experiments" / "results"


def figure(median, **more):
    speed = {"median": median, "low": median - 0.25, "high": median + 0.25, "n": 9}
    return {"tokens_per_second": {**speed, "median": 80 * median}, "speed_up": speed, "acceptance_length": 2.5,
            "acceptance_rate": [0.75], "ceiling_share": None, "divergence": None, "loop_share": 0.1, "identical": None,
            "prompts": 3, **more}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    old = figure(1.5)
    del old["divergence"]  # as in files from before it was measured
    two = {"none": figure(1.0), "<i>&": figure(2.0)}
    files = {
        "b.json": {"command": "python run.py 'x=<b>'", "date": "2026-02-01", "figures": two},
        "sweep/a.json": {"command": "python run.py", "date": "2026-01-01", "figures": {"none": old}},
        "other.json": {"figures": {"entropy": 3.5}},
        "list.json": [1, 2],
    }
    (tmp_path / "sweep").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def test_results_come_by_date_and_other_files_are_listed(folder):
    results, others = read(folder)
    assert list(results) == ["sweep/a.json", "b.json"] and list(others) == ["list.json", "other.json"]
    text = page(results, others)
    assert text.index('id="sweep/a.json"') < text.index('id="b.json"') < text.index("<li>list.json</li>")


def test_what_is_being_written_is_not_read(folder):
    before = read(folder)
    (folder / ".abc").mkdir()
    (folder / ".abc" / "c.json").write_text('{"figures": ')
    assert read(folder) == before


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no JSON file"):
        read(tmp_path)


def test_page_has_the_cells_of_the_report(folder):
    results, others = read(folder)
    body = page(results, others)
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", body.split('id="b.json"')[1])]
    expected = [[name, *cells(row, *COLUMNS)] for name, row in results["b.json"]["figures"].items()]
    expected[1][0] = "&lt;i&gt;&amp;"
    assert rows[1:3] == expected
    assert "python run.py &#x27;x=&lt;b&gt;&#x27;" in body and "<b>" not in body and "<i>" not in body


def test_page_needs_nothing_from_elsewhere():
    text = page(*read(RESULTS))
    assert not re.search(r"<script|<link|<img|src=|@import|url\(", text)
    assert set(re.findall(r'href="(.)', text)) == {"#"}
    assert {f'href="#{name}"' for name in read(RESULTS)[0]} <= set(re.findall(r'href="[^"]*"', text))


def test_bars_are_as_long_as_speed_ups():
    drawn = ET.fromstring(chart({"none": figure(1.0), "fast": figure(2.0)}))
    bars, one = [float(rect.get("width")) for rect in drawn.iter("rect")], drawn.findall("path")[-1].get("d")
    left = {float(rect.get("x")) for rect in drawn.iter("rect")}
    assert bars[1] == pytest.approx(2 * bars[0], abs=0.1)
    assert f"M{left.pop() + bars[0]:.1f} " in one  # the line at 1
    low, high = (float(x) for x in re.match(r"M([\d.]+) \d+H([\d.]+)", drawn.findall("path")[1].get("d")).groups())
    assert high - low == pytest.approx(bars[0] / 2, abs=0.1)  # from 1.75 to 2.25


def test_a_single_run_has_no_interval():
    alone = figure(1.0, speed_up={"median": 1.0, "low": None, "high": None, "n": 1})
    assert len(ET.fromstring(chart({"none": alone})).findall("path")) == 1  # the line at 1 only


def test_markdown_has_every_method_of_every_result(folder):
    lines = markdown(*read(folder)).splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [["| sweep/a", "none"], ["| b", "none"], ["| b", "<i>&"]]
    assert len({line.count(" | ") for line in lines}) == 1


def job(task, speeds, **more):
    """A job of a sweep over tasks: tokens per second by method, [round, prompt]."""
    figures = {name: {**figure(speeds[name][0][0] / speeds["plain"][0][0]), "identical": 3} for name in speeds}
    task = {"tasks": [task], "per_task": 2}
    options = {"task": task, "sampling": {"temperature": 0.0}, "dtype": "float32", "batch": 1}
    settings = {"target": "small", **more}
    return {"settings": settings, "options": options, "figures": figures, "tokens_per_second": speeds}


JOBS = [
    job("qa", {"plain": [[10.0, 10.0]], "text": [[20.0, 20.0]], AGAIN: [[10.0, 10.0]]}),
    job("code", {"plain": [[10.0, 10.0]], "text": [[40.0, 5.0]], AGAIN: [[10.0, 10.0]]}),
    job("qa", {"plain": [[5.0, 5.0]], "chosen": [[4.0, 4.0]], AGAIN: [[5.0, 5.0]]}, drafter="skip"),
]


def test_jobs_of_one_task_each_are_one_table_and_one_of_further_methods_adds_a_column():
    [(setting, rows)] = by_setting(JOBS).items()
    assert setting == "small, float32, batch 1, greedy"
    speed_ups, lengths, identical = tables(rows)
    assert speed_ups[0] == ["speed-up (95 % CI)", "plain", "text", AGAIN, "skip"]
    assert [row[0] for row in speed_ups[1:]] == ["qa", "code", ALL]
    assert speed_ups[1][4] == "0.80 (0.55-1.05)" and speed_ups[2][4] == "-" and speed_ups[3][4] == "-"
    assert speed_ups[3][2].startswith("~ 2.00 (")  # the median of 2, 2, 4 and 0.5
    assert lengths[1][2] == "2.50; 0.75" and identical[3][2] == "6/6"
    assert lowest(rows).startswith("Lowest: skip, qa: 0.80 ")


def test_picture_of_tasks_has_a_bar_for_every_method_and_task():
    [(setting, rows)] = by_setting(JOBS).items()
    drawn = ET.fromstring(picture(setting, rows))
    bars = [rect for rect in drawn.iter("{http://www.w3.org/2000/svg}rect") if rect.get("height") != "10"]
    widths = [float(bar.get("width")) for bar in bars]
    assert [round(width / widths[1], 2) for width in widths] == [2.5, 1.0, 5.0, 2.5]  # 2, 0.8, 4, 2


def test_reason_of_a_refusal_is_on_the_page_and_in_the_table(folder):
    (folder / "skip.json").write_text(json.dumps({"refused": "nothing < 1 pays"}))
    results, others = read(folder)
    assert "skip.json: nothing &lt; 1 pays" in page(results, others)
    assert "skip.json: nothing < 1 pays" in markdown(results, others)
