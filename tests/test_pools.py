"Workers that die, and signals to all processes: no pool waits for ever, and what was done is kept"

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

GRID = """
import sys, time
from pathlib import Path
from specs_nb.study.ablate import Node, run_grid
from specs_nb.core import Config, Interrupted, SpecsError, signals_ask, stop_asked

def stage(run, name, key, **kw):
    "As a stage trains: it heeds a stop between steps"
    (run.dir / "began").touch()
    for _ in range(1200 if key == "slow" else 0):
        if stop_asked():
            (run.dir / "saved").touch()
            raise Interrupted("saved")
        time.sleep(0.1)

if __name__ == "__main__":
    names = sys.argv[2:]
    nodes = {n: Node(n, "zero", n.split("-")[0], Config(), rank=(i,)) for i, n in enumerate(names)}
    with signals_ask():
        try:
            print(run_grid(Path(sys.argv[1]), nodes, stage, 2))
        except Interrupted as e:
            print("stopped:", e)
        except SpecsError as e:
            print("specs:", e)
"""

ANSWERS = """
import sys
from specs_nb.core import SpecsError
from specs_nb.generate import Job, Sampling, answer_all
from specs_nb.world import rows

if __name__ == "__main__":
    job = Job("base", "tiny", rows("test", 480), "Think, then answer.")
    how = Sampling(2, 1.0, int(sys.argv[2]), 8)
    try:
        print(len(answer_all([job], how, 0, sys.argv[1], 2, threads=1, stage="pairs")["base"]), "answered")
    except SpecsError as e:
        print("specs:", e)
"""


def start(tmp_path, code, *words):
    (tmp_path / "case.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])}
    return subprocess.Popen(
        [sys.executable, tmp_path / "case.py", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=env,
    )


def wait_for(*paths, process, seconds=300):
    "Until each of the paths, whose last part may be a pattern, is there"
    end = time.time() + seconds
    while not all(list(p.parent.glob(p.name)) for p in paths):
        if process.poll() is not None or time.time() > end:
            end_group(process)
            pytest.fail(f"{paths} never came: {process.communicate()[0]}")
        time.sleep(0.05)


def said(process, seconds=60):
    "What it printed, if it ends in time; whatever is left of it is killed"
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        pytest.fail(f"it still waits after {seconds} s")
    finally:
        end_group(process)


def end_group(process):
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def workers(process):
    "Its worker processes, oldest first"
    found = []
    for p in Path("/proc").iterdir():
        if p.name.isdigit():
            try:
                parent = (p / "stat").read_text().rpartition(") ")[2].split()[1]
                if parent == str(process.pid) and b"spawn_main" in (p / "cmdline").read_bytes():
                    found.append(int(p.name))
            except OSError:
                pass
    return sorted(found)


def grid(tmp_path, *names):
    "A grid of two workers, all of whose stages have begun"
    p = start(tmp_path, GRID, tmp_path / "g", *names)
    wait_for(*(tmp_path / f"g/stages/{n}/began" for n in names), process=p)
    return p


def test_a_grid_with_an_idle_worker_ends_when_all_its_processes_are_told_to(tmp_path):
    p = grid(tmp_path, "slow-1", "quick-2")
    time.sleep(0.5)  # the quick one's worker waits for its next stage
    assert len(workers(p)) == 2
    os.killpg(p.pid, signal.SIGTERM)
    out = said(p)
    assert "stopped: 1 of 2 stages are done and saved" in out and "Traceback" not in out, out
    assert (tmp_path / "g/stages/slow-1/saved").exists(), "the one at work has saved"


@pytest.mark.parametrize("which", [0, 1])
def test_a_grid_whose_worker_is_killed_says_so_and_the_others_save(tmp_path, which):
    "The second process is one that the thread which watches them may not know of yet."
    p = grid(tmp_path, "slow-1", "slow-2")
    os.kill(workers(p)[which], signal.SIGKILL)
    out = said(p)
    assert "specs: grid: a process at work was killed, perhaps for its memory" in out, out
    assert "the same command goes on" in out and "Traceback" not in out
    assert len(list((tmp_path / "g").glob("stages/*/saved"))) == 1


def test_answers_outlive_a_killed_worker(tmp_path):
    """120 batches and the first file, whichever it is: with 12 and the first batch, a busy machine once let
    the other worker finish all the rest before that batch came"""
    p = start(tmp_path, ANSWERS, tmp_path / "a", 400)
    wait_for(tmp_path / "a/base-*.json", process=p)
    os.kill(workers(p)[0], signal.SIGKILL)
    out = said(p)
    assert "specs: pairs: a process at work was killed" in out and "Traceback" not in out, out
    assert "Batches that were answered are kept; the same command goes on" in out
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "a").glob("base-*.json")}
    assert 0 < len(before) < 120
    out = said(start(tmp_path, ANSWERS, tmp_path / "a", 8), 600)
    assert "480 answered" in out and all(f.stat().st_mtime_ns == t for f, t in before.items()), out


def test_workers_end_with_the_process_that_started_them(tmp_path):
    p = grid(tmp_path, "slow-1")
    pids = workers(p)
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    end = time.time() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.time() < end:
        time.sleep(0.1)
    left = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    end_group(p)
    assert pids and not left
