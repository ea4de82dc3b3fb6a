"""A small grid, run for real: what is common is done once, a second call does nothing, an arm that fails
doesn't take the others with it."""

import re

import pyarrow.parquet as pq
import pytest

from specs_nb.core import SpecsError, read_json
from specs_nb.pipeline import keys, main
from specs_nb.study.ablate import cells_of, read_grid

GRID = """
config: smoke
seeds: {rest: 1}
deep: {eval.n_samples: 4, data.n_test: 4}
arms:
  none: {deep: true, set: {coldstart.loss: none}}
  sft: {set: {coldstart.loss: sft}}
  dpo: {set: {coldstart.loss: dpo}}
  lost: {set: {pairs.teacher: no/such/model}}
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
        cells_of(read_grid(tmp_path / "g.yaml"), keys)


def test_paper_grid_is_whole():
    grid = read_grid("paper")
    nodes, cells = cells_of(grid, keys)
    assert sum(a == "dpo+sft" for a, _ in cells) >= 10 and sum(a == "coupled" for a, _ in cells) >= 5
    pairs = {nodes[cells[a, 0]["pairs"]].name for a in ("sft", "dpo", "dpo+sft", "dpo+sft@0.1", "dpo+sft@2")}
    assert len(pairs) == 1, "all losses learn from the same pairs"


def test_score_grid_is_whole():
    grid = read_grid("score")
    nodes, cells = cells_of(grid, keys, seeds=1)
    assert list(grid.claims) == ["C1", "C2", "C3", "C4", "C5", "C6", "C7"]
    assert grid.first_seed == 1, "seed 0 is that of the default run, which has been looked at"
    assert grid.seeds == {"main": 10, "beyond": 10}
    tested = {a for c in grid.claims.values() for a in (*c.over, *c.slope)}
    assert all(grid.arms[a].seeds == "main" for a in tested), "what is tested runs first"
    shared = {cells[a, 1]["pairs"] for a in ("specs", "sft", "dpo")}
    assert len(shared) == 1, "the losses learn from the same pairs"
    samples = {nodes[cells[a, 1]["pairs"]].samples for a in ("specs", "any_style", "coupled")}
    assert len(samples) == 1, "pairs of other kinds are made from the same answers"
    for arm in grid.arms:
        looks = cells[arm, 1]
        assert {"eval_final@24", "eval_final@64"} <= set(looks), arm
        assert nodes[looks["final"]].config.final.steps == 64 + grid.arms[arm].before
        assert nodes[looks["final"]].config.keep_checkpoints, "both budgets are looked at from checkpoints"


def test_checkpoints_at_budgets_are_done_and_told(tmp_path, monkeypatch):
    "A small grid with budgets through `specs ablate`: a row for each budget, claims in claims.json"
    import json

    import pyarrow.parquet as pq

    from specs_nb.pipeline import main

    (tmp_path / "g.yaml").write_text(
        "config: smoke\n"
        "budgets: [1, 2]\n"
        "seeds: {rest: 1}\n"
        "set: {data.n_test: 4, eval.n_samples: 1, eval.greedy: false, zero.look: 0}\n"
        "arms: {none: {before: 1, set: {coldstart.loss: none}}}\n"
        "claims: {C1: {says: later is better, slope: [none]}}\n"
    )
    grid, out = str(tmp_path / "g.yaml"), str(tmp_path / "out")
    assert main(["ablate", "--grid", grid, "--run-dir", out, "--workers", "1"]) == 0
    rows = pq.read_table(tmp_path / "out/results.parquet").to_pylist()
    assert {r["model"] for r in rows} == {"base", "final", "final@1", "final@2"}

    def strict(model):
        return [r["mean"] for r in rows if (r["model"], r["split"], r["metric"]) == (model, "id", "strict")]

    assert strict("final@2") == strict("final"), "the last budget is the end of the training"
    (final,) = (tmp_path / "out/stages").glob("final-*")
    kept = {p.name for p in (final / "final/checkpoints").glob("checkpoint-*")}
    assert kept == {"checkpoint-2"}, "a step more than its budget; the others are gone"
    (claim,) = json.loads((tmp_path / "out/claims.json").read_text())
    assert claim["claim"] == "C1" and claim["verdict"] == "not run"
