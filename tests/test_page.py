"""The page of results says what the files say, and needs nothing else."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from experiments.bench import sweep_table
from experiments.bench.charts.picture import picture
from experiments.bench.measure import AGAIN
from experiments.bench.report import COLUMNS, EXCEEDING, MARKED, cells, table
from experiments.bench.swept import ALL, sweep
from experiments.page import chart, markdown, page, read
from specdec.display.picture import BLUE, ORANGE

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
    rows = [
        re.findall(r"<td.*?>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", body.split('id="b.json"')[1])
    ]
    expected = [[name, *cells(row, *COLUMNS)] for name, row in results["b.json"]["figures"].items()]
    expected[1][0] = "&lt;i&gt;&amp;"
    assert rows[1:3] == expected
    assert "python run.py &#x27;x=&lt;b&gt;&#x27;" in body and "<b>" not in body and "<i>" not in body


def test_page_needs_nothing_from_elsewhere():
    text = page(*read(RESULTS))
    assert not re.search(r"<link|<img|src=|@import|url\(|fetch|import\(", text)
    assert set(re.findall(r'href="(.)', text)) == {"#"}
    assert {f'href="#{name}"' for name in read(RESULTS)[0] if "/" not in name} <= set(re.findall(r'href="[^"]*"', text))


def drawn(svg, name):
    return list(ET.fromstring(svg).iter(f"{{http://www.w3.org/2000/svg}}{name}"))


def bars(svg):
    """(left, width) of the bars in the panels."""
    found = [rect for panel in drawn(svg, "svg")[1:] for rect in panel.iter("{http://www.w3.org/2000/svg}rect")]
    return [(float(rect.get("x")), float(rect.get("width"))) for rect in found]


def test_bars_are_as_long_as_speed_ups():
    svg = chart({"none": figure(1.0), "fast": figure(2.0)})
    (left, one), (_, two) = bars(svg)
    assert two == pytest.approx(2 * one, abs=0.2)
    [line] = [path.get("d") for path in drawn(svg, "path") if path.get("class") == "one"]
    assert line.startswith(f"M{left + one:.1f} ")
    _, spread = [path.get("d") for path in drawn(svg, "path") if path.get("class") == "range"]
    low, high = (float(x) for x in re.match(r"M([\d.]+) [\d.]+H([\d.]+)", spread).groups())
    assert high - low == pytest.approx(one / 2, abs=0.2)  # from 1.75 to 2.25


def test_a_single_run_has_no_interval():
    alone = figure(1.0, speed_up={"median": 1.0, "low": None, "high": None, "n": 1})
    assert "range" not in [path.get("class") for path in drawn(chart({"none": alone}), "path")]


def test_markdown_has_every_method_of_every_result(folder):
    lines = markdown(*read(folder)).splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:-2]] == [["| sweep/a", "none"], ["| b", "none"], ["| b", "<i>&"]]
    assert len({line.count(" | ") for line in lines[:-2]}) == 1 and lines[-1] == MARKED


def job(speeds, settings, **options):
    """A job of a sweep: tokens per second by method, [round, prompt]."""
    base = speeds["plain"][0][0]
    figures = {name: figure(of[0][0] / base, identical=3) for name, of in speeds.items()}
    made = {"commit": "0123", "cpu": "a CPU", "gpu": None, "command": "python run.py", "options": options}
    return {"settings": {"target": "small", **settings}, **made, "figures": figures, "tokens_per_second": speeds}


def of_task(task, speeds, **more):
    return job({**speeds, AGAIN: speeds["plain"]}, {"task.tasks": f"[{task}]", **more})


TASKS = [
    of_task("qa", {"plain": [[10.0, 10.0]], "text": [[20.0, 20.0]]}),
    of_task("code", {"plain": [[10.0, 10.0]], "text": [[40.0, 5.0]]}),
    of_task("qa", {"plain": [[5.0, 5.0]], "chosen": [[4.0, 4.0]]}, drafter="layer_skip"),
]


def shown(jobs, *columns):
    head, *rows = sweep_table.table(sweep(jobs))
    return [tuple(row[head.index(column)] for column in columns) for row in rows]


def test_job_of_further_methods_adds_them_to_its_task_under_the_name_of_what_was_chosen():
    found = shown(TASKS, "task", "method", "speed-up (95 % CI)", "acceptance length", "= transformers")
    assert [row[:2] for row in found] == [("qa", "text"), ("qa", "layer skip"), ("code", "text"), (ALL, "text")]
    assert found[1][2] == "0.80 (0.55-1.05)"
    assert found[3][2].startswith("~ 2.00 (")  # the median of 2, 2, 4 and 0.5
    assert found[3][3:] == ("2.50", "6/6")
    assert sweep_table.notes(sweep(TASKS))[-1].startswith("Lowest: layer skip, qa: 0.80 ")


def test_methods_are_compared_with_another_than_the_first_by_task_and_over_all():
    peer, text = {"plain": [[10.0, 10.0]], "peer": [[20.0, 10.0]]}, [[40.0, 10.0]]
    jobs = [{**of_task(task, {**peer, "text": text}), "over": {"peer": {}}} for task in ("qa", "code")]
    found = shown(jobs, "task", "method", "over peer")
    assert [(task, method, ratio.split()[0]) for task, method, ratio in found] == [
        *((task, *row) for task in ("qa", "code", ALL) for row in (("peer", "1.00"), ("text", "1.50")))
    ]
    assert shown([*jobs[:1], of_task("code", {**peer, "text": text})], "task", "method", "over peer")[-1][2] == "-"


def test_what_a_job_does_not_say_is_its_default():
    speeds = {"plain": [[1.0]], "text": [[2.0]], AGAIN: [[1.0]]}
    jobs = [job(speeds, {"batch": "8"}, batch=8), job(speeds, {}, batch=1)]
    assert shown(jobs, "batch", "method") == [("1", "text"), ("8", "text")]


def test_a_single_job_is_a_sweep_of_methods():
    alone = job({"plain": [[1.0]], "text": [[2.0]], "chosen": [[4.0]], AGAIN: [[1.0]]}, {"drafter": "model"})
    assert str(sweep([alone])) == "small by method"
    (_, two), (_, four) = bars(picture(sweep([alone])).svg())
    assert four == pytest.approx(2 * two, abs=0.2)


def test_bars_of_all_settings_have_one_scale_and_a_panel_each():
    hot = [
        of_task(task, {"plain": [[10.0]], "text": [[40.0]], "skip": [[20.0]]}, **{"sampling.temperature": "0.7"})
        for task in "ab"
    ]
    cold = [
        of_task(task, {"plain": [[10.0]], "text": [[20.0]], "skip": [[10.0]]}, **{"sampling.temperature": "0"})
        for task in "ab"
    ]
    sheet = picture(sweep([*hot, *cold]))
    assert [re.search(r"greedy|T = 0.7", panel.body)[0] for panel in sheet.panels] == ["greedy", "T = 0.7"]
    widths = [width for _, width in bars(sheet.svg())]
    assert [round(width / widths[0], 1) for width in widths] == [1.0, 0.5] * 3 + [
        2.0,
        1.0,
    ] * 3  # two tasks, and over all of them


def test_numbers_are_drawn_as_lines_in_their_order():
    lengths = {"10": 3.0, "2": 1.5, "4": 2.0}
    jobs = [
        job({"plain": [[1.0]], "chosen": [[speed]], AGAIN: [[1.0]]}, {"drafter": "model", "tree.length": length})
        for length, speed in lengths.items()
    ]
    [panel] = picture(sweep(jobs)).panels
    places = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', panel.body)
    xs, ys = [float(x) for x, _ in places], [float(y) for _, y in places]
    assert xs == sorted(xs) and xs[2] - xs[1] == pytest.approx(xs[1] - xs[0], abs=0.2)
    assert (ys[0] - ys[2]) / (ys[0] - ys[1]) == pytest.approx(3, abs=0.05)  # 1.5 against 0.5


def test_other_combinations_are_a_map_without_the_refused_one():
    jobs = [
        job({"plain": [[1.0]], "chosen": [[speed]], AGAIN: [[1.0]]}, {"drafter": "model", "rule": rule, "dtype": dtype})
        for rule, dtype, speed in (("block", "half", 2.0), ("sibling", "half", 0.5), ("sibling", "full", 1.0))
    ]
    [panel] = picture(sweep(jobs)).panels
    fills = re.findall(r'fill="(.*?)" opacity="(.*?)"', panel.body)
    assert fills == [(BLUE, "0.80"), (ORANGE, "0.80"), (BLUE, "0.00")]
    assert panel.body.count(">-<") == 1


def test_page_of_a_sweep_has_one_table_and_the_refused_combinations_with_their_reasons(tmp_path):
    refused = [
        {"settings": {"target": "small", "task.tasks": task, "rule": rule}, "refused": "nothing < 1\npays"}
        for task in ("qa", "code") for rule in ("block", "level")
    ]  # fmt: skip
    for i, content in enumerate([*TASKS, *refused]):
        (tmp_path / f"{i}.json").write_text(json.dumps(content))
    results, others = read(tmp_path)
    body, text = page(results, others), markdown(results, others)
    assert body.count("<table") == 1 and "chosen" not in body + text
    assert "refused: nothing &lt; 1 pays (task.tasks=code,qa rule=block,level)" in body
    assert "refused: nothing < 1 pays (task.tasks=code,qa rule=block,level)" in text


def test_reason_of_a_refusal_outside_a_sweep_is_on_the_page_and_in_the_table(folder):
    (folder / "skip.json").write_text(json.dumps({"refused": "nothing < 1 pays"}))
    results, others = read(folder)
    assert "skip.json: nothing &lt; 1 pays" in page(results, others)
    assert "skip.json: nothing < 1 pays" in markdown(results, others)


def test_share_above_the_ceiling_is_explained():
    most, more = (figure(1.0, ceiling_share=share) for share in (1.0, 1.2))
    assert EXCEEDING not in table({"block": most, AGAIN: most})
    assert EXCEEDING in table({"block": more, AGAIN: most})
