"""lmms-eval's part is played by a module that writes what 0.7.3 writes; the real one runs where
SPECS_LMMS_PYTHON names its environment."""

import os
import sys

import pytest

from specs_nb import world
from specs_nb.core import SpecsError, read_json
from specs_nb.engines.generate import Completion, Failed
from specs_nb.study.benchmarks import VERSION, run_lmms, serving, write_task

PLAYED = """
import json, os, sys, urllib.request
from pathlib import Path
arg = lambda k: sys.argv[sys.argv.index(k) + 1]
if os.environ.get("PLAY") == "fail": print("ValueError: the hub is down"); sys.exit(0)
assert arg("--reasoning_tags") == "none" and arg("--process_docs_parallel") == "1"
assert os.environ["OPENAI_API_KEY"]
model = dict(p.split("=", 1) for p in arg("--model_args").split(","))
task, folder, out = arg("--tasks"), Path(arg("--include_path")), Path(arg("--output_path")) / "m"
out.mkdir(parents=True)
lines = []
for i, row in enumerate(json.loads((folder / f"{task}.gold.json").read_text())["rows"]):
    talk = [dict(role="user", content=row["question"])]
    body = json.dumps(dict(model=model["model_version"], max_tokens=8, temperature=0, messages=talk)).encode()
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(model["base_url"] + "/chat/completions", body, kind)
    try:
        reply = json.loads(urllib.request.urlopen(request).read())
        said, n = reply["choices"][0]["message"]["content"], reply["usage"]["completion_tokens"]
    except urllib.error.HTTPError as e: said, n = f"[LMMS_EVAL_REQUEST_FAILED after 3 retries] {e}", 0
    scores = dict(acc_score=float("right" in said), format_score=0.0)
    counts = [dict(output_tokens=n)]
    lines.append(dict(doc_id=i, target=row["answer"], filtered_resps=[said], token_counts=counts, **scores))
mean = sum(l["acc_score"] for l in lines) / len(lines)
(out / "1_results.json").write_text(json.dumps({"results": {task: {"acc_score,none": mean}}}))
(out / f"1_samples_{task}.jsonl").write_text("".join(json.dumps(l) + "\\n" for l in lines))
"""


class Knows:
    """An engine: knows the first answer, calls its second right, can't be asked a third, talks for ever at
    the fourth"""

    def __init__(self, rows):
        self.rows = rows

    def sample(self, asked, instructions, how, seed):
        i = [r["question"] for r in self.rows].index(asked[0]["question"])
        if i == 2:
            return [Failed("too long")]
        return [[
            [
                Completion(f"<think>a</think><answer>{self.rows[0]['answer']}</answer> "[:-1], [1]),
                Completion("<think>right</think>", [1]),
                None,
                Completion("and so on", [1] * 8),
            ][i]
        ]]


@pytest.fixture
def played(tmp_path, monkeypatch):
    "Writes the actor, of a given version, and gives the rows of a task."

    def make(version=VERSION):
        (tmp_path / "site/lmms_eval").mkdir(parents=True)
        (tmp_path / "site/lmms_eval/__init__.py").write_text("")
        (tmp_path / "site/lmms_eval/__main__.py").write_text(PLAYED)
        info = tmp_path / f"site/lmms_eval-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lmms-eval\nVersion: {version}\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
        rows, seen = [], set()
        for r in world.rows("test", 60):
            if r["kind"] == "number" and r["question"] not in seen:
                seen.add(r["question"])
                rows.append(r)
        write_task(rows[:4], "four", tmp_path / "tasks")
        return rows[:4]

    return make


def test_a_run_is_graded_twice_and_what_is_lost_is_counted(played, tmp_path):
    rows = played()
    with serving("m", Knows(rows)) as url:
        table = run_lmms(
            "m", url, ["four"], tmp_path / "out", tmp_path / "tasks", sys.executable, max_new_tokens=8
        )["specs_four"]
    mean = {k: (v["mean"], v["n"]) for k, v in table.items()}
    assert mean["lmms_accuracy"] == (0.25, 4), "theirs: only the second, which says right"
    assert mean["accuracy"] == (1 / 3, 3), "ours: only the first; the third was not asked"
    assert mean["differ"] == (2 / 3, 3) and mean["failed"] == (0.25, 4) and mean["truncated"] == (0.25, 4)
    assert read_json(tmp_path / "out/metrics.json")["specs_four"] == table
    with serving("m", Knows(rows)) as url, pytest.raises(SpecsError, match="has results already"):
        run_lmms("m", url, ["four"], tmp_path / "out", tmp_path / "tasks", sys.executable)


def test_a_failure_that_exits_with_0_is_told(played, tmp_path, monkeypatch):
    rows = played()
    monkeypatch.setenv("PLAY", "fail")
    with (
        serving("m", Knows(rows)) as url,
        pytest.raises(SpecsError, match="left no results.*the hub is down"),
    ):
        run_lmms("m", url, ["four"], tmp_path / "out", tmp_path / "tasks", sys.executable)


@pytest.mark.parametrize(
    "version,tasks,message",
    [
        ("0.6.0", ["four"], "lmms-eval 0.6.0 is installed"),
        (VERSION, ["mathvist"], "did you mean 'mathvista'"),
        (VERSION, ["mmmu"], "has no mmmu/reasoning"),
    ],
)
def test_what_can_be_known_before_is_said_before(played, tmp_path, version, tasks, message):
    rows = played(version)
    with serving("m", Knows(rows)) as url, pytest.raises(SpecsError, match=message):
        run_lmms("m", url, tasks, tmp_path / "out", tmp_path / "tasks", sys.executable)


def test_no_server_and_no_lmms_eval(played, tmp_path, monkeypatch):
    played()
    with pytest.raises(SpecsError, match="no server answers"):
        run_lmms("m", "http://127.0.0.1:9/v1", ["four"], tmp_path / "out", tmp_path / "tasks", sys.executable)
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(SpecsError, match="pip install --no-deps lmms-eval"):
        run_lmms("m", "http://127.0.0.1:9/v1", ["four"], tmp_path / "out", tmp_path / "tasks", sys.executable)


@pytest.mark.skipif(
    not os.environ.get("SPECS_LMMS_PYTHON"), reason="SPECS_LMMS_PYTHON names no environment with lmms-eval"
)
def test_the_real_one(tmp_path):
    rows = world.rows("test", 4)
    write_task(rows, "four", tmp_path / "tasks")
    with serving("tiny") as url:
        table = run_lmms("tiny", url, ["four"], tmp_path / "out", tmp_path / "tasks", max_new_tokens=96)[
            "specs_four"
        ]
    assert table["lmms_accuracy"]["n"] == 4 and table["failed"]["mean"] == 0
