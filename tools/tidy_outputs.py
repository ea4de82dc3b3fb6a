"""After `nbdev-test --save`: drop stderr (libraries' warnings, with paths) and all but the last state of
progress bars from saved outputs; then run nbdev-clean"""

import json
from pathlib import Path

for p in (Path(__file__).resolve().parent.parent / "nbs").rglob("*.ipynb"):
    nb = json.loads(p.read_text(encoding="utf-8"))
    before = json.dumps(nb)
    for c in nb["cells"]:
        if c["cell_type"] != "code":
            continue
        c["outputs"] = [o for o in c["outputs"] if o.get("name") != "stderr"]
        for o in c["outputs"]:
            if o["output_type"] == "stream":
                o["text"] = "\n".join(
                    line.split("\r")[-1] for line in "".join(o["text"]).split("\n")
                ).splitlines(True)
    if json.dumps(nb) != before:
        p.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
        print(p.name)
