"""Tests of what benchmark.py computes itself, that the README shows the rows it prints, and that
the lines which figures.py changes for its experiments are still in main.py, once each.
"""

import ast
import math
import re
from pathlib import Path

import benchmark
import figures
import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

HERE = Path(__file__).resolve().parent


def test_parzen_is_a_mixture_of_normals():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(7, 3, generator=generator)
    x = torch.randn(1100, 3, generator=generator)  # more than one part
    mixture = MixtureSameFamily(
        Categorical(torch.ones(7)), Independent(Normal(samples, torch.tensor(0.3)), 1)
    )
    expected = mixture.log_prob(x).mean().item() / math.log(2)
    assert abs(benchmark.parzen(samples, x, 0.3) - expected) < 1e-3 * abs(expected)


def test_median_does_not_count_the_first_call(monkeypatch):
    now, costs = [0.0], iter((100.0, 3.0, 1.0, 50.0, 2.0, 4.0))
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])

    def work():
        now[0] += next(costs)

    assert benchmark.median_seconds(work) == 3.0


def test_readme_has_every_row_and_no_other():
    rows = []
    for node in ast.walk(ast.parse((HERE / "benchmark.py").read_text())):
        if isinstance(node, ast.Yield):
            name = node.value.elts[0]
            pieces = name.values if isinstance(name, ast.JoinedStr) else [name]
            texts = [p.value if isinstance(p, ast.Constant) else None for p in pieces]
            rows.append("".join(".+" if text is None else re.escape(text) for text in texts))
    readme = (HERE.parent / "README.md").read_text(encoding="utf-8")
    head = "| what | mean and range, or median |\n| --- | --- |\n"
    table = readme.split(head)[1].split("\n\n")[0]
    shown = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()]
    assert all(any(re.fullmatch(row, line) for row in rows) for line in shown)
    assert all(any(re.fullmatch(row, line) for line in shown) for row in rows)


@pytest.mark.parametrize(("title", "options", "changes"), figures.EXPERIMENTS)
def test_experiments_change_lines_that_exist(title, options, changes):
    source = (HERE.parent / "main.py").read_text()
    assert all(source.count(old) == 1 for old in changes), title
    assert figures.main.parse_options(options.split())[1] is None
