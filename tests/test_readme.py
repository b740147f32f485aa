"""Tests of README.md. Every command parses; every flag, file, link, picture and function exists.

The algorithm's lines are those of main.py, the answers run, formulas and tables are well formed.
"""

import ast
import itertools
import re
import runpy
import shlex
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch

import ddpm_unet
import dpm_2015
import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"main.py": main, "dpm_2015.py": dpm_2015, "ddpm_unet.py": ddpm_unet}
PACKAGES = {"torch", "torchvision", "numpy", "matplotlib", "imageio", "pillow", "tqdm"}
TEST = "pip install -r requirements.txt pytest && python -m pytest"
SOURCES = {script: (ROOT / script).read_text(encoding="utf-8") for script in SCRIPTS}

# Markdown: fenced blocks, formulas $`x`$, code in backticks, and prose, which is all the rest
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
UNFENCED = FENCE.sub("\n", README)
FORMULA = re.compile(r"\$`(.+?)`\$", re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
PROSE = SPAN.sub("code", FORMULA.sub("formula", UNFENCED))
BLOCKS = FENCE.findall(README)
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
SHELL = "".join(text for kind, text in BLOCKS if kind in ("bash", "sh", "")).replace("\\\n", " ")
SPANS = [" ".join(span.split()) for span in SPAN.findall(FORMULA.sub("", UNFENCED))]
CODE = SPANS + SHELL.splitlines()
PARAGRAPHS = re.split(r"\n\s*\n", UNFENCED)
TABLES = [
    [re.split(r"(?<!\\)\|", row)[1:-1] for row in table.splitlines()]
    for table in re.findall(r"(?:^\|.*\n?)+", UNFENCED, re.MULTILINE)
]
TARGETS = re.findall(r"\]\(([^)\s]+)", PROSE) + re.findall(r'(?:src|href)="([^"]+)', PROSE)


def commands_of(code):
    """(script, arguments) of each call of a script in lines of code."""
    call = r"\b(?:python3?|torchrun) (?:-\S+ )*(\w+\.py)\b([^#&|;<>()]*)"
    found = [match.groups() for line in code for match in re.finditer(call, line)]
    return [(script, tuple(shlex.split(words))) for script, words in found if script in SCRIPTS]


def flags_of(script):
    """The flags of a script, from what --help prints."""
    with redirect_stdout(StringIO()) as printed, pytest.raises(SystemExit):
        script.parse_options(["--help"])
    lines = re.findall(r"^  (-.*?)(?:   *|$)", printed.getvalue(), re.MULTILINE)
    return set(re.findall(r"--\w+", " ".join(lines)))


def is_balanced(formula):
    """Whether braces, left and right, begin and end are closed."""
    text = re.sub(r"\\\\|\\[{}]", " ", formula)
    depths = [0, *itertools.accumulate((c == "{") - (c == "}") for c in text)]
    closed = len(re.findall(r"\\left\b", text)) == len(re.findall(r"\\right\b", text))
    closed &= len(re.findall(r"\\begin{", text)) == len(re.findall(r"\\end{", text))
    return closed and min(depths) == depths[-1] == 0


def lines_of(code):
    """The lines of code without blank lines, comment lines and spacing."""
    lines = [" ".join(line.split()) for line in code.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


RESULT = r"[\w.]+\.(?:gif|png|npy|pt|json)"
WRITTEN = {script: set(re.findall(f'"({RESULT})"', text)) for script, text in SOURCES.items()}
DOCSTRINGS = "\n".join(script.__doc__ for script in SCRIPTS.values())
DOCSTRING_CALLS = re.findall(r"^    (python .+?)(?:  |$)", DOCSTRINGS, re.MULTILINE)
COMMANDS = [*dict.fromkeys(commands_of(CODE + DOCSTRING_CALLS))]


@pytest.mark.parametrize("script, words", COMMANDS, ids=str)
def test_command(script, words, monkeypatch):
    words = [re.sub(r"^[A-Z]+$", "32", word) for word in words]  # such as FILE or NAME
    parse = SCRIPTS[script].parse_options
    dataset = dict(itertools.pairwise(words)).get("--dataset")
    options = vars(parse(["--dataset", dataset] if dataset else [])[0])
    names = ["shift", "scale", "limit", "examples", "weights", "step", "net", "ema"]
    names += ["model", "optimizer"]
    saved = {**options, **dict.fromkeys(names), "options": options}
    monkeypatch.setattr(torch, "load", lambda *_, **__: saved)
    assert parse(words)[0].dataset


def test_how_to_start_and_to_test():
    assert {TEST.split(" pytest ")[0], "python main.py", TEST} <= set(SHELL.splitlines())
    assert TEST in (ROOT / ".ci" / "run").read_text().splitlines()
    assert all(SCRIPTS.keys() == dict(commands_of(c)).keys() for c in (CODE, DOCSTRING_CALLS))


def test_algorithm_is_that_of_main():
    section = README.split("\n## The whole algorithm\n")[1].split("\n## ")[0]
    shown = lines_of("".join(text for kind, text in FENCE.findall(section) if kind == "python"))
    assert 14 <= len(shown) <= 26
    assert [line for line in shown if line not in lines_of(SOURCES["main.py"])] == []


@pytest.mark.parametrize("code", [block for block in PYTHON if "assert" in block])
def test_answer(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("answer.py").write_text(code)
    runpy.run_path("answer.py")


def test_flags_exist():
    known = {"--nproc_per_node"}.union(*map(flags_of, SCRIPTS.values()))
    parts = [part for line in [*CODE, DOCSTRINGS] for part in line.split("&&")]
    parts = [part for part in parts if not re.match(r"\s*(pip|ruff|git) ", part)]
    named = {flag for part in parts for flag in re.findall(r"(?<![\w-])--[a-z]\w*", part)}
    assert named and sorted(named - known) == []


def test_links_and_pictures():
    headings = re.findall(r"^#+ (.+)$", UNFENCED.lower(), re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w\- ]", "", one).replace(" ", "-") for one in headings}
    local = [target for target in TARGETS if not re.match(r"[a-z]+:", target)]
    assert [t for t in local if t not in anchors and not (ROOT / t).exists()] == []
    assert {f"images/{path.name}" for path in (ROOT / "images").iterdir()} <= set(local)


def test_files():
    """A file named in README is in the repository, or a script writes one of that name."""
    place = r"(images|tests|\.ci|\.github)/.+|[\w/]+\.(py|txt|md)"
    named = {word for word in " ".join(CODE).split() if re.fullmatch(place, word)}
    missing = [p for p in named if not (ROOT / p).exists() and not (ROOT / "tests" / p).exists()]
    assert len(named) > 4 and missing == []
    found = [re.fullmatch(rf"(?:outputs/\w+/)?({RESULT})", span) for span in SPANS]
    results = {match[1] for match in found if match}
    assert len(results) > 4 and results - set().union(*WRITTEN.values()) == set()


def test_tables_of_files():
    """A table of the files in a folder names those that its script writes."""
    tables = [*re.finditer(r"^(\| file .*\n)(\|.*\n)+", UNFENCED, re.MULTILINE)]
    for table in tables:
        folder = re.findall(r"outputs/(\w+)", UNFENCED[: table.end(1)])[-1]
        script = next((s for s in SCRIPTS if folder.startswith(s[:-3])), "main.py")
        assert set(re.findall(r"`([\w.]+\.[a-z]+)`", table[0])) <= WRITTEN[script], script
    assert len(tables) == len(SCRIPTS)


def test_functions():
    """What stands as `script.py: name` and in the table with a column for each script."""
    named = [span for span in SPANS if re.fullmatch(r"\w+\.py: .+", span)]
    for head, _, *rows in TABLES:
        scripts = [cell.strip(" `") for cell in head[1:]]
        if sorted(scripts) == sorted(SCRIPTS):
            cells = [pair for row in rows for pair in zip(scripts, row[1:])]
            named += [f"{script}: {name}" for script, cell in cells for name in SPAN.findall(cell)]
    known = {f"{script}: {name}" for script, module in SCRIPTS.items() for name in dir(module)}
    for script, module in SCRIPTS.items():
        kinds = [kind for kind in vars(module).values() if isinstance(kind, type)]
        known |= {f"{script}: {kind.__name__}.{name}" for kind in kinds for name in vars(kind)}
    assert len(named) > 30 and set(named) - known == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_short_and_stands_alone(script):
    assert len(SOURCES[script].splitlines()) < 400
    nodes = [*ast.walk(ast.parse(SOURCES[script]))]
    names = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
    names += [node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)]
    used = {name.split(".")[0].replace("PIL", "pillow") for name in names}
    assert used - sys.stdlib_module_names <= PACKAGES


def test_requirements_and_versions():
    least = dict(line.split(">=") for line in (ROOT / "requirements.txt").read_text().split())
    line = next(part for part in PARAGRAPHS if part.startswith("Last tested with"))
    tested = dict(re.findall(r"(\w+)\s+(\d+(?:\.\d+)+)", line.replace("Pillow", "pillow")))
    assert least.keys() == PACKAGES and tested.keys() == {"Python", *PACKAGES}
    for package, bound in least.items():  # int fails if there is more than one lower bound
        assert [*map(int, tested[package].split("."))] >= [*map(int, bound.split("."))], package


def test_markup():
    formulas = [text for kind, text in BLOCKS if kind in ("math", "bibtex")]
    formulas += FORMULA.findall(UNFENCED) + re.findall(r"\$([^$]+)\$", PROSE)
    wrong = {
        "fence": re.findall(r"^ *(?:```|~~~).*", UNFENCED, re.MULTILINE),
        "backticks": [part for part in PARAGRAPHS if part.count("`") % 2],
        "dollars": [part for part in re.split(r"\n\s*\n", PROSE) if part.count("$") % 2],
        "formulas": [formula for formula in formulas if not is_balanced(formula)],
        "tables": [table[0] for table in TABLES if len(set(map(len, table))) > 1],
    }
    assert formulas and TABLES and {name: found for name, found in wrong.items() if found} == {}
