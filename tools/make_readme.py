"""README.md is nbs/index.ipynb, with its links seen from the top of the project; docs/notebooks.md lists all
notebooks, room by room, as each one introduces itself."""

from nb2md import ROOMS, ROOT, opening, to_markdown

IMAGES = "docs/readme/"  # pictures that are saved as outputs of the notebook


def readme():
    "The text of README.md, and the pictures that it shows: path → bytes"
    text, files = to_markdown(ROOT / "nbs/index.ipynb", lambda path: path, IMAGES)
    return "<!-- made by `make readme` from nbs/index.ipynb: edit that -->\n\n" + text, files


def notebooks():
    "The text of docs/notebooks.md"
    lines = [
        "<!-- made by `make readme` from the notebooks' first lines -->",
        "",
        "# All notebooks",
        "",
        "Room by room. In a room a notebook builds on those with lower numbers.",
    ]
    for room, words in ROOMS.items():
        lines += ["", f"## {words}", "", "| notebook | what it is about |", "|---|---|"]
        for path in sorted((ROOT / "nbs" / room).glob("*.ipynb")):
            about = opening(path)[1].replace("|", "\\|")
            lines.append(f"| [{path.stem}](../nbs/{room}/{path.name}) | {about} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text, files = readme()
    (ROOT / "README.md").write_text(text)
    (ROOT / "docs/notebooks.md").write_text(notebooks())
    for name, data in files.items():
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_bytes(data)
    print(f"README.md: {len(text.splitlines())} lines, {len(text.split())} words, {len(files)} pictures")
