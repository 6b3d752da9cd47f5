"""The figures and tables of a paper, drawn from tidy tables; without torch.

Each drawing reads the tables it needs from one or more folders (`figures/tables` of the repository,
or anyone's run folders) and writes into another one: figures as PDF, SVG, PNG and the CSV drawn;
tables as CSV, Markdown and LaTeX.
"""

from __future__ import annotations
