"The project as a whole: its files agree with each other, and nothing slips in that shouldn't be public."

import ast
import configparser
import contextlib
import importlib.metadata
import io
import json
import re
import shlex
import subprocess
import sys
import tokenize
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def named(path):
    return path.relative_to(ROOT).as_posix()


def project_files():
    "What is, or would be, committed; without git, everything that .gitignore doesn't name"
    git = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True
    )
    if git.returncode == 0:
        paths = [ROOT / n for n in git.stdout.split("\0") if n]
    else:
        ignored = [l.strip().rstrip("/") for l in (ROOT / ".gitignore").read_text().splitlines()] + [".git"]
        paths = [
            p
            for p in ROOT.rglob("*")
            if not any(Path(part).match(i) for part in p.relative_to(ROOT).parts for i in ignored if i)
        ]
    return sorted(p for p in paths if p.is_file())


def code_cells(path):
    "Source, directives and syntax tree of each code cell of a notebook"
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        src = "".join(cell["source"])
        flags = set(re.findall(r"^\s*#\s*\|\s*(\w+)", src, re.M))
        src = re.sub(r"^(\s*)[%!]+(?=\w).*$", r"\1pass", src, flags=re.M)  # magics are no Python
        if not re.match(r"\s*pass", src):
            yield src, flags, ast.parse(src)


# ---- settings.ini and pyproject.toml


def setting(key):
    ini = configparser.ConfigParser(interpolation=None)
    ini.read(ROOT / "settings.ini")
    return ini["DEFAULT"][key]


def test_settings_equal_pyproject():
    p, tool = PYPROJECT["project"], PYPROJECT["tool"]["nbdev"]
    import specs_nb

    assert setting("version") == specs_nb.__version__
    assert setting("lib_name") == setting("repo") == p["name"]
    assert setting("description") == p["description"]
    assert {"apache2": "Apache-2.0"}[setting("license")] == p["license"]
    assert f">={setting('min_python')}" == p["requires-python"]
    assert setting("keywords").split() == p["keywords"]
    assert setting("author") == p["authors"][0]["name"]
    assert dict(s.split("=") for s in setting("console_scripts").split()) == p["scripts"]
    for key in ("nbs_path", "lib_path", "doc_path", "tst_flags"):
        assert setting(key) == tool[key]
    for key in ("recursive", "black_formatting", "jupyter_hooks", "clean_ids"):
        assert (setting(key) == "True") == tool[key]
    assert setting("allowed_out_metadata_keys").split() == tool["allowed_out_metadata_keys"]


def test_requirements_equal_pyproject():
    p = PYPROJECT["project"]
    assert setting("requirements").split() == p["dependencies"]
    for extra, needs in p["optional-dependencies"].items():
        assert setting(f"{extra}_requirements").split() == needs, extra


def test_imports_are_declared():
    """The base install is enough: what a module imports is required, and what an extra brings is imported
    inside functions"""

    def names(reqs):
        return {re.match(r"[\w.-]+", r)[0].lower().replace("_", "-") for r in reqs}

    base = names(PYPROJECT["project"]["dependencies"])
    extras = {n for reqs in PYPROJECT["project"]["optional-dependencies"].values() for n in names(reqs)}
    dists, missing = importlib.metadata.packages_distributions(), []
    for path in (ROOT / "specs_nb").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Import, ast.ImportFrom)) or getattr(node, "level", 0):
                continue
            for full in [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]:
                top = full.split(".")[0]
                if top in sys.stdlib_module_names or top == "specs_nb":
                    continue
                owners = names(dists.get(top, [top]))
                allowed = base if node in tree.body else base | extras
                if not owners & allowed:
                    missing.append(
                        f"{named(path)}:{node.lineno} imports {full}, which the project does not require"
                    )
    assert not missing, "\n".join(missing)


# ---- notebooks


ROOMS = ("tutorials", "method", "engines", "inputs", "scale", "study", "appendix")
FLOOR = {"core", "world", "data", "formats"}  # of the method: what every room stands on
# room → what its modules may import from outside it: rooms, or modules of the method
MAY_IMPORT = {
    "method": {"engines", "inputs"},
    "engines": FLOOR,
    "inputs": FLOOR | {"grading", "rewards"},
    "scale": {"method", "engines", "inputs"},
    "study": {"method", "engines", "inputs"},
}
FRONT_DOOR = "pipeline"  # the command line, which opens every room


def modules():
    "module → (room, number of the notebook that exports it)"
    found = {}
    for path in NOTEBOOKS:
        m = re.search(r"#\s*\|\s*default_exp\s+(\S+)", "\n".join(src for src, *_ in code_cells(path)))
        if m:
            found[m[1]] = (path.parent.name, int(re.match(r"\d+", path.name)[0]))
    return found


def package_file(module):
    return ROOT / f"specs_nb/{module.replace('.', '/')}.py"


def imported(
    module,  # such as `engines.generate`
    tree,  # its syntax tree
):
    "What it imports from specs_nb, also inside functions: (module, line)"
    package = ["specs_nb", *module.split(".")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            full = [f"{base}.{a.name}" for a in node.names] if package_of_rooms(base) else [base]
        else:
            continue
        for name in full:
            if name.startswith("specs_nb.") and not name.startswith("specs_nb._"):
                yield name.removeprefix("specs_nb."), node.lineno


def package_of_rooms(name):
    return name == "specs_nb" or name.removeprefix("specs_nb.") in ROOMS


def wrong_imports(module, tree, known):
    "Sentences on imports that go the wrong way between rooms, or to a later notebook of the same room"
    room, number = known[module]
    for other, line in imported(module, tree):
        if other not in known:
            yield f"{module}:{line} imports {other}, which no notebook exports (an old path?)"
            continue
        its_room, its_number = known[other]
        if its_room == room:
            if its_number >= number and other != module:
                yield f"{module}:{line} imports {other}, which comes later in {room}/"
        elif module != FRONT_DOOR and not {its_room, other} & MAY_IMPORT[room]:
            yield f"{module}:{line} imports {other}: {room}/ may not import from {its_room}/"


def test_every_notebook_has_a_room():
    found = {p.parent.name for p in NOTEBOOKS if p.name != "index.ipynb"}
    assert found <= set(ROOMS), found - set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_numbers_are_unique(room):
    names = [p.name for p in (ROOT / "nbs" / room).glob("*.ipynb")]
    numbers = [re.match(r"\d\d_", name) for name in names]
    assert names and all(numbers), f"each notebook of {room}/ begins with two digits: {names}"
    assert len({m[0] for m in numbers}) == len(names), names


def test_module_lies_in_the_room_of_its_notebook():
    for module, (room, _) in modules().items():
        package = module.rpartition(".")[0]
        assert package == {"method": ""}.get(room, room), f"{module} is told in {room}/"
        assert room not in ("tutorials", "appendix"), f"{room}/ has no modules, but exports {module}"


@pytest.mark.parametrize("module", modules())
def test_imports_keep_to_the_rooms(module):
    wrong = list(wrong_imports(module, ast.parse(package_file(module).read_text()), modules()))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "module, planted, said",
    [
        ("grpo", "from .study.stats import holm", "method/ may not import from study/"),
        ("grpo", "from .scale import fleet", "method/ may not import from scale/"),
        ("grpo", "from .coldstart import coldstart", "comes later in method/"),
        ("grpo", "from .generate import answer", "no notebook exports"),
        ("engines.models", "def f():\n    from ..grpo import grpo", "engines/ may not import from method/"),
        ("engines.models", "import specs_nb.study.stats", "engines/ may not import from study/"),
        ("study.stats", "from .report import write_report", "comes later in study/"),
        ("scale.fleet", "from specs_nb.study import stats", "scale/ may not import from study/"),
    ],
)
def test_a_wrong_import_is_found(module, planted, said):
    [wrong] = wrong_imports(module, ast.parse(planted), modules())
    assert said in wrong
    right = "from .core import Config" if "." not in module else "from ..core import Config"
    assert not list(wrong_imports(module, ast.parse(right), modules()))


def test_old_paths_are_the_new_modules():
    "`specs_nb.sources` and the like: one line a file, and the very module that moved"
    old = [p for p in (ROOT / "specs_nb").glob("[a-z]*.py") if p.stem not in modules()]
    assert len(old) > 15
    code = ["import importlib, sys"]
    for path in old:
        [line] = path.read_text().splitlines()
        new = re.findall(r'"(specs_nb\.[\w.]+)"', line)
        assert line.startswith("from specs_nb._moved import moved; moved(__name__, ") and new, line
        code += [
            f"old, new = map(importlib.import_module, ('specs_nb.{path.stem}', '{new[0]}'))",
            (
                "assert old is new"
                if len(new) == 1
                else "assert all(getattr(old, n) is vars(new)[n] for n in new.__all__)"
            ),
            f"from specs_nb import {path.stem} as again; assert again is old",
        ]
    code += ["from specs_nb.sources import infer; assert infer('How many?', '3')[0] == '3'"]
    code += ["from specs_nb.grading import grade; assert grade('3', '3', 'number')"]
    run = subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_kernel_is_named(path):
    "Else JupyterLab asks for one at every opening"
    assert (
        json.loads(path.read_text())["metadata"].get("kernelspec", {}).get("name") == "python3"
    ), "metadata.kernelspec.name should be python3"


def undocumented(src, tree):
    "Public definitions of an export cell without docstring, and parameters without a comment of their own"
    # fastcore reads the comment behind a parameter, or one that fills the line before it
    comments = [t for t in tokenize.generate_tokens(io.StringIO(src).readline) if t.type == tokenize.COMMENT]
    commented = {t.start[0] + t.line.lstrip().startswith("#") for t in comments}
    for node in tree.body:
        if not isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        ) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield f"{node.name}: no docstring"
        if isinstance(node, ast.ClassDef):
            continue
        a = node.args
        params = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
        lines = [p.lineno for p in params if p]
        for p in filter(None, params):
            if lines.count(p.lineno) > 1 or p.lineno not in commented:
                yield f"{node.name}: {p.arg}"


def test_undocumented_is_recognized():
    def found(src):
        return list(undocumented(src, ast.parse(src)))

    assert found("def f(\n    a, # one\n    # two\n    b,\n):\n    'Doc.'") == []
    assert found("def f(\n    a, # one\n    b,\n):\n    'Doc.'") == ["f: b"]
    assert found("def f(a, b): # both\n    pass") == ["f: no docstring", "f: a", "f: b"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_docments(path):
    missing = [
        m
        for src, flags, tree in code_cells(path)
        if flags & {"export", "exports"}
        for m in undocumented(src, tree)
    ]
    assert not missing, "\n".join(missing)


def test_readme_is_the_index():
    from make_readme import readme

    text, files = readme()
    assert (ROOT / "README.md").read_text() == text, "run `make readme`"
    for name, data in files.items():
        assert (ROOT / name).read_bytes() == data, "run `make readme`"


def test_list_of_notebooks_is_theirs():
    from make_readme import notebooks

    text = notebooks()
    assert all(f"[{p.stem}](../{named(p)})" in text for p in NOTEBOOKS if p.name != "index.ipynb")
    assert (ROOT / "docs/notebooks.md").read_text() == text, "run `make readme`"


# ---- width and ruff

WIDE = 110


def wide_lines(text):
    """Lines of Markdown, YAML or a Makefile that are wider than `WIDE`, as (number, line). Tables, text
    between code fences, addresses and the data of images can't be broken, and don't count."""
    fence = ""
    for n, line in enumerate(text.splitlines(), 1):
        mark = re.match(r"\s*(```|~~~)", line)
        if mark and fence in ("", mark[1]):
            fence = "" if fence else mark[1]
        short = re.sub(r"https?://[^\s)>]+|data:image/[^\s)>]+", "", line)
        if len(short) > WIDE and not fence and not line.lstrip().startswith("|"):
            yield n, line


def test_wide_lines_are_recognized():
    long = "word " * 30
    assert [n for n, _ in wide_lines(f"short\n{long}\n# {long}")] == [2, 3]
    assert not list(wide_lines(f"| {long} |\n```bash\n{long}\n```\n[here](https://x.org/{'a' * 200})"))


def test_width():
    "What ruff doesn't see: it holds the width of Python alone"
    texts = {named(p): p.read_text() for p in (ROOT / "docs").glob("*.md")}
    texts |= {named(p): p.read_text() for p in (ROOT / "specs_nb/configs").rglob("*.yaml")}
    texts["Makefile"] = (ROOT / "Makefile").read_text()
    for path in NOTEBOOKS:
        for i, cell in enumerate(json.loads(path.read_text())["cells"]):
            if cell["cell_type"] == "markdown":
                texts[f"{named(path)}, cell {i}"] = "".join(cell["source"])
    found = [f"{name}:{n}: {line[:90]}…" for name, text in texts.items() for n, line in wide_lines(text)]
    assert not found, "\n".join(found)


def test_ruff_finds_nothing():
    pytest.importorskip("ruff", reason="ruff comes with the extra dev")
    folders = ["nbs", "specs_nb", "tests", "tools", "bench"]
    ruff = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--output-format", "concise", *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ruff.returncode == 0, ruff.stdout + ruff.stderr


# ---- links


def anchors(text):
    "The anchors that GitHub gives to the headings of a Markdown text"
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.M | re.S)
    return {
        re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-")
        for h in re.findall(r"^#+\s+(.+?)\s*#*$", text, re.M)
    }


def links(text):
    "The links of a Markdown text, without those in code"
    prose = re.sub(r"^(```|~~~).*?^\1|`[^`\n]+`", "", text, flags=re.M | re.S)
    return re.findall(r"\]\(([^)\s]+)[^)]*\)", prose) + re.findall(r"(?:src|href)=\"([^\"]+)\"", prose)


def broken_links(path, text):
    "Links of a file that lead nowhere: an address that is none, a file or a heading that isn't there"
    for link in links(text):
        if re.match(r"[a-z]+:", link):
            if not re.fullmatch(r"https?://[\w.-]+(:\d+)?(/[^\s<>]*)?|mailto:\S+@\S+", link):
                yield link
            continue
        name, _, anchor = link.partition("#")
        to = path.parent / name if name else path
        if not to.exists() or anchor and to.suffix == ".md" and anchor not in anchors(to.read_text()):
            yield link


MARKDOWN = [p for p in project_files() if p.suffix == ".md"]


def prose(path):
    "The text of a Markdown file, or of a notebook's Markdown cells"
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "markdown"]
        text = "\n\n".join("".join(c["source"]) for c in cells)
    return text


@pytest.mark.parametrize("path", [*MARKDOWN, *NOTEBOOKS], ids=named)
def test_links_lead_somewhere(path):
    assert not list(broken_links(path, prose(path)))


def test_a_broken_link_is_found():
    text = """# One heading
[a](no/such.md) [b](docs/paper.md) [c](#one-heading) [d](#another) `[e](x.md)` [f](https://arxiv.org/abs/1)
[g](nbs/21_grading.ipynb)"""
    path = ROOT / "README.md"
    assert list(broken_links(path, text.replace("#one-heading", "docs/paper.md#none"))) == [
        "no/such.md",
        "docs/paper.md#none",
        "#another",
        "nbs/21_grading.ipynb",
    ]


# ---- commands in prose are taken by our command line


def commands(text):
    "Words of each `specs …` in fenced blocks of Markdown; a quoted word may go on over several lines"
    for block in re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, re.S | re.M):
        lines = ""
        for line in block.replace("\\\n", " ").splitlines():
            lines += line + "\n"
            try:
                words = shlex.split(lines, comments=True)
            except ValueError:  # a quote is open
                continue
            if words[:1] == ["specs"]:
                yield words[1:]
            lines = ""


def refused(words):
    "What our command line has against these words; empty if it takes them"
    from specs_nb.core import SpecsError, builtin_configs, load_config
    from specs_nb.pipeline import parse

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = parse(words)
        named = getattr(args, "config", None)
        load_config(named if named in builtin_configs() else None, getattr(args, "overrides", []))
    except (SystemExit, SpecsError) as e:
        return f"specs {' '.join(words)}: {said.getvalue().strip()[-200:] or e}"
    return ""


def recipe_commands():
    "Those in the heads of the shipped configurations"
    for path in sorted((ROOT / "specs_nb/configs").rglob("*.yaml")):
        for line in re.findall(r"^#   (specs .*)$", path.read_text(), re.M):
            yield shlex.split(line.partition("  ")[0])[1:]


def test_commands_in_prose_are_taken():
    found = [words for path in [*MARKDOWN, *NOTEBOOKS] for words in commands(prose(path))]
    found += recipe_commands()
    assert len(found) > 25
    assert not [message for words in found if (message := refused(words))]


def test_a_wrong_command_is_found():
    text = "```sh\nspecs push --pairs me/my-pairs\nspecs run a.b='{x: 1,\n y: 2}' # why\n```\n"
    push, run = commands(text)
    assert "--repo" in refused(push)
    assert run == ["run", "a.b={x: 1,\n y: 2}"]
    assert "unknown key 'a'" in refused(run)
    assert not refused(["run", "coldstart.lam=0.5"])


# ---- figures in prose are those of the files that they come from


def test_readme_has_the_figures_of_its_run():
    text = (ROOT / "README.md").read_text()
    result = re.search(r'RESULT = \\"([\w.]+)\\"', (ROOT / "nbs/index.ipynb").read_text())[1]
    run = json.loads((ROOT / "docs/results" / result).read_text())
    tests = {
        "trained form": "id",
        "form OOD": "ood_format",
        "other pictures": "ood_visual",
        "harder questions": "compositional",
    }
    table = {
        row[0]: row[1:] for row in re.findall(r"^\| ([\w ]+) " + r"\| ([^|\n]+) " * 4 + r"\|$", text, re.M)
    }
    for words, split in tests.items():
        for model, said in zip(("base", "zero", "coldstart", "final"), table[words]):
            m = run["metrics"][model][split]["strict"]
            assert said == f"{100 * m['mean']:.0f} [{100 * m['lo']:.0f}, {100 * m['hi']:.0f}]", (words, model)
    minutes = sum(s["seconds"] for s in run["stages"].values()) / 60
    assert f"{minutes:.0f} minutes" in " ".join(text.split())


@pytest.mark.parametrize(
    "name, said",
    [
        ("C3", "{} points [{}, {}] ahead after 24 steps of RL"),
        ("C3 later", "after 64 steps the difference, {} points [{}, {}], can't be told from zero"),
        ("C3 compute B", "by {} points [{}, {}] on that base"),
        ("C3 compute", "by {} [{}, {}] on the default one"),
        ("C3 compute B 64", "after 64 steps, by {} [{}, {}] and"),
        ("C3 compute 64", "and {} [{}, {}]. On the default base it also keeps"),
        ("rft", "not detectably different: +{} points [{}, {}]"),
    ],
)
def test_readme_says_what_was_found(name, said):
    "Effects are those of the saved tables; where plain GRPO is ahead, by how much it is"
    claims = json.loads((ROOT / "docs/results/score/claims.json").read_text())
    (c,) = (c for c in claims if c["claim"] == name)
    span = [c["effect"], c["lo"], c["hi"]]
    if "compute" in name:
        assert c["effect"] < 0, "the README says that plain GRPO is ahead"
        span = [-c["effect"], -c["hi"], -c["lo"]]
    said = said.format(*(f"{100 * x:.1f}" for x in span))
    assert said in " ".join((ROOT / "README.md").read_text().split())


def test_readme_says_which_formats_are_kept_after_rl():
    import pandas as pd

    rows = pd.read_parquet(ROOT / "docs/results/score/formats.parquet")
    rows = rows[(rows.model == "final") & (rows.asked != "think_answer")]
    counts = rows[rows.arm.isin(["none", "specs", "sft"])].groupby("arm")[["format_n", "n"]].sum()
    kept = 100 * counts.format_n / counts.n
    said = (
        f"{kept['none']:.0f} % of its answers there are in form, against {kept['specs']:.0f} % of SPECS and"
        f" {kept['sft']:.0f} % of SFT"
    )
    assert said in " ".join((ROOT / "README.md").read_text().split())


def test_readme_says_how_form_goes_over_ten_seeds():
    import pandas as pd

    rows = pd.read_parquet(ROOT / "docs/results/score/results.parquet")
    rows = rows[(rows.arm == "specs") & (rows.split == "id") & (rows.metric == "format") & ~rows.deep]
    kept = 100 * rows.groupby("model")["mean"].mean()
    said = f"there form is not lost: {kept['coldstart']:.0f} against {kept['zero']:.0f} %"
    assert said in " ".join((ROOT / "README.md").read_text().split())


def test_readme_counts_the_verdicts():
    claims = json.loads((ROOT / "docs/results/score/claims.json").read_text())
    found = Counter(c["verdict"] for c in claims if c["verdict"] != "not tested")
    assert found == {"holds": 4, "does not hold": 2, "can't tell": 1}
    assert "four hold, two don't, one is inconclusive" in " ".join((ROOT / "README.md").read_text().split())


def test_one_gpu_has_the_figures_of_the_card():
    text = (ROOT / "nbs/tutorials/20_one_gpu.ipynb").read_text()
    truth = json.loads((ROOT / "bench/results/gpu_truth_h200.json").read_text())
    first, *_, last = [run["parts"] for run in truth["runs"]]
    speeds = [first["write-vllm"]["found"][f"at_{n}"]["tokens_per_s"] for n in (64, 256, 1024)]
    assert " / ".join(f"{s:,.0f}" for s in speeds) + " tokens/s" in text
    grpo, dpo = last["grpo-vllm-lora"]["found"], last["dpo-lora"]["found"]
    step = grpo["steps"][-1]
    assert f"write {step['write']:.1f}, train {step['train']:.1f}, score {step['score']:.1f}" in text
    assert (
        f"{grpo['device_peak_gib']:.1f} GiB, where the doctor says {grpo['doctor']['with_base']:.1f}" in text
    )
    assert f"{dpo['torch_peak_gib']:.1f} GiB, where the doctor said {dpo['doctor']['peak']:.1f}" in text
    assert f"| {dpo['step']['whole']:.1f} s |" in text


# ---- nothing private, nothing heavy

PRIVATE = {
    "path of one machine": r"(?<![\w.~-])/(?:root|home|work|tmp|opt)/[\w.]",
    "registry": (
        r"(?:extra-)?index[-_]url|find[-_]links"
        # hosts
        r"|\b(?:pypi|pythonhosted|npmjs|debian|pytorch)\.org/(?:simple|packages|whl|debian)"
        r"|registry\.\w+\.\w+|files\.pythonhosted"
    ),
    "address": r"https?://(?:10|172|192)\.\d+\.\d+\.\d+",
    "secret": (
        r"-----BEGIN [A-Z ]*PRIVATE KEY"
        # tokens of hubs and clouds
        r"|\bhf_[A-Za-z0-9]{24,}|\bsk-[A-Za-z0-9_-]{24,}"
        r"|\bgh[pousr]_[A-Za-z0-9]{24,}|\bAKIA[0-9A-Z]{16}\b"
        # a value beside a name
        r"|(?i:api_?key|password|secret|token)[\"']?\s*[:=]\s*[\"'][A-Za-z0-9_\-+/]{20,}[\"']"
    ),
}


def readable(path):
    "The text of a file; of a notebook without its pictures, whose base64 says anything sooner or later"
    data = path.read_bytes()
    if b"\0" in data[:4096]:
        return ""
    text = data.decode("utf-8", errors="replace")
    return re.sub(r'"image/\w+": ?"[^"]*"', "", text) if path.suffix == ".ipynb" else text


@pytest.mark.parametrize("kind", PRIVATE)
def test_nothing_private(kind):
    found = [
        f"{named(p)}:{text.count(chr(10), 0, m.start()) + 1}: {m[0]}"
        for p in project_files()
        if (text := readable(p))
        for m in re.finditer(PRIVATE[kind], text)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "kind, text",
    [
        ("path of one machine", '"/ho' + 'me/ann/specs"'),
        ("registry", "--extra-ind" + "ex-url x"),
        ("address", "http://10" + ".0.0.5:8080"),
        ("secret", "hf" + "_" + "a" * 34),
        ("secret", 'api_key = "' + "a1" * 12 + '"'),
    ],
)
def test_private_is_recognized(kind, text):
    assert re.search(PRIVATE[kind], text)


def test_files_are_small():
    "Nothing over 3 MB but the embedded model"
    big = [
        named(p)
        for p in project_files()
        if p.stat().st_size > 3_000_000 and not named(p).startswith("specs_nb/tiny/")
    ]
    assert not big, big


# ---- light imports


@pytest.mark.parametrize(
    "code", ["import specs_nb", "from specs_nb.pipeline import main; main()"], ids=["import", "help"]
)
def test_no_torch_is_loaded(code):
    code = (
        f"import sys; sys.argv = ['specs', '--help']\ntry: {code}\nexcept SystemExit as e: assert not e.code,"
        " e.code\nprint('\\nloaded:', *sorted({'torch', 'transformers', 'trl', 'datasets', 'numpy',"
        " 'matplotlib'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].strip() == "loaded:", run.stdout.splitlines()[-1]


def test_promises_name_tests_that_exist():
    "docs/promises.md: every `file::test` is defined there, and every notebook it names is there."
    import re

    text = (ROOT / "docs/promises.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 40
    missing = [f"{f}::{t}" for f, t in named if not re.search(rf"^def {t}\(", (ROOT / f).read_text(), re.M)]
    missing += [n for n in re.findall(r"`(\d\d_\w+)`", text) if not list((ROOT / "nbs").rglob(f"{n}.ipynb"))]
    assert not missing, missing


@pytest.mark.parametrize("path", sorted((ROOT / "specs_nb").rglob("[a-z]*.py")), ids=named)
def test_no_name_is_defined_twice(path):
    "Two cells far apart that define the same helper: the second would silently serve the first's callers"
    names = [n.name for n in ast.parse(path.read_text()).body if hasattr(n, "name")]
    assert sorted(set(names)) == sorted(names)


# ---- one name for one thing, and short functions


def written():
    "module → syntax tree, of the modules that notebooks export; what only passes on an old path is none"
    return {module: ast.parse(package_file(module).read_text()) for module in modules()}


def defined(tree):
    "Public names that a module defines at its top: functions, classes, and what is assigned"
    found = set()
    for node in tree.body:
        if hasattr(node, "name"):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return {name for name in found if not name.startswith("_")}


def in_two(trees):
    "Names that two modules define, with the modules; every command has its own `main`"
    owners = {}
    for module, tree in trees.items():
        for name in defined(tree) - {"main"}:
            owners.setdefault(name, []).append(module)
    return {name: found for name, found in owners.items() if len(found) > 1}


def test_a_name_has_one_home():
    "Who reads a name elsewhere, or looks for it, must find one thing"
    assert in_two(written()) == {}


def test_a_name_with_two_homes_is_found():
    planted = {"a": "LIMIT = 1\ndef f(): pass\n_own = 2", "b": "A, LIMIT = 0, 1\nclass f: pass\n_own = 3"}
    planted["c"] = "from .a import LIMIT as limit\ndef main(): A = 1"
    found = in_two({module: ast.parse(src) for module, src in planted.items()})
    assert found == {"LIMIT": ["a", "b"], "f": ["a", "b"]}


LONGEST_BODY = 60  # lines of a function without its signature and docstring


def long_bodies(tree):
    "Functions whose body is longer than that, also within classes and functions: (name, lines)"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            if lines > LONGEST_BODY:
                yield node.name, lines


def test_functions_are_short():
    "A function that needs two screens does two things"
    found = [
        f"{module}.{n}: {lines} lines" for module, tree in written().items() for n, lines in long_bodies(tree)
    ]
    assert not found, "\n".join(found)


def test_a_long_function_is_found():
    def lines(n, doc=1):
        return (
            "class C:\n    def f(\n        self,\n    ):\n"
            + doc * '        """A\n        doc"""\n'
            + n * "        x = 1\n"
        )

    assert list(long_bodies(ast.parse(lines(60)))) == []
    assert (
        list(long_bodies(ast.parse(lines(61)))) == [("f", 61)] == list(long_bodies(ast.parse(lines(61, 0))))
    )
