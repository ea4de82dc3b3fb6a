"Grading: the table of cases, properties of any input, safety, and what importing costs"

import gc
import json
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specs_nb.grading import conclusion, consistent, grade
from specs_nb.inputs.compare import KINDS, explain_grade, kind_of
from specs_nb.inputs.drafts import Drop, check_gold, infer, unbox
from specs_nb.inputs.latex import too_hard
from specs_nb.inputs.limits import limited
from specs_nb.inputs.parsers import read_number, unwrap

DATA = Path(__file__).parent / "data"
CASES = [json.loads(line) for line in (DATA / "graded.jsonl").open(encoding="utf-8")]
calm = settings(max_examples=150, deadline=None, derandomize=True)


def verdict(case):
    return grade(case["prediction"], case["gold"], case["kind"], case.get("choices"))


def test_the_table_is_large_and_explained():
    assert len(CASES) >= 400 and {c["kind"] for c in CASES} == set(KINDS)
    assert all(c["reason"] and c["verdict"] in (True, False, None) for c in CASES)
    assert len({(c["kind"], c["prediction"], c["gold"], str(c.get("choices"))) for c in CASES}) == len(CASES)


@pytest.mark.parametrize("kind", KINDS)
def test_agreement(kind):
    cases = [c for c in CASES if c["kind"] == kind]
    wrong = [(c["prediction"], c["gold"]) for c in cases if verdict(c) is not c["verdict"]]
    assert len(wrong) <= 0.04 * len(cases), wrong


def test_no_wrong_answer_is_paid():
    assert not [c for c in CASES if verdict(c) is True and c["verdict"] is not True]


def by_the_path_of_data(case):
    "The verdict on a case as real data gets it: unbox → infer → check_gold → explain_grade"
    try:
        gold, kind, choices = infer(case["question"], unbox(case["gold"]), case["choices"])
        check_gold(gold, kind, choices)
    except Drop as e:
        return None, f"dropped: {e}"
    columns = {k: case[k] for k in ("tol", "precision") if k in case}
    return explain_grade(case["pred"], gold, kind, choices, **columns)


@pytest.mark.parametrize("name", ["grading_cases.jsonl", "grading_more.jsonl"])
def test_what_people_bring(name):
    cases = [json.loads(line) for line in (DATA / name).open(encoding="utf-8")]
    verdicts = [by_the_path_of_data(c) for c in cases]
    wrong = [(v, why, c) for (v, why), c in zip(verdicts, cases) if v is not c["want"]]
    report = "\n".join(f"{v}: {c['pred']!r} for {c['gold']!r} ({why})" for v, why, c in wrong)
    assert not [1 for v, *_ in wrong if v is True], f"a wrong answer is paid:\n{report}"
    assert len(wrong) <= 0.02 * len(cases), report


def test_none_has_a_reason():
    for c in CASES:
        v, why = explain_grade(c["prediction"], c["gold"], c["kind"], c.get("choices"))
        assert isinstance(why, str) and why and v in (True, False, None)


answers = st.one_of(
    st.integers().map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.fractions().map(str),
    st.sampled_from("ABCDEFGH"),
    st.sampled_from(sorted({c["gold"] for c in CASES})),
    st.text(max_size=60),
    st.text("0123456789.,-+/%$ ", max_size=12),
    st.text(r"\{}()[]^_xyABab12+=<>,; ", max_size=20),
)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_equals_itself(kind):
    @calm
    @given(answers)
    def check(x):
        assert grade(x, x, kind) is not False

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_gets_a_verdict(kind):
    @calm
    @given(answers, answers)
    def check(p, g):
        v, why = explain_grade(p, g, kind)
        assert v in (True, False, None) and why

    check()


@calm
@given(st.fractions(), st.fractions())
def test_fractions_equal_only_when_they_are(a, b):
    assert grade(str(a), str(b), "number") is (a == b)


@calm
@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_integers_have_no_tolerance(a, b):
    assert grade(f"{a:,}", str(b), "number") is (a == b)


@calm
@given(
    st.integers(-999, 999),
    st.sampled_from([
        "{}",
        "${}$",
        r"\boxed{{{}}}",
        r"The answer is $\boxed{{{}}}$.",
        "**{}**",
        "Answer: {}",
        "{} circles",
        "x = {}",
    ]),
)
def test_wrapping_changes_nothing(n, wrap):
    assert (
        grade(wrap.format(n), str(n), "number") is True
        and grade(wrap.format(n + 1), str(n), "number") is False
    )


@calm
@given(
    st.lists(st.sampled_from("ABCDEFGH"), min_size=2, unique=True),
    st.sampled_from([", ", " and ", " or ", "", "/", ") ("]),
)
def test_several_letters_are_no_choice(letters, between):
    assert not any(grade(between.join(letters), gold, "choice") for gold in letters)


@calm
@given(st.integers(0, 99), st.integers(0, 99), st.sampled_from([", ", " or ", " and ", " ", "; ", " to "]))
def test_two_numbers_are_no_number(a, b, between):
    if a != b:
        assert grade(f"{a}{between}{b}", str(b), "number") is False


@calm
@given(st.text(max_size=300))
def test_unwrap_ends(text):
    once = unwrap(text)
    assert len(once) <= len(text) + 60 and (n := read_number(once)) is None or isinstance(n.value, Fraction)


HOSTILE = [
    "9^{9^{9^9}}",
    "{" * 10_000,
    "}" * 10_000,
    "9" * 10**6,
    "\\boxed{" * 1400,
    "\x00" * 99,
    "\u202e21\u202c",
    "a" * 10**6,
    "\\frac{" * 3000,
    "x^" * 190,
    "1," * 5000,
    "2^{2^{9999}}",
    "9999!",
    "((9^{99})^{99})^{99}",
    "\\int_0^1" * 20 + "x" + " dx" * 20,
    "\\sum_{n=1}^{\\infty}\\frac{\\sin n}{n^3+n}",
    "[[1,2]," * 900,
    "\\exp(\\exp(\\exp(9999)))",
    "\\binom{99999}{49999}",
    "\\pm " * 2000,
    '{"a":' * 1500,
    "x=1 or " * 1000,
    "(0,1)\\cup" * 1000,
    "\\begin{matrix}" * 25,
    "__import__('os').system('touch hacked')",
]
GOLDS = {
    "choice": "B",
    "number": "12",
    "latex": r"\frac{x+1}{2}",
    "text": "red",
    "set": r"\{1,2\}",
    "interval": "[0,1)",
    "multi": "3; 5",
    "box": "[0,0,9,9]",
}


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda h: f"{h[:12]!r}{len(h)}")
def test_hostile_text_is_cheap(hostile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grade("x", "x+1", "latex")  # warm
    for kind, gold in GOLDS.items():
        for p, g in ((hostile, gold), (gold, hostile)):
            start = time.thread_time()  # what the answer costs, whatever else the machine does meanwhile
            assert grade(p, g, kind) is not True
            assert time.thread_time() - start < 1.5  # 0.7 s of algebra
    consistent(hostile, "12", "number"), kind_of(hostile)
    assert not list(tmp_path.iterdir())
    assert grade(r"\frac{2}{4}", "1/2", "latex") is True, "and the next answer is graded as ever"


def test_the_guard_lets_common_answers_pass():
    assert not [
        c["gold"] for c in CASES if c["kind"] == "latex" and c["verdict"] is not None and too_hard(c["gold"])
    ]


def test_a_time_limit_works_in_threads():
    def forever():
        while True:
            pass

    with ThreadPoolExecutor(4) as pool:
        for f in [pool.submit(limited, 0.1, forever) for _ in range(4)]:
            with pytest.raises(TimeoutError):
                f.result()
        assert list(pool.map(lambda i: limited(1, abs, -i), range(20))) == list(range(20))


def test_a_swallowed_limit_is_raised_again():
    def stubborn():
        for _ in range(3):
            try:
                while True:
                    pass
            except BaseException:
                pass
        while True:
            pass

    start = time.monotonic()
    with pytest.raises(TimeoutError):
        limited(0.05, stubborn)
    assert time.monotonic() - start < 1


class Finalized:
    def __del__(self):
        busy(0.01)


def busy(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_no_shot_is_lost_in_a_finalizer(monkeypatch):
    "Nor in a callback of the garbage collector, such as hypothesis has: Python would report it and go on"
    lost = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    gc.callbacks.append(lambda phase, info: busy(0.005))

    def forever():
        while True:
            Finalized()
            gc.collect(0)
            busy(0.01)

    try:
        for _ in range(8):
            with pytest.raises(TimeoutError):
                limited(0.02, forever)
    finally:
        gc.callbacks.pop()
    assert not lost


def test_no_late_shot_hits_what_follows():
    def just_in_time():
        end = time.monotonic() + 0.01
        while time.monotonic() < end:
            pass

    for _ in range(100):
        try:
            limited(0.01, just_in_time)
        except TimeoutError:
            pass
        sum(range(1000))
    time.sleep(0.05)


def test_an_error_inside_a_time_limit_comes_out():
    with pytest.raises(ZeroDivisionError):
        limited(1, lambda: 1 / 0)


SAME = [
    (r"\frac{2}{4}", "1/2", "latex"),
    ("BA", "AB", "latex"),
    ("x+1", "1+x", "latex"),
    ("12 cm", "12", "number"),
    ("B", "B", "choice"),
]


def test_threads_agree():
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda a: grade(*a), SAME * 20))
    assert found == [True, False, True, True, True] * 20


def test_processes_agree():
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        assert list(pool.map(grade, *zip(*SAME))) == [True, False, True, True, True]


def test_no_signal_is_used():
    import signal

    before = signal.getsignal(signal.SIGALRM)
    grade("x^2+1", "x^2+2", "latex")
    assert signal.getsignal(signal.SIGALRM) is before and signal.alarm(0) == 0


def test_importing_is_light():
    code = (
        "import sys, specs_nb.grading as g; assert g.grade('12', '12', 'number'); assert not {'sympy',"
        " 'torch', 'math_verify', 'trl', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'number'"):
        grade("1", "1", "numbr")


@pytest.mark.parametrize("gold", ["", " ", None, "\u200b", "x" * 20_000])
def test_an_empty_or_endless_gold_is_no_opinion(gold):
    assert grade("1", gold, "number") is None


@pytest.mark.parametrize("prediction", ["", " ", None, "\u200b", "x" * 20_000])
def test_an_empty_or_endless_prediction_is_wrong(prediction):
    assert grade(prediction, "1", "number") is False


def test_settings():
    assert grade("3.2", "3.14", "number", tol=0.05) and not grade("3.2", "3.14", "number")
    assert grade("3.16", "3.2", "number", precision=1) and grade(
        "[0, 0, 10, 10]", "[0, 0, 10, 5]", "box", iou_at=0.4
    )


def test_numbers_that_are_no_strings():
    assert grade(12, 12.0, "number") and grade(3, "4", "number") is False


@pytest.mark.parametrize(
    "text, kind, says",
    [
        ("Count: circle red 1, empty, square blue. So 1.", "number", "1"),
        ("I see square blue. So 2.", "number", "2"),
        ("Looks like B.", "choice", "B"),
        ("Two and one is three.", "number", "3"),
        (r"Thus \boxed{x+1}.", "latex", "x+1"),
        ("Hm.", "number", None),
        ("Hm.", "choice", None),
        ("", "text", None),
        ("I see more circles. So the answer is A.", "choice", "A"),
        ("It is 0.50 m.", "number", "0.50 m"),
    ],
)
def test_conclusions(text, kind, says):
    assert conclusion(text, kind) == says


@pytest.mark.parametrize(
    "text, answer, kind, choices, want",
    [
        ("So 1.", "1", "number", None, True),
        ("So 1.", "2", "number", None, False),
        ("So 1, no, 2.", "2", "number", None, True),
        ("Looks like B.", "B", "choice", None, True),
        ("Looks like B.", "A", "choice", None, False),
        ("Hm.", "A", "choice", None, None),
        ("There are more red circles", "B", "choice", ["blue circles", "red circles"], True),
        ("So 1/3.", "0.333", "number", None, True),
    ],
)
def test_consistency(text, answer, kind, choices, want):
    assert consistent(text, answer, kind, choices) is want


@pytest.mark.parametrize(
    "gold, kind",
    [
        ("12", "number"),
        ("50%", "number"),
        ("B", "choice"),
        (r"\frac{x}{2}", "latex"),
        ("[0, 1)", "interval"),
        (r"\{1, 2\}", "set"),
        ("red circle", "text"),
        ('[{"bbox_2d": [0, 0, 1, 1], "label": "a"}]', "box"),
    ],
)
def test_kinds_are_guessed(gold, kind):
    assert kind_of(gold) == kind


# ---- a grader of one's own, and a row's own tolerance


def half_or_whole(prediction, row):
    "A grader for the test: one for the gold answer, a half for anything longer, no opinion of `?`"
    if prediction == "?":
        return None
    return 1.0 if prediction == row["answer"] else 0.5 if len(prediction) > 1 else 0.0


def test_everything_asks_the_same_grader(tmp_path):
    from specs_nb.core import DataConfig
    from specs_nb.data import grpo_dataset
    from specs_nb.evaluate import grade_answer, question_value
    from specs_nb.formats import FORMATS
    from specs_nb.inputs.sources import load_rows, pass_rates
    from specs_nb.pairs import check_answer
    from specs_nb.rewards import accuracy_reward

    (tmp_path / "data.jsonl").write_text('{"question": "How many?", "answer": "3", "id": "a"}\n' * 1)
    (tmp_path / "test.jsonl").write_text('{"question": "How much?", "answer": "4", "id": "b", "tol": 0.1}\n')
    data = DataConfig(source=str(tmp_path), grader=f"{__name__}:half_or_whole", n_train=1, n_test=1)
    rows = load_rows(data, "train", tmp_path / "out")
    fmt = FORMATS["think_answer"]
    texts = [fmt.render("Hm.", a) for a in ("3", "33", "4", "?")]
    ds = grpo_dataset(rows, fmt.instruction, fmt.name)
    columns = {k: [ds[0][k]] * 4 for k in ("answer", "kind", "choices", "grading", "format")}
    want = [1.0, 0.5, 0.0, None]
    assert accuracy_reward(texts, **columns) == want
    assert [grade_answer(t, rows[0], fmt.name)["accuracy"] for t in texts] == want
    verdicts = [check_answer(t, rows[0], fmt, check_consistency=False)[0] for t in texts]
    assert verdicts == ["kept", "kept", "wrong", "ungradable"]
    assert pass_rates([rows[0]], [texts]) == [0.5]
    scores = [dict(grade_answer(t, rows[0], fmt.name), words=1) for t in texts]
    value = question_value(scores)
    assert value["accuracy"] == 0.5 and value["pass@1"] == pytest.approx(2 / 3)
    by_rules = load_rows(DataConfig(source=str(tmp_path), n_train=1, n_test=1), "test", tmp_path / "rules")[0]
    assert accuracy_reward([fmt.render("Hm.", "4.3")], **{k: [v] for k, v in by_rules.items()}) == [1.0]


def test_the_world_takes_a_grader_too(tmp_path):
    from specs_nb.core import DataConfig
    from specs_nb.inputs.sources import load_rows

    name = f"{__name__}:half_or_whole"
    assert json.loads(load_rows(DataConfig(grader=name, n_train=2), "train", tmp_path)[0]["grading"]) == {
        "grader": name
    }


def folded(prediction, row):
    "A grader for the test: letters without their case"
    return prediction.casefold() == row["answer"].casefold()


def test_consistency_teacher_and_benchmarks_ask_it_too(tmp_path):
    from specs_nb.core import read_json
    from specs_nb.formats import FORMATS
    from specs_nb.pairs import check_answer
    from specs_nb.rewards import consistency_reward
    from specs_nb.study.benchmarks import _gold, read_sample, tabulate, write_task
    from specs_nb.study.teacher import _graded

    fmt, how = FORMATS["think_answer"], json.dumps(dict(grader=f"{__name__}:folded"))
    row = dict(id="a", question="Which gas?", answer="X", kind="text", choices=None, images=[])
    text = fmt.render("So the answer is x.", "X")
    assert _graded(text, row, fmt)["usable"] and _graded(text, dict(row, grading=how), fmt)["usable"]
    other = fmt.render("So the answer is X_2.", "x")
    columns = dict(kind=["text"] * 2, answer=["X"] * 2, grading=[how] * 2)
    assert consistency_reward([text, other], **columns) == [1.0, 0.0]
    assert check_answer(text, dict(row, grading=how), fmt)[0] == "kept"
    assert check_answer(other, dict(row, grading=how), fmt)[0] == "inconsistent"
    strict = dict(row, answer="BA", grading=json.dumps(dict(grader=f"{__name__}:backwards")))
    assert _graded(fmt.render("So the answer is BA.", "AB"), strict, fmt)["right"], "by its own grader"
    write_task([strict], "mine", tmp_path)
    (gold,) = read_json(tmp_path / "specs_mine.gold.json")["rows"]
    sample = dict(doc_id=0, target="BA", resps=[[fmt.render("Hm.", "AB")]], filtered_resps=[], acc_score=0.0)
    read = read_sample(sample, gold, "think_answer", 99)
    assert read["accuracy"] and tabulate([read])["differ"]["mean"] == 1
    stock = _gold(dict(input="Which?", target="BA"), False, f"{__name__}:backwards")
    assert read_sample(sample, stock, "think_answer", 99)["accuracy"]


def backwards(prediction, row):
    "A grader for the test: right from behind"
    return prediction == row["answer"][::-1]


def test_answers_on_which_math_verify_differs_are_listed(tmp_path):
    from specs_nb.evaluate import _write_audit

    row = dict(answer="2024-01-15", kind="text", choices=None)
    looked = {
        ("2008", "2024-01-15"): (dict(row, kind="latex"), dict(id="a")),
        ("12", "12"): (dict(row, answer="12"), {}),
    }
    _write_audit(tmp_path / "audit.jsonl", looked)
    (line,) = (tmp_path / "audit.jsonl").read_text().splitlines()
    listed = json.loads(line)
    assert (listed["id"], listed["rules"], listed["math_verify"]) == ("a", False, True)
    assert listed["why"] and listed["math_verify_why"]


@pytest.mark.parametrize(
    "reasoning, answer, other, kind",
    [
        (r"We divide. So the slope is $\frac{x}{3}$.", r"\frac{x}{3}", r"\frac{x}{4}", "latex"),
        ("The side is doubled, so it is 4√3 cm.", r"4\sqrt{3}", r"5\sqrt{3}", "latex"),
        (r"Both roots fit. Therefore x = -1 or x = 4.", r"\{-1, 4\}", r"\{1, 4\}", "set"),
        ("Only two remain, so the numbers are 2 and 7.", "2, 7", "2, 9", "set"),
        ("The root is defined there. Thus x ≥ 2.", r"[2, \infty)", r"(2, \infty)", "interval"),
        (r"So the domain is $(-\infty, 3)$.", "x < 3", "x > 3", "interval"),
        ("Hence a = 2 and b = 5.", "a=2, b=5", "a=5, b=2", "multi"),
        ("All its angles are equal. So it is a rectangle.", "a rectangle", None, "text"),
    ],
)
def test_natural_conclusions_are_kept(reasoning, answer, other, kind):
    assert consistent(reasoning, answer, kind) is True
    assert other is None or consistent(reasoning, other, kind) is False
    assert consistent("We look at the picture once more.", answer, kind) is None
