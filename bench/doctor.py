"""How far the doctor's estimates are from measured peaks: each case of tests/measure_case.py on the CPU.

Usage: python bench/doctor.py [--json OUT.json] [--cases NAME …]

`nbs/scale/30_doctor.ipynb` estimates from the shapes in the file that this writes, and compares with its
peaks.
"""

import argparse
import json
import os
import platform
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from measure_case import CASES, measure, predict  # noqa: E402

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--json", type=Path, default=ROOT / "bench/results/doctor_measured.json")
    p.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES), metavar="NAME")
    a, found = p.parse_args(), {}
    for name in a.cases:
        m = measure(CASES[name])
        said, found[name] = predict(CASES[name], m).peak, dict(spec=CASES[name], measured=m)
        print(f"{name:28} {m['peak'] / 2**20:5.0f} MiB, estimated {said / m['peak'] - 1:+.1%}", flush=True)
    out = dict(
        date=str(date.today()),
        machine=f"{os.cpu_count()} CPU cores, {platform.machine()}, one thread",
        python=platform.python_version(),
        seed=0,
        cases=found,
    )
    a.json.write_text(json.dumps(out, indent=1) + "\n")
