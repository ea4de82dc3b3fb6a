"""Notebooks as Markdown, with the outputs that are saved in them: for README.md and the site. Nothing is
executed."""

import base64
import posixpath
import re
from pathlib import Path

from nbdev.process import NBProcessor

ROOT = Path(__file__).resolve().parent.parent
# the reading path: folders of nbs/, and what the site and docs/notebooks.md call them
ROOMS = {
    "tutorials": "Start here",
    "method": "The method",
    "study": "Does SPECS hold?",
    "engines": "Engines: what answers and trains",
    "inputs": "Inputs: data sets and the judge",
    "scale": "Scale: many GPUs, many machines",
    "appendix": "Appendix",
}
# Markdown or HTML: opening, target without anchor
_LINK = re.compile(r"(\]\(|(?:src|href)=\")([^)\"\s#]+)")
_CODE = re.compile(r"(^(`{3,}|~{3,}).*?^\2|`[^`\n]+`)", re.M | re.S)
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def outside_code(f, text):
    "`f` on all of a Markdown text but its code"
    parts = _CODE.split(text)  # text, code, fence, text, …
    return "".join(f(p) if i % 3 == 0 else p if i % 3 == 1 else "" for i, p in enumerate(parts))


def relink(
    text: str,  # Markdown
    folder: str,  # where it stands, relative to the project, such as `nbs`
    target,  # function: path relative to the project → new link
) -> str:  # the same with its relative links replaced, but for those in code
    "Move Markdown to another place: every relative link outside code goes through `target`."

    def new(m):
        if re.match(r"[a-z][a-z0-9+.-]*:|/", m[2]):
            return m[0]
        return m[1] + target(posixpath.normpath(posixpath.join(folder, m[2])))

    return outside_code(lambda part: _LINK.sub(new, part), text)


def opening(
    path,  # of a notebook
) -> tuple:  # its title, and the sentence that stands under it
    "How a notebook begins: `# title` and `> what it is about`."
    cells = NBProcessor(path).nb.cells[:2]
    text = "\n\n".join(c.source for c in cells if c.cell_type == "markdown")
    m = re.search(r"^# (.+)\n\n((?:> .+\n?)+)", text, re.M)
    if not m:
        raise SystemExit(f"{path} should begin with `# title`, an empty line and `> what it is about`")
    return m[1], " ".join(line.removeprefix("> ") for line in m[2].splitlines())


def _fence(text, info=""):
    ticks = "`" * max(3, 1 + max((len(m) for m in re.findall(r"`+", text)), default=0))
    return f"{ticks}{info}\n{text}\n{ticks}"


def _text(s):
    "A terminal's last word: no colours, and of a progress bar only its last state"
    lines = (line.rstrip("\r").rpartition("\r")[2].rstrip() for line in _ANSI.sub("", s).split("\n"))
    return "\n".join(lines).strip("\n")


def _str(s):
    return "".join(s) if isinstance(s, list) else s


def _output(out, name, files, info):
    "One saved output as Markdown; a picture goes into `files` under `name`"
    if out["output_type"] == "stream":
        text = _text(_str(out["text"]))
    elif out["output_type"] == "error":
        text = _text("\n".join(out["traceback"]))
    else:
        data = {k: _str(v) for k, v in out["data"].items() if not isinstance(v, dict)}
        for mime, ext in (("image/png", "png"), ("image/jpeg", "jpg"), ("image/svg+xml", "svg")):
            if mime in data:
                files[f"{name}.{ext}"] = data[mime].encode() if ext == "svg" else base64.b64decode(data[mime])
                return f"![output]({name}.{ext})"
        if "text/markdown" in data:
            return data["text/markdown"]
        if "text/html" in data:
            return re.sub(
                r"\n\s*\n", "\n", re.sub(r"<style.*?</style>", "", data["text/html"], flags=re.S)
            ).strip()
        text = _text(data.get("text/plain", ""))
    return _fence(text, info) if text else ""


def _joined(outs):
    "Stream chunks that follow each other, as one"
    res = []
    for o in outs:
        if res and o["output_type"] == res[-1]["output_type"] == "stream":
            res[-1] = {**res[-1], "text": _str(res[-1]["text"]) + _str(o["text"])}
        else:
            res.append(o)
    return res


def to_markdown(
    path,  # of the notebook
    target,  # for `relink`
    images: str = "",  # how the names of saved pictures begin, such as `10_world_files/`
    code: str = "python",  # info string of code
    exported: str = "python",  # info string of exported code
    output: str = "",  # info string of text output
) -> tuple:  # Markdown, and the pictures: name → bytes
    "A notebook as it reads: no directives, no hidden cells, saved outputs shown."
    files, parts = {}, []
    folder = Path(path).resolve().parent.relative_to(ROOT).as_posix()
    for i, cell in enumerate(NBProcessor(path, rm_directives=True).nb.cells):
        flags, src = cell.directives_, cell.source.strip("\n")
        if "hide" in flags or _off(flags, "include"):
            continue
        if cell.cell_type == "markdown":
            parts.append(relink(src, folder, target))
        if cell.cell_type != "code":
            continue
        if src and not _off(flags, "echo"):
            parts.append(_fence(src, exported if {"export", "exports"} & set(flags) else code))
        if not _off(flags, "output"):
            parts += [
                _output(o, f"{images}{i}_{j}", files, output)
                for j, o in enumerate(_joined(cell.get("outputs", [])))
            ]
    return "\n\n".join(p for p in parts if p) + "\n", files


def _off(flags, name):
    return flags.get(name, flags.get(f"{name}:", "")).strip() == "false"
