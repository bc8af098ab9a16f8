"""Traces as pictures: in a terminal, in a notebook, and as plots (which need matplotlib: specdec[pictures])."""

from specdec.display.picture import Picture
from specdec.display.plots import acceptance_by_depth, ceiling_shares, speed_up_by_length, time_per_step
from specdec.display.rows import rows, rows_running
from specdec.display.text import text
from specdec.display.tree import tree

__all__ = [
    "Picture",
    "acceptance_by_depth",
    "ceiling_shares",
    "rows",
    "rows_running",
    "speed_up_by_length",
    "text",
    "time_per_step",
    "tree",
]
