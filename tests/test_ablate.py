"""A small grid, run for real: what is common is done once, a second call does nothing, an arm that fails
doesn't take the others with it."""

import re

import pyarrow.parquet as pq
import pytest

from specs_nb.ablate import plan, read_grid
from specs_nb.core import SpecsError, read_json
from specs_nb.pipeline import keys, main

GRID = """
config: smoke
seeds: {rest: 1}
deep: {eval.n_samples: 4, data.n_test: 4}
arms:
  none: {deep: true, set: {coldstart.loss: none}}
  sft: {set: {coldstart.loss: sft}}
  dpo: {set: {coldstart.loss: dpo}}
  lost: {set: {distill.teacher: no/such/model}}
"""


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    (folder / "grid.yaml").write_text(GRID)
    return folder, [
        "ablate",
        "--grid",
        str(folder / "grid.yaml"),
        "--run-dir",
        str(folder / "run"),
        "--workers",
        "1",
    ]


def test_common_stages_are_done_once(grid, capfd):
    folder, words = grid
    assert main(words) == 1, "arm `lost` fails"
    done = sorted(
        p.name.split("-")[0] for p in (folder / "run/stages").iterdir() if list(p.glob("*/stage.json"))
    )
    assert done.count("zero") == 1 and done.count("coldstart") == 3 and done.count("final") == 3
    assert any("no/such/model" in wrong for wrong in read_json(folder / "run/errors.json").values())


def test_again_does_only_what_failed(grid, capfd):
    folder, words = grid
    before = {p: p.stat().st_mtime_ns for p in (folder / "run/stages").glob("*/*/model/*model.safetensors")}
    assert main(words) == 1
    assert {p: p.stat().st_mtime_ns for p in before} == before
    out = capfd.readouterr().out
    n, before = map(int, re.search(r"(\d+) stages, (\d+) of them done before", out).groups())
    assert n - before == len(read_json(folder / "run/errors.json")), "only the arm that failed is tried again"


def test_tables(grid):
    t = {
        n: pq.read_table(grid[0] / f"run/{n}.parquet").to_pylist()
        for n in ("results", "questions", "costs", "history")
    }
    assert {(r["arm"], r["model"]) for r in t["results"]} >= {
        ("none", "final"),
        ("sft", "coldstart"),
        ("dpo", "final"),
        ("sft", "zero"),
        ("none", "base"),
    }
    assert not any(
        r["arm"] == "none" and r["model"] == "coldstart" for r in t["results"]
    ), "there is no cold start to evaluate"
    asked = {
        (r["arm"], r["model"]): {
            q["id"]
            for q in t["questions"]
            if (q["arm"], q["model"], q["split"], q["deep"]) == (r["arm"], r["model"], "id", False)
        }
        for r in t["results"]
    }
    assert len(set(map(frozenset, asked.values()))) == 1, "all arms of a seed take the same test"
    assert all(0 <= q["accuracy_n"] <= q["n"] for q in t["questions"]) and all(
        c["seconds"] is not None for c in t["costs"]
    )
    assert any(h["key"] == "rewards/chosen" and h["arm"] == "dpo" for h in t["history"])


@pytest.mark.parametrize(
    "text, says",
    [
        ("arms: {}", "no arms"),
        ("armz: {a: {}}", "did you mean 'arms'"),
        ("arms: {a: {sett: {}}}", "did you mean 'set'"),
        ("arms: {a: {seeds: many}}", "no seeds 'many'"),
        ("arms: {a: {}}\nset: [x]", "set must be a mapping"),
        ("arms: [", "no valid YAML"),
    ],
)
def test_bad_grid(tmp_path, text, says):
    (tmp_path / "g.yaml").write_text(text)
    with pytest.raises(SpecsError, match=says):
        read_grid(tmp_path / "g.yaml")


def test_bad_value_names_the_arm(tmp_path):
    (tmp_path / "g.yaml").write_text("arms: {a: {set: {zero.stepz: 3}}}")
    with pytest.raises(SpecsError, match="arm a: .*stepz"):
        plan(read_grid(tmp_path / "g.yaml"), keys)


def test_paper_grid_is_whole():
    grid = read_grid("paper")
    nodes, cells = plan(grid, keys)
    assert sum(a == "dpo+sft" for a, _ in cells) >= 10 and sum(a == "coupled" for a, _ in cells) >= 5
    pairs = {nodes[cells[a, 0]["pairs"]].name for a in ("sft", "dpo", "dpo+sft", "dpo+sft@0.1", "dpo+sft@2")}
    assert len(pairs) == 1, "all losses learn from the same pairs"
