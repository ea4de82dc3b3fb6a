"""The whole `specs run`, stage by stage, and what it costs beside its stages (starting, imports,
fingerprints).

Usage: python bench/run.py [--json OUT.json] [--full]     smoke configuration; --full: the default one"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib import metadata
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--json", type=Path)
    p.add_argument("--full", action="store_true")
    a = p.parse_args()
    to = a.json or Path(__file__).parent / f"results/run_{'default' if a.full else 'smoke'}.json"
    cmd = [
        sys.executable,
        "-c",
        "import sys; from specs_nb.pipeline import main; sys.exit(main())",
        "run",
        *([] if a.full else ["-c", "smoke"]),
    ]
    with tempfile.TemporaryDirectory() as tmp:
        run = Path(tmp) / "run"

        def once():
            "Wall seconds and the processor's seconds, of the command with its workers"
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            r = subprocess.run([*cmd, "--run-dir", str(run)], capture_output=True, text=True)
            if r.returncode:
                sys.exit(r.stderr[-1500:])
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            return time.perf_counter() - start, sum(after[:2]) - sum(before[:2])

        wall, cpu = once()
        stages = {f.parent.name: json.loads(f.read_text())["seconds"] for f in run.glob("*/stage.json")}
        again, again_cpu = once()  # everything is done: what a second call costs
    out = dict(
        date=str(date.today()),
        machine=f"{os.cpu_count()} CPU cores, {platform.machine()}, one thread",
        python=platform.python_version(),
        seed=0,
        config="default" if a.full else "smoke",
        versions={n: metadata.version(n) for n in ("torch", "transformers", "trl")},
        wall_s=wall,
        cpu_s=cpu,
        stages_s=dict(sorted(stages.items(), key=lambda s: -s[1])),
        beside_stages=1 - sum(stages.values()) / wall,
        again_wall_s=again,
        again_cpu_s=again_cpu,
        again_to_first=again_cpu / cpu,
    )
    print(
        f"specs run ({out['config']}): {wall:.0f} s, {cpu:.0f} s of the processor, {out['beside_stages']:.0%}"
        f" of it beside the stages ({', '.join(f'{k} {v:.0f}' for k, v in out['stages_s'].items())}); again,"
        f" with all done: {out['again_to_first']:.3f} of that"
    )
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps(out, indent=1) + "\n")
