"""What it costs to begin: `import specs_nb` and `specs --help` beside a bare Python, in turn.

Usage: python bench/startup.py [--json OUT.json] [--rounds N]
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

WAYS = {
    "python": "pass",
    "import specs_nb": "import specs_nb",
    "specs --help": "import sys; sys.argv = ['specs', '--help']; from specs_nb.pipeline import main; main()",
}


def once(code):
    "Wall seconds and the processor's seconds of a Python of its own"
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    wall, cpu = time.perf_counter(), used()
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if r.returncode:
        sys.exit(f"{code!r} ended with {r.returncode}: {(r.stderr or r.stdout)[-1500:]}")
    return time.perf_counter() - wall, used() - cpu


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--json", type=Path, default=Path(__file__).parent / "results/startup.json")
    p.add_argument("--rounds", type=int, default=10, help="of each that count")
    a = p.parse_args()
    seen = {w: [] for w in WAYS}
    for i in range(a.rounds + 1):  # the first fills the disk's cache
        for w, code in WAYS.items():
            found = once(code)
            if i:
                seen[w].append(found)
    wall, cpu = ({w: statistics.median(x[k] for x in s) for w, s in seen.items()} for k in (0, 1))
    out = dict(
        date=str(date.today()),
        machine=f"{os.cpu_count()} CPU cores, {platform.machine()}",
        python=platform.python_version(),
        rounds=a.rounds,
        wall_s=wall,
        cpu_s=cpu,
        times_bare_python={w: cpu[w] / cpu["python"] for w in WAYS},
    )
    print(
        "  ".join(
            f"{w}: {1000 * cpu[w]:.0f} ms, {out['times_bare_python'][w]:.2f} of bare Python"
            for w in list(WAYS)[1:]
        )
    )
    a.json.parent.mkdir(parents=True, exist_ok=True)
    a.json.write_text(json.dumps(out, indent=1) + "\n")
