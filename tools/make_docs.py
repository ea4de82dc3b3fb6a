"""The site: every notebook a page with its saved outputs, an API page a module, docs/*.md, search. Nothing is
executed, no network."""

import argparse
import dataclasses
import importlib
import inspect
import logging
import os
import re
import shutil
from pathlib import Path

os.environ["DISABLE_MKDOCS_2_WARNING"] = "true"  # an advertisement of Material's in the output
from fastcore.docments import docments
from latex2mathml.converter import convert
from nb2md import ROOT, outside_code, relink, to_markdown


def title(text, default):
    return m[1] if (m := re.search(r"^# (.+)$", text, re.M)) else default


class Site:
    "Markdown pages in a folder, from which mkdocs builds"

    def __init__(self, work):
        self.work, self.modules = work, []
        shutil.rmtree(work, ignore_errors=True)
        nbs = sorted((ROOT / "nbs").rglob("*.ipynb"), key=lambda p: (len(p.parts), p))
        self.notebooks = [
            p.relative_to(ROOT).as_posix()
            for p in nbs
            if ".ipynb_checkpoints" not in p.parts and p.name != "index.ipynb"
        ]
        self.guide = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").glob("*.md"))
        self.known = {
            "README.md": "index.md",
            "nbs/index.ipynb": "index.md",
            **{g: g.removeprefix("docs/") for g in self.guide},
            **{n: "notebooks/" + n.removeprefix("nbs/").replace(".ipynb", ".md") for n in self.notebooks},
        }

    def write(self, page, text, files=None):
        for name, data in {page: text.encode(), **(files or {})}.items():
            to = self.work / name
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(data)

    def target(self, page):
        """For `relink`: where, seen from `page`, something of the project is found in the site; other files
        are taken along"""

        def link(path):
            to = self.known.get(path)
            if not to and (ROOT / path).is_file():
                to = path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"
                self.write(to, "", {to: (ROOT / path).read_bytes()})
            return os.path.relpath(to or path, os.path.dirname(page) or ".").replace(os.sep, "/")

        return link

    def notebook(self, path):
        page = self.known[path]
        name = Path(page).stem
        text, files = to_markdown(
            ROOT / path,
            self.target(page),
            f"{name}_files/",
            "{ .python }",
            "{ .python .exported }",
            "{ .text .output }",
        )
        module = re.search(r"#\s*\|\s*default_exp\s+([\w.]+?)(?=\\n|\")", (ROOT / path).read_text())
        if module and (ROOT / f"specs_nb/{module[1]}.py").exists():
            up = "../" * page.count("/")
            text = re.sub(
                r"^(# .+\n(?:\n> .+\n)?)",
                rf"\1\nModule [`specs_nb.{module[1]}`]({up}api/{module[1]}.md) · a blue edge marks code that"
                r" is exported to it\n",
                text,
                count=1,
            )
            self.api(module[1], path)
        folder = os.path.dirname(page)
        self.write(page, text, {f"{folder}/{n}".lstrip("/"): d for n, d in files.items()})
        return title(text, name)

    def api(self, module, path):
        self.modules.append(module)
        self.write(
            f"api/{module}.md", api_page(module, os.path.relpath(self.known[path], "api"), Path(path).stem)
        )

    def build(self, site):
        from mkdocs.commands.build import build
        from mkdocs.config import load_config

        text, files = to_markdown(ROOT / "nbs/index.ipynb", self.target("index.md"), "index_files/")
        self.write("index.md", text, files)
        for g in self.guide:
            self.write(self.known[g], relink((ROOT / g).read_text(), "docs", self.target(self.known[g])))
        for asset in (ROOT / "docs/assets").iterdir():
            self.write(f"assets/{asset.name}", "", {f"assets/{asset.name}": asset.read_bytes()})
        titles = {n: self.notebook(n) for n in self.notebooks}
        missing = {p.stem for p in (ROOT / "specs_nb").glob("[a-z]*.py")} - set(self.modules)
        if missing:
            raise SystemExit(f"no API page for {', '.join(sorted(missing))}: no notebook exports it")
        main = [{titles[n]: self.known[n]} for n in self.notebooks if "/examples/" not in n]
        examples = [{titles[n]: self.known[n]} for n in self.notebooks if "/examples/" in n]
        guide = [{title((ROOT / g).read_text(), Path(g).stem): self.known[g]} for g in self.guide]
        api = [{f"specs_nb.{m}": f"api/{m}.md"} for m in self.modules]
        nav = [
            {"Home": "index.md"},
            {"Guide": guide},
            {"Notebooks": main},
            {"Examples": examples},
            {"API": api},
        ]
        config = load_config(
            str(ROOT / "mkdocs.yml"),
            docs_dir=str(self.work),
            site_dir=str(site),
            strict=True,
            nav=[n for n in nav if list(n.values())[0]],
        )
        config.plugins.run_event("startup", command="build", dirty=False)
        build(config)
        config.plugins.run_event("shutdown")


# ---- API pages


def short(anno):
    "A type as one writes it"
    if anno is inspect._empty:
        return ""
    return re.sub(
        r"\b(?:\w+\.)+(\w+)",
        r"\1",
        anno if isinstance(anno, str) else getattr(anno, "__name__", None) or str(anno),
    )


def default(v, owner, name):
    "A default value; of a dataclass field what its factory makes"
    if v is inspect._empty:
        return ""
    field = getattr(owner, "__dataclass_fields__", {}).get(name)
    if field is not None and field.default_factory is not dataclasses.MISSING:
        v = field.default_factory()
    text = (
        f"{type(v).__name__}()"
        if dataclasses.is_dataclass(v)
        else getattr(v, "__qualname__", None) or repr(v)
    )
    return text if len(text) < 60 else text[:57] + "…"


def cell(text):
    return str(text or "").replace("|", "\\|").replace("\n", " ")


def code(text):
    return f"`{cell(text)}`" if text else ""


def prose(text):
    return cell(text).replace("<", "&lt;")


def entry(obj, name, level=2):
    "Signature, docstring and table of parameters of a function, class or method"
    if inspect.isclass(obj) and issubclass(obj, BaseException):  # its parameters are Python's own
        return (
            f"{'#' * level} `{name}` {{ #{name} }}\n\n```{{ .python .signature }}\nclass"
            f" {name}({obj.__base__.__name__})\n```\n\n{inspect.getdoc(obj)}"
        )
    docs = docments(obj, full=True, args_kwargs=True)
    ret = docs.pop("return", None)
    docs.pop("self", None), docs.pop("cls", None)
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    rows = [
        (stars.get(d.get("kind"), "") + p, short(d.anno), default(d.default, obj, p), d.docment)
        for p, d in docs.items()
    ]
    args = [f"{n}{': ' + t if t else ''}{(' = ' if t else '=') + v if v else ''}" for n, t, v, _ in rows]
    head, tail = name.rpartition(".")[2] + "(", ")" + (
        f" -> {t}" if ret and not inspect.isclass(obj) and (t := short(ret.anno)) and t != "None" else ""
    )
    one = head + ", ".join(args) + tail
    sig = one if len(one) < 90 else head + "\n    " + ",\n    ".join(args) + ",\n" + tail
    out = [
        f"{'#' * level} `{name}` {{ #{name} }}",
        f"```{{ .python .signature }}\n{sig}\n```",
        (inspect.getdoc(obj) or "").replace("<", "&lt;"),
    ]
    if ret and not inspect.isclass(obj) and (ret.docment or short(ret.anno) not in ("", "None")):
        rows.append(("returns", short(ret.anno), "", ret.docment))
    if rows:
        table = [
            ("Parameter", "Type", "Default", "Meaning"),
            ("---",) * 4,
            *[
                ("*returns*" if n == "returns" else code(n), code(t), code(v), prose(d))
                for n, t, v, d in rows
            ],
        ]
        columns = [c for c in zip(*table) if any(c[2:])]  # without those that are empty
        out.append("\n".join("| " + " | ".join(row) + " |" for row in zip(*columns)))
    if inspect.isclass(obj):
        for m, f in vars(obj).items():
            f = getattr(f, "__func__", f)
            if inspect.isfunction(f) and not m.startswith("_") and f.__module__ == obj.__module__:
                out.append(entry(f, f"{name}.{m}", level + 1))
    return "\n\n".join(o for o in out if o)


def api_page(module, notebook, stem):
    "Everything public in a module, in the order in which its notebook tells it"
    mod = importlib.import_module(f"specs_nb.{module}")
    public = [(n, getattr(mod, n)) for n in mod.__all__]
    things = [entry(o, n) for n, o in public if inspect.isclass(o) or inspect.isfunction(o)]
    values = [(n, o) for n, o in public if not (inspect.isclass(o) or inspect.isfunction(o))]
    out = [
        f"# specs_nb.{module}",
        prose(inspect.getdoc(mod)),
        f"Told and tested in the notebook [{stem}]({notebook}).",
    ] + things
    if values:
        out.append(
            "## Values\n\n| Name | Type | Value |\n|---|---|---|\n"
            + "\n".join(f"| {code(n)} | {code(type(o).__name__)} | {code(shown(o))} |" for n, o in values)
        )
    return "\n\n".join(o for o in out if o) + "\n"


def shown(o):
    text = ", ".join(map(str, o)) if isinstance(o, dict) else repr(o)
    text = re.sub(r"<(?:function )?(\S+?)(?: at 0x\w+)?>", r"\1", text)
    return text if len(text) < 200 else text[:197] + "…"


# ---- hooks: mkdocs.yml names this file


def on_page_markdown(text, page, config, files):
    "Lists as everyone else reads them: Python-Markdown wants an empty line before and four spaces a level"
    item = r"(?:[-*+]|\d+[.)]) "

    def lists(part):
        part = re.sub(rf"^((?!{item}|\s).+\n)(?={item})", r"\1\n", part, flags=re.M)
        return re.sub(rf"^( {{2,3}})(?={item})", "    ", part, flags=re.M)

    return outside_code(lists, text)


def on_page_content(html, page, config, files):
    "Formulas as MathML: browsers draw it without any script or font from elsewhere"
    import html as h

    def mathml(text, **kw):  # a little air behind function names, which latex2mathml leaves out
        return re.sub(
            r"(<mi>(?:log|exp|min|max)</mi>)(?=<m[ifs])",
            r'\1<mspace width="0.17em"/>',
            convert(h.unescape(text), **kw),
        )

    def inline(m):
        return mathml(m[1])

    def block(m):
        return f'<div class="formula">{mathml(m[1], display="block")}</div>'

    html = re.sub(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', block, html, flags=re.S)
    return re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', inline, html, flags=re.S)


if __name__ == "__main__":
    arg = argparse.ArgumentParser(description=__doc__)
    arg.add_argument("--site", type=Path, default=ROOT / "site", help="where the site goes")
    arg.add_argument(
        "--work", type=Path, default=ROOT / "_docs", help="where the Markdown goes that it is made from"
    )
    arg = arg.parse_args()
    # what strict mode objects to
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    Site(arg.work).build(arg.site)
    print(f"site: open {arg.site/'index.html'}")
