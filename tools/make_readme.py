"README.md is nbs/index.ipynb, with its links seen from the top of the project."

from nb2md import ROOT, to_markdown

IMAGES = "docs/readme/"  # pictures that are saved as outputs of the notebook


def readme():
    "The text of README.md, and the pictures that it shows: path → bytes"
    text, files = to_markdown(ROOT / "nbs/index.ipynb", lambda path: path, IMAGES)
    return "<!-- made by `make readme` from nbs/index.ipynb: edit that -->\n\n" + text, files


if __name__ == "__main__":
    text, files = readme()
    (ROOT / "README.md").write_text(text)
    for name, data in files.items():
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_bytes(data)
    print(f"README.md: {len(text.split())} words, {len(files)} pictures")
