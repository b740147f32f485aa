"""Tests of README.md: what it names exists, its code is that of main.py, and its answers run."""

import ast
import contextlib
import io
import itertools
import re
import shlex
import sys
from operator import attrgetter

import pytest
import torch
from conftest import ROOT

import ddpm_unet
import dpm_2015
import main

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"main.py": main, "dpm_2015.py": dpm_2015, "ddpm_unet.py": ddpm_unet}
SOURCES = {name: (ROOT / name).read_text(encoding="utf-8") for name in SCRIPTS}
PACKAGES = set(re.findall(r"\w+(?=>=)", (ROOT / "requirements.txt").read_text()))

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
BLOCKS = FENCE.findall(README)
UNFENCED = FENCE.sub("\n", README)
WITHOUT_FORMULAS = re.sub(r"\$`.+?`\$", "", UNFENCED, flags=re.DOTALL)
SPANS = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", WITHOUT_FORMULAS)]
PROSE = re.sub(r"`[^`]+`", "code", WITHOUT_FORMULAS)
SHELL = "".join(text for kind, text in BLOCKS if kind == "bash").replace("\\\n", " ")
DOCSTRINGS = "\n".join(script.__doc__ for script in SCRIPTS.values())
CODE = [*SPANS, *SHELL.splitlines(), *DOCSTRINGS.splitlines()]


def commands():
    """Return (script, options) for each call of a script in README.md and in the docstrings."""
    call = r"\b(?:python3?|torchrun) (?:-\S+ )*(\w+\.py)\b((?: (?!  )[^#&|;<>() ]+)*)"
    found = [match.groups() for line in CODE for match in re.finditer(call, line)]
    pairs = [(script, tuple(shlex.split(words))) for script, words in found if script in SCRIPTS]
    return sorted(set(pairs))


@pytest.mark.parametrize("script, words", commands(), ids=str)
def test_command(script, words, monkeypatch):
    """It parses, with a checkpoint that holds the default options of its data set."""
    words = [re.sub(r"^[A-Z]+$", "32", word) for word in words]  # such as FILE or NAME
    parse = SCRIPTS[script].parse_options
    if script != "main.py":
        dataset = dict(itertools.pairwise(words)).get("--dataset")
        args, _ = parse(["--dataset", dataset] if dataset else [])
        options = {"channels": 1, "num_classes": 10, **vars(args)}
        saved = {"options": options, **dict.fromkeys(["step", "net", "ema", "model", "optimizer"])}
        monkeypatch.setattr(torch, "load", lambda *_, **__: saved)
    parse(words)


def bare(source):
    """Return code without docstrings, comments on lines of their own, yields and indentation."""
    lines = re.sub('""".+?"""', "", source, flags=re.DOTALL).splitlines()
    return [line.strip() for line in lines if not re.match(r"\s*(#|yield|$)", line)]


def test_algorithm_is_that_of_main():
    """What it quotes from main.py is there, line after line."""
    section = README.split("\n## The whole algorithm\n")[1].split("\n## ")[0]
    quotes = "\n\n\n".join(code for kind, code in FENCE.findall(section) if kind == "python")
    for quote in quotes.split("\n\n\n"):
        assert "\n".join(bare(quote)) in "\n".join(bare(SOURCES["main.py"]))
    assert len(bare(quotes)) > 40


def test_plain_program_does_what_main_does(tmp_path, monkeypatch):
    """The same seed gives the same loss and the same samples, if nothing is clipped."""
    monkeypatch.chdir(tmp_path)
    tables, training, sampling = (text for kind, text in BLOCKS if kind == "py")
    plain = {}
    for code in (tables, training.replace("range(2000)", "range(1)"), sampling):
        torch.manual_seed(0)
        exec(code, plain)  # noqa: S102
    schedule = main.make_schedule(plain["T"])
    torch.manual_seed(0)
    model = main.MLP(2, 96, 2, 32, schedule.T)
    x_0 = plain["data"][torch.randint(8000, (1000,))]
    expected = {**vars(schedule), "loss": main.loss_simple(model, schedule, x_0, "eps")}
    for name, value in expected.items():
        torch.testing.assert_close(plain[name], value, rtol=1e-3, atol=1e-6)
    torch.manual_seed(0)
    *_, (_, x) = main.p_sample_loop(plain["model"], schedule, (1000, 2), "eps", limit=1e9)
    torch.testing.assert_close(plain["x"], x, rtol=0.02, atol=0.02)  # rounding errors grow


@pytest.mark.parametrize("code", [text for _, text in BLOCKS if "assert" in text])
def test_answer(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(code, {})  # noqa: S102


def test_flags_exist():
    known = {"--nproc_per_node"}
    for script in SCRIPTS.values():
        with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
            script.parse_options(["--help"])
        known.update(re.findall(r"--\w+", printed.getvalue()))
    parts = "&&".join(CODE).split("&&")
    parts = [part for part in parts if not re.match(r"\s*(pip|ruff|git) ", part)]
    named = {flag for part in parts for flag in re.findall(r"(?<![\w-])--[a-z]\w*", part)}
    assert named - known == set()


def test_links_and_pictures():
    headings = re.findall(r"^#+ (.+)$", UNFENCED.lower(), re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w\- ]", "", one).replace(" ", "-") for one in headings}
    targets = re.findall(r"\]\(([^)\s]+)", PROSE) + re.findall(r'(?:src|href)="([^"]+)', PROSE)
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert [t for t in local if t not in anchors and not (ROOT / t).exists()] == []
    assert {f"images/{path.name}" for path in (ROOT / "images").iterdir()} <= set(local)


def test_files():
    """A file that README names is in the repository, or a script writes one of that name."""
    result = r"[\w.]+\.(?:gif|png|npy|pt|json)"
    written = {name for text in SOURCES.values() for name in re.findall(f'"({result})"', text)}
    found = [re.fullmatch(rf"(?:outputs/\w+/)?({result})", span) for span in SPANS]
    assert {match[1] for match in found if match} - written == set()
    place = r"(images|tests|\.ci|\.github)/.+|[\w/]+\.(py|txt|md)"
    named = {word for word in " ".join(CODE).split() if re.fullmatch(place, word)}
    assert [p for p in named if not (ROOT / p).exists() and not (ROOT / "tests" / p).exists()] == []


def test_functions():
    """What stands as `script.py: name`, and in the table with a column for each script, exists."""
    named = [span for span in SPANS if re.fullmatch(r"\w+\.py: .+", span)]
    table = UNFENCED.split("| | `main.py` | `ddpm_unet.py` | `dpm_2015.py` |\n")[1].split("\n\n")[0]
    for row in table.splitlines()[1:]:
        cells = re.sub(r"\$`.+?`\$", "", row.replace("\\mid", "")).split("|")[2:5]
        for script, cell in zip(("main.py", "ddpm_unet.py", "dpm_2015.py"), cells):
            named += [f"{script}: {name}" for name in re.findall(r"`(.+?)`", cell)]
    for name in named:
        script, path = name.split(": ")
        attrgetter(path)(SCRIPTS[script])
    assert len(named) > 30


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_short_and_stands_alone(script):
    assert len(SOURCES[script].splitlines()) < 400
    nodes = [*ast.walk(ast.parse(SOURCES[script]))]
    names = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    used = {name.split(".")[0].replace("PIL", "pillow") for name in names}
    assert used - sys.stdlib_module_names <= PACKAGES


def test_markup():
    """Backticks, braces of formulas and columns of tables come out even."""
    assert [part for part in UNFENCED.split("\n\n") if part.count("`") % 2] == []
    formulas = re.findall(r"\$`(.+?)`\$", UNFENCED, re.DOTALL)
    formulas += [text for kind, text in BLOCKS if kind == "math"]
    plain = [re.sub(r"\\[{}]", "", formula) for formula in formulas]
    assert [text for text in plain if text.count("{") != text.count("}")] == []
    for table in re.findall(r"(?:^\|.*\n?)+", UNFENCED, re.MULTILINE):
        columns = {len(re.split(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(columns) == 1, table
