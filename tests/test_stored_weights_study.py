"""The tables and the picture of what weights cost by how they are stored."""

from experiments.studies.stored_weights import FLOORS, FORMATS, TOKENS, picture, products, table

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
    assert "48.0" in table("pass", {"figures": FIGURES})


def test_the_picture_shows_speed_ups_and_those_of_reading_alone():
    drawn = picture({"1 x 2": PART, "pass": {}}).svg()
    assert "int8, tokens 8: 2.00" in drawn
    for name, most in (("bf16", 4), ("int8", 8), ("int4", 16)):
        assert f"{FLOORS[name]}, tokens 1: {most}.00" in drawn
