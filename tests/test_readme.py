"""Tests of README.md against the scripts and the files: commands, flags, names, pictures, links, formulas."""

import ast
import itertools
import re
import shlex
import sys
from argparse import ArgumentParser
from collections import Counter
from pathlib import Path

import pytest
import torch

import ddpm_unet
import dpm_2015
import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"main.py": main, "dpm_2015.py": dpm_2015, "ddpm_unet.py": ddpm_unet}
PACKAGES = {"torch", "torchvision", "numpy", "matplotlib", "imageio", "tqdm"}
KINDS = {"swiss_roll": "points", "heart": "points", "heartbeat": "heartbeats", "mnist": "digits"}
RUN = "pip install -r requirements.txt && python main.py"
TEST = "pip install -r requirements.txt pytest && python -m pytest"

# How to read Markdown

FENCE = re.compile(r"^ *(```+|~~~+) *(\w*)[^\n]*\n(.*?)^ *\1 *$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)(`+)(?!`)((?:(?!\n\s*\n).)+?)(?<!`)\1(?!`)", re.DOTALL)
CODED_FORMULA = re.compile(r"\$`(.+?)`\$", re.DOTALL)
DISPLAY = re.compile(r"\$\$(.*?)\$\$", re.DOTALL)
INLINE = re.compile(r"\$([^$]+)\$")


def prose_of(text):
    """The text without comments and fenced blocks."""
    return FENCE.sub("\n", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))


def uncoded(text):
    """The prose without code; $`x`$ is a formula and becomes $x$."""
    return SPAN.sub("code", CODED_FORMULA.sub(r"$\1$", prose_of(text))).replace(r"\$", "")


def parts_of(text):
    """Paragraphs, headings, list items and rows of tables."""
    return re.split(r"\n[ \t]*\n|\n(?=[ \t]*(?:[|>#]|[-*+] |\d+\. ))", text)


def code_of(text):
    """What stands in backticks, and the lines of shell blocks, each on one line."""
    spans = SPAN.finditer(CODED_FORMULA.sub("", prose_of(text)))
    found = [" ".join(span[2].split()).replace(r"\|", "|") for span in spans]
    for _, kind, content in FENCE.findall(text):
        if kind in ("bash", "sh", "shell", "console", ""):
            found += content.replace("\\\n", " ").splitlines()
    return found


def commands_of(code):
    """(script, arguments) of every call of a script."""
    found = []
    for line in code:
        if not re.search(r"\b(python3?|torchrun) .*\.py\b", line):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for _, words in itertools.groupby(lexer, lambda word: word.strip("();<>|&") == ""):
            words = list(words)
            for k, word in enumerate(words):
                if word in SCRIPTS and {"python", "python3", "torchrun"} & set(words[:k]):
                    found.append((word, tuple(words[k + 1 :])))
                    break
    return found


def targets_of(text):
    """Where links and pictures point to."""
    text = INLINE.sub("", DISPLAY.sub("", uncoded(text)))
    found = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"(?:src|href)=[\"']([^\"']+)", text)
    return found + re.findall(r"(?m)^ *\[[^\]]+\]: *(\S+)", text)


def anchors_of(text):
    """The anchors that GitHub gives to headings, and those set by hand."""
    found, seen = re.findall(r"<a (?:id|name)=[\"']([^\"']+)", text), Counter()
    for heading in re.findall(r"(?m)^#{1,6} +(.+?)(?: +#+)? *$", prose_of(text)):
        heading = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def formulas_of(text):
    """All formulas: blocks, $$ and $."""
    blocks = [content for _, kind, content in FENCE.findall(text) if kind == "math"]
    rest = parts_of(DISPLAY.sub("", uncoded(text)))
    return blocks + DISPLAY.findall(uncoded(text)) + [one for part in rest for one in INLINE.findall(part)]


def defects(formula):
    """What is not closed in a formula."""
    text, depth, found, environments = re.sub(r"\\\\|\\[{}]", " ", formula), 0, [], []
    for character in text:
        depth += (character == "{") - (character == "}")
        found += ["}"] * (depth < 0)
    found += ["{"] * (depth > 0)
    for what, name in re.findall(r"\\(begin|end)\s*\{([^}]*)\}", text):
        if what == "begin":
            environments.append(name)
        elif not environments or environments.pop() != name:
            found.append(rf"\end{{{name}}}")
    found += [rf"\begin{{{name}}}" for name in environments]
    left, right = (len(re.findall(rf"\\{side}(?![a-zA-Z])", text)) for side in ("left", "right"))
    return found + [r"\left, \right"] * (left != right)


# How to read the scripts


def parse(name, words):
    return SCRIPTS[name].parse_options(list(words))[0]


def flags_of(name):
    """Every flag of a script, with what argparse knows of it."""
    parsers, original = [], ArgumentParser.parse_args

    def parse_args(self, words):
        parsers.append(self)
        return original(self, words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArgumentParser, "parse_args", parse_args)
        parse(name, [])
    return {flag: action for action in parsers[0]._actions for flag in action.option_strings}


def names_of(tree, prefix=""):
    """Functions, classes, methods, and what modules and classes assign."""
    found = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            found |= names_of(node, f"{prefix}{node.name}.")
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            stored = (part for part in ast.walk(node) if isinstance(part, ast.Name))
            found |= {prefix + part.id for part in stored if isinstance(part.ctx, ast.Store)}
    return found


def strings_of(tree):
    """All strings; of an f-string with 'a' if x else 'b' in it, both."""
    for node in ast.walk(tree):
        pieces = node.values if isinstance(node, ast.JoinedStr) else [node]
        choices = []
        for piece in pieces:
            piece = piece.value if isinstance(piece, ast.FormattedValue) else piece
            either = [piece.body, piece.orelse] if isinstance(piece, ast.IfExp) else [piece]
            choices.append([getattr(part, "value", "?") for part in either])
        if isinstance(node, (ast.Constant, ast.JoinedStr)):
            yield from ("".join(map(str, choice)) for choice in itertools.product(*choices))


CODE = code_of(README)
COMMANDS = commands_of(CODE)
TREES = {name: ast.parse((ROOT / name).read_text(encoding="utf-8")) for name in SCRIPTS}
DOCSTRINGS = {
    name: commands_of(re.findall(r"(?m)^ +((?:python|torchrun) .*?)(?: {2,}.*)?$", script.__doc__))
    for name, script in SCRIPTS.items()
}
FLAGS = {name: flags_of(name) for name in SCRIPTS}
DATASETS = [(name, dataset) for name in SCRIPTS for dataset in FLAGS[name]["--dataset"].choices or ["mnist"]]
WRITERS = {  # which command makes a folder
    parse(name, ["--dataset", dataset]).output_dir: (name, ("--dataset", dataset))
    for name, dataset in DATASETS
}
for name, words in COMMANDS:
    values = dict(itertools.pairwise(words))
    if not {"--checkpoint", "--eval_path", "--resume"} & set(words):
        if "--output_dir" in values:
            WRITERS[values["--output_dir"].rstrip("/")] = (name, words)
        elif "--dataset" in values and not FLAGS[name]["--dataset"].choices:
            WRITERS[parse(name, ["--dataset", values["--dataset"]]).output_dir] = (name, words)


def fill(name, words, folder):
    """The arguments with something for FILE, FOLDER, N and $seed, and with a device that is here."""
    words = list(words)
    for k, word in enumerate(words[1:], 1):
        action = FLAGS[name].get(words[k - 1])
        if words[k - 1] == "--device" and re.fullmatch(r"mps|cuda(:\d+)?", word):
            words[k] = "cpu"
        elif action and re.fullmatch(r"[A-Z][A-Z_\d]*|\$\{?\w+\}?", word):
            path = folder / "model.pt" if action.metavar == "FILE" else folder
            choices = action.choices or [{int: "20", float: "0.5"}.get(action.type, str(path))]
            words[k] = choices[0]
    return words


@pytest.fixture
def checkpoints(monkeypatch, tmp_path):
    """Stands for every model.pt that a command writes: its options. Any other file: those in this list."""
    options = []

    def load(path, *_, **__):
        folder = Path(path).parent
        if folder in (Path(), tmp_path):
            return {name: vars(parse(name, words)) for name, words in options}
        name, words = WRITERS[folder.as_posix()]
        return {name: vars(parse(name, fill(name, words, tmp_path)))}

    monkeypatch.setattr(torch, "load", load)
    return options


# The tests' own eyes

SAMPLE = r"""
# A title, with `code` and [a link](#x)
## Twice
## Twice
| a | `python main.py --seed 1` |
Text `python dpm_2015.py --dataset
  heart` and $x_t$, $`y`$ and \$ 5, [link](file.md#part) ![picture](images/a.png) <img src="images/b.png">
```bash
pip install x && OMP_NUM_THREADS=1 python main.py --dataset mnist \
    --num_epochs 3 > log  # a comment
for seed in 1 2; do torchrun --nproc_per_node=2 ddpm_unet.py --seed $seed; done
python -m pytest
```
$$
\frac{1}{2}
$$
```math
\beta_t
```
"""


def test_reading_markdown():
    assert sorted(commands_of(code_of(SAMPLE))) == [
        ("ddpm_unet.py", ("--seed", "$seed")),
        ("dpm_2015.py", ("--dataset", "heart")),
        ("main.py", ("--dataset", "mnist", "--num_epochs", "3")),
        ("main.py", ("--seed", "1")),
    ]
    assert anchors_of(SAMPLE) == ["a-title-with-code-and-a-link", "twice", "twice-1"]
    assert targets_of(SAMPLE) == ["#x", "file.md#part", "images/a.png", "images/b.png"]
    assert [formula.strip() for formula in formulas_of(SAMPLE)] == [r"\beta_t", r"\frac{1}{2}", "x_t", "y"]


@pytest.mark.parametrize(
    "formula", [r"\frac{1}{2", "a}{b", r"\{a}", r"\begin{aligned} x", r"x \end{cases}", r"\left( x", "{a"]
)
def test_defects_are_seen(formula):
    assert defects(formula)


@pytest.mark.parametrize(
    "formula",
    [
        r"\left\{ x \right. \leftarrow y",
        r"\begin{aligned} a &= {b} \\ \begin{cases} c \end{cases} \end{aligned}",
    ],
)
def test_good_formulas(formula):
    assert not defects(formula)


# Commands


@pytest.mark.parametrize("name", SCRIPTS)
def test_commands_are_there(name):
    assert any(script == name for script, _ in COMMANDS)
    assert DOCSTRINGS[name] and all(script == name for script, _ in DOCSTRINGS[name])


@pytest.mark.parametrize(
    "name, words",
    dict.fromkeys([*COMMANDS, *itertools.chain(*DOCSTRINGS.values())]),
    ids=lambda part: part if isinstance(part, str) else " ".join(part),
)
def test_command(name, words, checkpoints, tmp_path):
    words = fill(name, words, tmp_path)
    dataset = dict(itertools.pairwise(words)).get("--dataset")
    checkpoints.append((name, ["--dataset", dataset] if dataset else []))
    if {"-h", "--help"} & set(words):
        with pytest.raises(SystemExit) as stop:
            parse(name, words)
        assert stop.value.code == 0
    else:
        assert parse(name, words).output_dir


def test_how_to_start_and_to_test():
    assert RUN in CODE and TEST in CODE
    assert TEST in (ROOT / ".ci" / "run").read_text().splitlines()


# Flags


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as stop:
        parse(name, ["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and " ".join(SCRIPTS[name].__doc__.split()) in printed
    for flag, action in FLAGS[name].items():
        assert action.help and re.search(rf" {flag}[ ,]", printed), flag
        assert " ".join(action.help.split()) in printed, flag


@pytest.mark.parametrize("name, dataset", DATASETS)
def test_help_states_the_defaults(name, dataset):
    args, options = vars(parse(name, ["--dataset", dataset])), SCRIPTS[name].OPTIONS
    stated = {
        option: re.search(r" ?\[(.*)\]$", FLAGS[name][f"--{option}"].help)[1]
        for option in {*options, "dataset", "data_dir", "output_dir"}
    }
    assert stated["dataset"] == parse(name, []).dataset
    assert stated["data_dir"] == args["data_dir"]
    assert stated["output_dir"].split(";")[0].replace("DATASET", dataset) == args["output_dir"]
    for option in options:
        each = dict(re.findall(r"(points|heartbeats|digits) ([^\s,]+)", stated[option]))
        assert args[option] in options[option][:-1] and options[option][-1], option
        assert each.get(KINDS[dataset], stated[option]) == str(args[option]), option


def test_flags_exist():
    known = {"--nproc_per_node", "--nnodes", "--standalone"}  # torchrun's own
    known |= {flag for flags in FLAGS.values() for flag in flags}
    named = set()
    for part in itertools.chain(*(line.split("&&") for line in CODE)):
        if not re.match(r"[\s$]*(pip|ruff|git|python3? -m)\b", part):
            named |= set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", part))
    assert named and sorted(named - known) == []


# Names


def test_links_lead_somewhere():
    missing, anchors = [], anchors_of(README)
    for target in targets_of(README):
        path, _, anchor = target.partition("#")
        if not re.match(r"[a-z]+:", target):
            missing += [target] * (anchor not in anchors if not path else not (ROOT / path).exists())
    for path in re.findall(r"(?<![\w./])(?:images|tests|\.ci|\.github)/[\w./-]*\w", "\n".join(CODE)):
        missing += [path] * (not (ROOT / path).exists())
    for path in re.findall(r"[\w./-]+\.py\b", "\n".join(CODE)):
        missing += [path] * (not (ROOT / path).exists() and not (ROOT / "tests" / path).exists())
    assert missing == []


def test_every_picture_is_shown():
    pictures = {path.relative_to(ROOT).as_posix() for path in (ROOT / "images").rglob("*") if path.is_file()}
    assert pictures and sorted(pictures - set(targets_of(README))) == []


def test_functions_exist():
    named = [match for line in CODE if (match := re.fullmatch(r"([\w/]+\.py): *(.+)", line))]
    missing = []
    for match in named:
        names = names_of(TREES[match[1]]) if match[1] in TREES else ()
        wanted = (name.removesuffix("()") for name in re.split(r",\s*|\s+and\s+", match[2]))
        missing += [f"{match[1]}: {name}" for name in wanted if name not in names]
    assert named and missing == []


def test_map_of_functions():
    table = next(
        part for part in re.split(r"\n\s*\n", README) if "| `p_sample_loop` | `p_sample_loop` |" in part
    )
    head, _, *rows = [re.findall(r"(?<=\|)[^|]*(?=\|)", line) for line in table.splitlines()]
    scripts = [re.search("`(.+)`", cell)[1] for cell in head[1:]]
    for cells in rows:
        for script, cell in zip(scripts, cells[1:], strict=True):
            assert set(re.findall("`(.+?)`", cell)) <= names_of(TREES[script]), (script, cell)
    assert sorted(scripts) == sorted(SCRIPTS) and len(rows) > 5


def test_files_that_runs_write():
    pattern = r"[\w-]+\.(?:gif|png|npy|pt|json)"
    written = {text for tree in TREES.values() for text in strings_of(tree) if re.fullmatch(pattern, text)}
    named = re.findall(rf"(?<![\w./*-])(?!images/|tests/)(?:[\w.-]+/)*({pattern})\b", "\n".join(CODE))
    assert {"process.gif", "model.pt", "run.json", "sample.json"} <= written
    assert sorted(set(named) - written) == [] and sorted(written - set(named)) == []


def test_folders_that_runs_write(checkpoints):
    written = set(WRITERS)
    for folder, (name, _) in WRITERS.items():
        written.add(parse(name, ["--checkpoint", f"{folder}/model.pt"]).output_dir)
    named = set(re.findall(r"(?<![\w./])outputs/[\w.-]+", "\n".join(CODE))) - {"outputs/DATASET"}
    assert named and sorted(named - written) == []


# The scripts


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_short_and_stands_alone(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) < 400 and max(map(len, lines)) <= 110
    imported = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0] if node.level == 0 else "." * node.level)
    assert not imported & {Path(script).stem for script in SCRIPTS}
    assert imported - sys.stdlib_module_names <= PACKAGES


def test_requirements_are_lower_bounds():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert all(re.fullmatch(r"[a-z]+>=\d+(\.\d+)*", line) for line in lines)
    assert sorted(line.split(">=")[0] for line in lines) == sorted(PACKAGES)


def test_versions():
    line = re.search(r"Last tested with (Python .*?)\.?(?:\n\s*\n|$)", README, re.DOTALL)[1]
    tested = dict(re.findall(r"(\w+)\s+(\d+(?:\.\d+)+)", line))
    assert tested.keys() >= {"Python", *PACKAGES}
    least = dict(line.split(">=") for line in (ROOT / "requirements.txt").read_text().split())
    for package, version in least.items():
        tested_one, least_one = (tuple(map(int, text.split("."))) for text in (tested[package], version))
        assert tested_one >= least_one, package


# Papers and formulas


def test_papers():
    assert [number for number in ("1503.03585", "2006.11239", "2010.02502") if number not in README] == []
    entries = [content for _, kind, content in FENCE.findall(README) if kind == "bibtex"]
    entries = [entry for entry in re.split(r"(?m)^\s*(?=@)", "\n".join(entries)) if entry.strip()]
    for entry in entries:
        assert re.match(r"@\w+\s*\{\s*[^\s,{}]+\s*,", entry) and not defects(entry), entry
        for field, value in {"title": ".*\\w", "author": ".*\\w", "year": "\\d{4}\\b"}.items():
            assert re.search(rf"(?i)\b{field}\s*=\s*[{{\"]*{value}", entry), f"{field} of {entry}"
    assert len({entry.split(",")[0] for entry in entries}) == len(entries)


def test_code_is_closed():
    prose = prose_of(README)
    assert re.findall(r"(?m)^ *(?:```|~~~).*", prose) == []
    assert [part for part in parts_of(prose) if part.count("`") % 2] == []


def test_formulas():
    assert [(formula, defects(formula)) for formula in formulas_of(README) if defects(formula)] == []


def test_dollars_are_closed():
    text = uncoded(README)
    assert text.count("$$") % 2 == 0
    for formula in DISPLAY.findall(text):  # Markdown sees paragraphs, lists and headings first
        assert formula.strip() and not re.search(r"\n[ \t]*\n|\n[ \t]*([-+*>#]|\d+[.)])\s", formula), formula
        assert not re.search(r"(?m)^[ \t]*(=+|-+)[ \t]*$", formula), formula
    for part in parts_of(DISPLAY.sub("", text)):
        assert part.count("$") % 2 == 0, part
        for formula in INLINE.finditer(part):  # GitHub takes other dollars for dollars
            before, after = part[: formula.start()][-1:], part[formula.end() :][:1]
            assert formula[1] == formula[1].strip() and not re.search(r"\w", before + after), part


def test_tables_have_whole_rows():
    """A | in a formula or in code would begin a new cell, unless it is escaped."""
    for table in re.findall(r"(?m)(?:^ *\|.*\n?)+", prose_of(README)):
        rows = [re.sub(r"^\||\|$", "", row.strip()) for row in table.splitlines()]
        widths = [len(re.split(r"(?<!\\)\|", row)) for row in rows]
        assert len(set(widths)) == 1, table
