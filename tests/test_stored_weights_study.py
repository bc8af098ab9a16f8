"""The tables and the picture of what weights cost by how they are stored."""

import matplotlib.pyplot as plt

from experiments.studies.stored_weights import FORMATS, MODEL, PASSES, TOKENS, picture, products, table

# float32 takes twice as long as reading it, and what is stored the time of reading float32, whatever the number of tokens
ROW = {"ms": 48.0, "ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0}
FIGURES = {f"{n} | {name}": ROW for name in FORMATS for n in TOKENS} | {
    f"{n} | float32, torch": {**ROW, "ratio": 2.0} for n in TOKENS
}
PART = {"figures": FIGURES, "share": {"bf16": 0.5, "int8": 0.25, "int4": 0.125}, "matrices": 4}


def test_every_way_multiplies_as_float32_within_what_its_format_rounds(monkeypatch):
    monkeypatch.setattr("experiments.studies.stored_weights.READ", 4 * 64 * 96)
    timed, share = products(96, 64)
    assert share == {"bf16": 0.5, "int8": 0.25 + 1 / 64, "int4": 0.125 + 1 / 32}
    exact = timed["16 | float32, torch"]()[0]
    for name in {name.split(" | ")[1] for name in timed if name.startswith("16 |")}:
        found = timed[f"16 | {name}"]()[0]
        assert (found - exact).norm() <= (0.11 if name == "int4" else 0.02) * exact.norm(), name


def test_the_table_gives_microseconds_of_one_matrix_and_times_the_floor():
    rows = {line.split("|")[1].strip(): line for line in table("1 x 2", PART).splitlines()}
    assert rows["int8"].count("12000 (4.0)") == len(TOKENS) and "12000 (2.0)" in rows["bf16"]
    assert rows["float32, torch"].count(" 12000 |") == len(TOKENS)
    whole = table(MODEL, {"figures": FIGURES, "share": PART["share"]})
    assert "48.0 (8.0)" in whole and "milliseconds" in whole


def test_the_picture_shows_times_of_a_pass_and_of_reading_its_bytes():
    figures = {"reading | sums": {**ROW, "ms": 40.0}, **{f"{n} | {name}": ROW for n in TOKENS for name in PASSES}}
    axes = picture({MODEL: {"figures": figures, "share": {"float32": 1.0, "plain": 1.0, **PART["share"]}}})
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines if not line.get_label().startswith("_")}
    assert list(drawn) == [*PASSES] and list(drawn["int8"]) == [48.0] * len(TOKENS)
    assert [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"] == [40.0, 40.0, 20.0, 10.0, 5.0]
    plt.close(axes.figure)
