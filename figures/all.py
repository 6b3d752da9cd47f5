"""Redraw every figure and table: `python figures/all.py [TABLES …] [--out DIR]`.

A figure whose table was not recorded is skipped with a line that says which one.
"""

from __future__ import annotations

import time

from _script import errors_in_one_line, folders

from vlmlayers.figures import draw_all

if __name__ == "__main__":
    tables, out = folders("Redraw every figure and table.")
    start = time.perf_counter()
    with errors_in_one_line():
        outcomes = draw_all(tables, out)
    for outcome in outcomes:
        print(outcome.line)
    drawn = sum(bool(outcome.paths) for outcome in outcomes)
    print(f"{drawn} of {len(outcomes)} drawn into {out} in {time.perf_counter() - start:.0f} s")
