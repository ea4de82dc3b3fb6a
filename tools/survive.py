"""Kill `specs run` at random moments and see that nothing is lost: python tools/survive.py [kills] [seed] (30
kills by default, some 15 minutes on 2 cores).

A smoke run is started again and again in a process group of its own and killed with SIGKILL, in turn in each
stage, at a random moment of it. After each kill: no stage that was finished has changed; after the next
start: training goes on from the last whole checkpoint. When a run has come to its end, its final weights,
pairs and tables equal those of a run that was never disturbed, byte for byte. Prints one line a kill, then a
summary as JSON; exit code 1 if anything differs."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STAGES = ("zero", "pairs", "coldstart", "final", "eval", "report")
SAME = (
    "zero/model/model.safetensors",
    "pairs/pairs.parquet",
    "coldstart/model/adapter_model.safetensors",
    "final/model/model.safetensors",
    "eval/metrics.json",
    "eval/answers.parquet",
)
CONFIG = ["-c", "smoke", "report_to=none", "zero.steps=4", "final.steps=4"]
CMD = [
    sys.executable,
    "-c",
    "import sys; from specs_nb.pipeline import main; sys.exit(main())",
    "run",
    *CONFIG,
]
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def start(run, log):
    return subprocess.Popen(
        [*CMD, "--run-dir", str(run)], stdout=log, stderr=subprocess.STDOUT, env=ENV, start_new_session=True
    )


def info(run, stage):
    p = run / stage / "stage.json"
    return json.loads(p.read_text()) if p.exists() else {}


def finished(run):
    return {s: (run / s / "stage.json").read_text() for s in STAGES if info(run, s).get("state") == "done"}


def checkpoint(run, stage):
    "Number of the last whole checkpoint"
    from specs_nb.grpo import last_checkpoint

    path = last_checkpoint(run / stage / "checkpoints")
    return int(path.rsplit("-", 1)[1]) if path else 0


def digest(run):
    return {f: hashlib.sha256((run / f).read_bytes()).hexdigest()[:12] for f in SAME if (run / f).exists()}


def resumed_at(text, stage, total):
    "The step with which the stage's progress bar begins"
    found = re.search(rf"{stage}\s*:.*?\|?\s*(\d+)/{total}", text)
    return int(found[1]) if found else None


def main(kills=30, seed=0):
    rng, tmp, bad, log = random.Random(seed), Path(tempfile.mkdtemp()), [], []
    whole = tmp / "whole"
    t = time.time()
    with open(tmp / "whole.log", "w") as f:
        assert start(whole, f).wait() == 0, (tmp / "whole.log").read_text()[-2000:]
    expect, spans = digest(whole), {s: info(whole, s)["seconds"] for s in STAGES}
    print(f"undisturbed: {time.time() - t:.0f} s, seconds of stages {spans}", flush=True)
    done, k, r = 0, 0, 0
    while done < kills:
        run, r = tmp / f"run{r}", r + 1
        pending = list(STAGES[:5]) * 2  # each stage twice in one run
        pending.sort(key=STAGES.index)
        while True:
            before, stage = finished(run), pending.pop(0) if pending and done < kills else None
            steps = {s: checkpoint(run, s) for s in ("zero", "coldstart", "final")}
            path = tmp / f"log{k}"
            k += 1
            with open(path, "w") as f:
                p = start(run, f)
                if stage is None:
                    code = p.wait()
                else:
                    while p.poll() is None and info(run, stage).get("state") not in ("running", "done"):
                        time.sleep(0.01)
                    time.sleep(rng.uniform(0, 1.2 * max(spans[stage], 0.5)))
                    killed = p.poll() is None
                    at = [s for s in STAGES if info(run, s).get("state") == "running"]
                    if killed:
                        os.killpg(p.pid, signal.SIGKILL)
                    code = p.wait()
            text = path.read_text(errors="replace")
            for s, was in before.items():
                if (run / s / "stage.json").read_text() != was:
                    bad.append(f"{s} was finished and has been touched")
            for s, n in steps.items():
                total = len(json.loads((whole / s / "history.json").read_text()))
                if s not in before and (at_step := resumed_at(text, s, total)) is not None and at_step != n:
                    bad.append(f"{s} went on at {at_step}, its last checkpoint was {n}")
            if stage is None:
                if code != 0:
                    bad.append(f"the last start ended with {code}: {text[-500:]}")
                if (got := digest(run)) != expect:
                    bad.append(f"differs: {sorted(f for f in expect if got.get(f) != expect[f])}")
                print(
                    f"run {r}: came to its end, {'the same bytes' if got == expect else 'NOT THE SAME'}",
                    flush=True,
                )
                break
            if killed:
                done += 1
                log.append({"aimed": stage, "hit": at, "resumed": steps})
                print(f"kill {done}: aimed at {stage}, hit {', '.join(at) or 'between stages'}", flush=True)
            elif code not in (0, -9):
                bad.append(f"ended by itself with {code}: {text[-500:]}")
    hits = {s: sum(s in e["hit"] for e in log) for s in STAGES}
    print(
        json.dumps(
            dict(
                kills=done,
                runs=r,
                hits=hits,
                between=sum(not e["hit"] for e in log),
                problems=bad,
                seed=seed,
                date=time.strftime("%Y-%m-%d"),
                machine=f"{os.cpu_count()} CPU cores",
            ),
            indent=1,
        )
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
