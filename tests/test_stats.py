"Evaluation and its statistics: what is counted, what is left out, and how sure one may be."

import math

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import t as student
from scipy.stats import ttest_1samp

from specs_nb import evaluate as ev
from specs_nb.analysis import generalization_factor, read_answers
from specs_nb.core import EvalStage, SpecsError
from specs_nb.study.stats import (
    contrast,
    contrasts,
    detectable,
    gf_curve,
    gf_interval,
    gf_over_seeds,
    hierarchical,
    holm,
    paired_p,
    told,
    too_small_p,
    verdict,
    with_verdicts,
)

RNG = np.random.default_rng(0)


def row(i, answer="3", kind="number"):
    return dict(id=f"q{i}", question="how many?", images=[], answer=answer, kind=kind, choices=None)


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """An evaluation whose model says what we tell it: half right when it samples, always right when it is
    greedy"""

    class Said(list):
        def surprises(self):
            return [[None if t is None else 0.5 for t in one] for one in self]

    def said(jobs, how, seed, folder, **kw):
        def texts(n, a, b):
            return [f"\\boxed{{{a}}}", f"it is {a}", f"\\boxed{{{b}}}", None][:n]

        return {
            j.name: Said(
                (
                    texts(j.how.n, "3", "4")
                    if r["kind"] == "number"
                    else texts(j.how.n, "air scatters the short waves", "it is painted")
                )
                for r in j.rows
            )
            for j in jobs
        }

    monkeypatch.setattr(ev, "answer_all", said)
    rows = [dict(row(i), source="a set", level=2) for i in range(6)] + [
        row(6, "light scatters on air", "text")
    ]

    def run(**kw):
        metrics = ev.evaluate(
            {"base": "tiny"},
            {"id": (rows, ["boxed"] * 7)},
            tmp_path,
            EvalStage(n_samples=4, **kw.pop("config", {})),
            **kw,
        )
        return metrics["base"]["id"], tmp_path / "answers.parquet"

    return run


def test_metrics_of_an_evaluation(evaluated):
    m, _ = evaluated()
    assert [k for k in m if k.startswith("pass@")] == ["pass@1", "pass@2", "pass@4"]
    assert m["pass@4"]["n"] == 0 and m["pass@4"]["mean"] is None, "three of four are graded"
    assert (
        m["pass@2"]["n"] == 6
        and math.isclose(m["pass@2"]["mean"], 1)
        and math.isclose(m["pass@1"]["mean"], 2 / 3)
    )
    assert m["distinct"]["mean"] == 2 and m["truncated"]["mean"] == 0 and m["tokens"]["mean"] > 1
    assert m["distinct_right"]["n"] == 6 and m["distinct_right"]["mean"] == 2
    assert math.isclose(m["no_opinion"]["mean"], (6 / 4 + 1) / 7) and m["accuracy"]["n"] == 6
    assert m["surprise"]["mean"] == 0.5, "what could not be asked surprises nobody"


def test_answers_know_their_question(evaluated):
    "Source, kind and difficulty stand beside each answer, so that the report can tell them apart"
    _, path = evaluated()
    rows = pq.read_table(path).to_pylist()
    assert {(r["kind"], r["source"]) for r in rows} == {("number", "a set"), ("text", None)}
    assert {r["id"]: r["difficulty"] for r in rows} == {f"q{i}": "2" for i in range(6)} | {"q6": None}
    assert {"source", "kind", "difficulty"} <= set(read_answers(path)[0])


def test_perfect_scores_are_not_sure(evaluated):
    m, _ = evaluated()
    v = m["pass@2"]
    assert v["mean"] == v["hi"] == 1 and 0.4 < v["lo"] < 0.95 and m["surprise"]["lo"] == 0.5


def test_greedy_is_kept_apart(evaluated):
    m, path = evaluated()
    assert (
        m["greedy_accuracy"]["mean"] == 1 and m["greedy_accuracy"]["n"] == 6 and m["greedy_format"]["n"] == 7
    )
    assert sum(r["greedy"] for r in pq.read_table(path, columns=["greedy"]).to_pylist()) == 7
    assert len(read_answers(path)) == 28, "the report reads sampled answers alone"
    assert (
        math.isclose(ev.question_values(path, "accuracy")["base"]["id"]["q0"], 2 / 3)
        and ev.question_values(path, "accuracy", greedy=True)["base"]["id"]["q0"] == 1
    )
    m, path = evaluated(config=dict(greedy=False))
    assert not any(k.startswith("greedy") for k in m) and ev.question_values(path, greedy=True) == {}


def test_judge_is_asked_where_the_rules_are_silent(evaluated):
    asked = []

    class Judge:
        def ask(self, task, items):
            asked.extend(items)
            return ["scatters" in i["prediction"] for i in items]

    m, path = evaluated(second=Judge())
    assert {i["gold"] for i in asked} == {"light scatters on air"} and len(asked) == len(
        {i["prediction"] for i in asked}
    )
    assert m["accuracy"]["n"] == 7 and math.isclose(
        m["no_opinion"]["mean"], 1 / 4
    ), "what was never asked stays without opinion"


def test_missing_checkpoints_are_named(tmp_path):
    (tmp_path / "checkpoints/checkpoint-5").mkdir(parents=True)
    with pytest.raises(SpecsError, match="save_total_limit"):
        ev.evaluate_checkpoints("tiny", tmp_path, {}, tmp_path / "out", EvalStage())
    (tmp_path / "checkpoints/checkpoint-5/trainer_state.json").write_text("{}")
    assert list(ev.checkpoints(tmp_path)) == [5]
    with pytest.raises(SpecsError, match="step 10; there are 5"):
        ev.evaluate_checkpoints("tiny", tmp_path, {}, tmp_path / "out", EvalStage(), steps=[5, 10])


# ---- seeds and questions


def arm(gain, seeds, own=False, q=40, luck_sd=0.05):
    "Scores of seeds, on the same questions or on each seed's own"
    hard, out = RNG.normal(0, 0.2, q), {}
    for s in range(seeds):
        if own:
            hard = RNG.normal(0, 0.2, q)
        p = np.clip(0.5 + gain + RNG.normal(0, luck_sd) + hard, 0, 1)
        out[s] = {f"{s if own else ''}q{i}": float(RNG.binomial(4, p[i]) / 4) for i in range(q)}
    return out


@pytest.mark.parametrize("seeds, own", [(1, False), (5, False), (5, True), (10, False)])
def test_intervals_hold_what_they_promise(seeds, own):
    held = [
        (h := hierarchical(arm(0, seeds, own, luck_sd=0.05 * (seeds > 1)), 400))["lo"] <= 0.5 <= h["hi"]
        for _ in range(150)
    ]
    assert 0.88 <= sum(held) / 150, f"{sum(held)} of 150"
    if seeds == 10:
        assert sum(held) / 150 < 1, "an interval that always holds is too wide to use"


def test_pairing_takes_the_questions_difficulty_away():
    a = arm(0, 8, luck_sd=0.01)
    b = {s: {i: v + 0.05 for i, v in of.items()} for s, of in a.items()}
    c = contrast(b, a)
    assert abs(c["effect"] - 0.05) < 1e-9 and c["hi"] - c["lo"] < 1e-9
    assert c["p"] is None and c["test"] == "none", "without spread t can't tell"
    h = hierarchical(a)
    assert h["hi"] - h["lo"] > 0.05


def test_p_values():
    d = [0.05, 0.03, 0.06, 0.02, 0.04, 0.05, 0.01, 0.04, 0.03, -0.01]
    for seeds in (d[:2], d[:5], d, d * 2):
        assert paired_p(seeds)["test"] == "t", "one test, fixed beforehand, whatever the number of seeds"
        assert paired_p(seeds)["p"] == pytest.approx(ttest_1samp(seeds, 0).pvalue)
    assert paired_p([-x for x in d])["p"] == paired_p(d)["p"]
    assert paired_p([0.1])["p"] is None and paired_p([0.0, 0.0])["p"] == 1
    assert holm([0.04, 0.01, None]) == pytest.approx([0.04, 0.02, None]) and holm(
        [0.04, 0.01, None], 3
    ) == pytest.approx([0.08, 0.03, None])
    assert detectable(0.05, 10) < detectable(0.05, 5) and detectable(0.05, 1) is None
    # TTestPower and multipletests of statsmodels 0.15 give the same
    assert detectable(1, 10) == pytest.approx(0.9960019, abs=1e-5)
    assert detectable(1, 5, 0.05 / 7) == pytest.approx(2.8738177, abs=1e-5)


def test_the_length_of_the_list_picks_no_test():
    "A p value is the same alone and in company; only its correction differs"
    arms = {a: arm(0, 10) for a in "abc"}
    alone = contrasts(arms, [("a", "b")])[0]
    for n in (1, 30):
        company = contrasts(arms, [("a", "b")] + [("a", "c")] * n)[0]
        assert (company["p"], company["test"]) == (alone["p"], alone["test"])
        assert company["p_holm"] >= alone["p_holm"] and company["p_small_holm"] >= alone["p_small_holm"]


def test_does_not_hold_is_corrected_like_holds():
    "Ten true effects that just matter: at most 5 % of such lists say of any that it does not hold"
    rng, wrong, bare = np.random.default_rng(3), 0, 0
    for _ in range(150):
        rows = []
        for d in rng.normal(0.02, 0.02, (10, 5)):
            half = student.ppf(0.975, 4) * d.std(ddof=1) / 5**0.5
            rows.append(dict(differences=d, lo=d.mean() - half, hi=d.mean() + half, **paired_p(d)))
        wrong += any(r["verdict"] == "does not hold" for r in with_verdicts(rows))
        bare += any(r["hi"] < 0.02 for r in rows)
    assert wrong <= 12 < 20 < bare, (wrong, bare)


def test_no_verdict_without_what_could_be_seen():
    a, b = arm(0, 5), arm(0.01, 5)
    row = contrasts(dict(a=a, b=b), [("b", "a")], smallest=0.001)[0]
    assert row["verdict"] == "can't tell"
    assert told(row, 100, "points") == f"can't tell (could see {100 * row['detectable']:.3g} points)"


@pytest.mark.parametrize("seeds", [1, 5])
def test_all_right_is_not_sure(seeds):
    "30 of 30 has an interval, and so has a difference of nothing between two that answer all"
    perfect = {s: {i: 1.0 for i in range(30)} for s in range(seeds)}
    h, c = hierarchical(perfect, ends=(0, 1)), contrast(perfect, perfect, ends=(-1, 1))
    assert h["hi"] == h["mean"] == 1 and 0.8 < h["lo"] < 0.96
    assert c["lo"] < 0 < c["hi"] and c["effect"] == 0
    gf = gf_interval(shares(100, 100, 30), shares(0, 0, 30))
    assert gf["gf_raw"]["mean"] == gf["gf_raw"]["hi"] == 1 > gf["gf_raw"]["lo"] and gf["gf_gain"]["lo"] < 1


def test_verdicts():
    arms = dict(low=arm(0, 10, q=80, luck_sd=0.01), high=arm(0.3, 10, q=80, luck_sd=0.01))
    up, down = contrasts(arms, [("high", "low"), ("low", "high")])
    assert (up["verdict"], down["verdict"]) == ("holds", "does not hold") and up["p_holm"] >= 2 * up[
        "p"
    ] - 1e-12
    assert verdict(0.01, 0.2, 0.06, 1) == verdict(-0.1, 0.2, 0.01, 1) == "can't tell"
    assert verdict(0.001, 0.01, 1e-9, 1e-9) == "does not hold"
    assert verdict(0.001, 0.01, 1e-9, 0.06) == "holds", "surely there, not surely too small"
    assert verdict(-0.01, 0.01, 0.5, 0.06) == "can't tell"
    assert too_small_p([0.1]) is None
    one = {k: {0: v[0]} for k, v in arms.items()}
    assert (
        contrasts(one, [("high", "low")])[0]["verdict"] == "can't tell"
    ), "one seed shows nothing about others"
    with pytest.raises(SpecsError, match="no arm"):
        contrasts(arms, [("high", "nothing")])


# ---- the Generalization Factor


def shares(i, o, n=1000):
    return {
        "id": {k: float(k < i * n / 100) for k in range(n)},
        "ood_format": {k: float(k < o * n / 100) for k in range(n)},
    }


@pytest.mark.parametrize("i, o, gf", [(98, 69, 73.3), (97.5, 45.5, 50.9), (25, 1, 1.24)])
def test_gf_of_the_paper(i, o, gf):
    v = gf_interval(shares(i, o), n=200)["gf_raw"]
    assert 100 * v["mean"] == pytest.approx(gf, abs=0.06) and v["lo"] <= v["mean"] <= v["hi"]
    assert v["mean"] == pytest.approx(generalization_factor(i, o) / 100)


def test_gf_corners():
    loss = gf_interval(shares(50, 10), shares(20, 30), n=200)
    assert loss["gf_gain"]["mean"] == loss["gf_gain"]["hi"] == 0 < loss["gf_raw"]["mean"] and loss[
        "gain_ood"
    ]["mean"] == pytest.approx(-0.2)
    assert gf_interval(shares(50, 10))["gf_gain"] is None and generalization_factor(None, 1) is None
    for missing in ({}, {"id": {"a": 1}}, {"id": {"a": None}, "ood_format": {"a": 1}}):
        assert gf_interval(missing)["gf_raw"] is None
    assert (
        gf_over_seeds({0: shares(50, 10), 1: {"id": {0: 1.0}}})["gf_raw"] is None
    ), "a seed without one split can't be averaged in silence"


def test_gf_of_gains_is_paired_over_questions():
    "The same model again gains nothing for sure; one with the same shares on other questions may"
    base = shares(50, 50, 100)
    other = {s: {99 - k: v for k, v in of.items()} for s, of in base.items()}
    same, moved = gf_interval(base, base, n=500), gf_interval(other, base, n=500)
    assert same["gain_id"]["mean"] == moved["gain_id"]["mean"] == 0
    assert -0.05 < same["gain_id"]["lo"] < 0 < same["gain_id"]["hi"] < 0.05 < moved["gf_gain"]["hi"]


def test_gf_curve_begins_with_the_base():
    curve = gf_curve({5: shares(80, 40), 0: shares(20, 20)}, n=200)
    assert (
        list(curve) == [0, 5]
        and curve[0]["gf_gain"]["mean"] == 0
        and curve[5]["gf_gain"]["mean"] == pytest.approx(generalization_factor(0.6, 0.2))
    )
