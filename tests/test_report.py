"The report of a run: whole, half, and with hostile content. Numbers here are made up."

import csv
import html.parser
import json
import random
import re
import shutil
import sys
from pathlib import Path

import pytest

from specs_nb.analysis import (
    MODELS,
    SPLITS,
    comparisons,
    findings,
    paired_difference,
    question_means,
    read_run,
    title,
)
from specs_nb.core import SpecsError
from specs_nb.study.charts import LOOKS
from specs_nb.study.report import (
    SCRIPTS,
    WEB,
    Table,
    compare,
    contrast_words,
    grid_report,
    group_table,
    hashed,
    latex,
    seed_contrasts,
    seed_groups,
    write_report,
)

sys.path.insert(0, str(Path(__file__).parent))
import chromium

HOSTILE = (
    "<think>\"'><script>document.title = 'taken'</script><!--<script><img src=https://example.com/x.png"
    " onerror=document.title='taken'></think>\n{{ 7*7 }} {% raw %} </pre></script> <answer>1</answer>"
)


def stat(mean, n=60):
    return dict(
        mean=mean,
        lo=None if mean is None else max(0, mean - 0.05),
        hi=None if mean is None else min(1, mean + 0.05),
        n=n,
    )


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


@pytest.fixture
def run(tmp_path):
    "A run folder with everything in it"
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from specs_nb import pairs as distilled
    from specs_nb import world

    run, level = tmp_path / "<i>run", dict(base=0.3, zero=0.5, coldstart=0.6, final=0.8)
    put(
        run / "eval/metrics.json",
        {
            m: {
                s: {
                    k: stat(level[m])
                    for k in ("accuracy", "format", "strict", "passk", "pass@1", "pass@2", "entropy")
                }
                for s in SPLITS
            }
            for m in MODELS
        },
    )
    right = lambda m, i: None if i == 59 else i < 60 * level[m]
    flat = [
        dict(
            model=m,
            split=s,
            id=f"world-{s if s in ('ood_visual', 'compositional') else 'test'}-0-{i}",
            asked="think_answer",
            greedy=g,
            sample=0,
            text=HOSTILE if i % 2 else f"plain {m}",
            accuracy=right(m, i),
            format=i % 3 > 0,
            strict=right(m, i),
        )
        for m in MODELS
        for s in SPLITS
        for i in range(60)
        for g in (False, True)
    ]
    pq.write_table(pa.Table.from_pylist(flat), run / "eval/answers.parquet")
    for s in ("zero", "final"):
        put(
            run / s / "history.json",
            [
                {
                    "step": i,
                    "reward": i / 9,
                    "rewards/format_reward/mean": 0.4,
                    "rewards/accuracy_reward/mean": None,
                }
                for i in range(9)
            ],
        )
    put(
        run / "coldstart/history.json",
        [{"step": 1, "loss": 1, "rewards/chosen": 0, "rewards/rejected": float("nan")}],
    )
    for s in ("zero", "pairs", "coldstart", "final", "eval"):
        put(run / s / "stage.json", dict(state="done", seconds=60, peak_memory_gb=1.5))
    pairs = [
        dict(
            r,
            prompt=[],
            chosen=distilled._says(HOSTILE),
            rejected=distilled._says("& <b>"),
            corruption="plain_answer",
        )
        for r in world.rows("train", 3)
    ]
    distilled.write_pairs(pairs, run / "pairs/pairs.parquet")
    (run / "config.yaml").write_text(
        "seed: 7\nmodel: {path: '<script>m'}\ndata: {n_test: 60}\neval: {n_samples: 4}\n"
    )
    return run


class Reader(html.parser.HTMLParser):
    "Elements of a page, its links, its ids; a closing tag must fit"

    void = {"meta", "img", "br", "link", "hr", "input"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.ids, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        self.ids += [v for k, v in attrs if k == "id"]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        tag in self.void or self.open.pop()

    def handle_endtag(self, tag):
        while (
            self.open
            and self.open[-1] != tag
            and self.open[-1] in ("tr", "td", "th", "li", "p", "tbody", "thead")
        ):
            self.open.pop()
        assert self.open.pop() == tag


def test_page_is_whole_and_self_contained(run):
    text = write_report(run).read_text()
    page = Reader(text)
    assert not page.open and len(text) < 1.5e6
    # 40 examples of each test, 6 questions through all models, 3 pairs
    assert (page.tags.count("svg"), page.tags.count("img")) == (13, 40 * len(SPLITS) + 6 + 3)
    assert all(l.startswith(("data:image/png;base64,", "#")) or (run / l).is_file() for l in page.links)
    assert not re.search(r"url\((?!#)|@import", text.split("<script")[0])
    assert {l[1:] for l in page.links if l[0] == "#"} <= set(page.ids)
    for word in (
        "right more often than the base: 80.0 % against 30.0 %",
        "in 4 tries",
        "5 min 00 s",
        "gf_gain",
        "seed 7",
    ):
        assert word in text, word


def test_what_models_wrote_is_text(run):
    text = write_report(run).read_text()
    tags = Reader(text).tags
    assert tags.count("script") == 1
    assert not {"iframe", "link", "object"} & set(tags)
    assert "<i>run" not in text
    assert "{{ 7*7 }} {% raw %}" in text, "and no template either"


def test_only_the_pages_own_scripts_may_run(run):
    text = write_report(run).read_text()
    policy, scripts = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1], re.findall(
        r"<script>(.*?)</script>", text, re.S
    )
    assert (
        policy.startswith("default-src 'none'")
        and "unsafe-eval" not in policy
        and "unsafe-inline" not in policy.split("script-src")[1]
    )
    assert re.findall(r"'sha256-[^']*'", policy) == [hashed(s) for s in scripts] and len(scripts) == 1


def test_parts_of_the_page_are_whole_and_readable():
    from jinja2 import Environment

    own = [WEB / name for name in (*SCRIPTS, "report.css")] + sorted(WEB.glob("*.j2"))
    assert len(own) > 20
    assert set(own) == set(WEB.iterdir()), "nothing lies there that no page uses"
    for part in own:
        text = part.read_text(encoding="utf-8")
        assert max(map(len, text.splitlines())) <= 110, part.name
        if part.suffix == ".j2":
            Environment().parse(text)


def test_marks_say_their_values(run):
    "By titles that any browser shows, and by names that the script finds; a file has them too"
    text = write_report(run).read_text()
    assert "<title>final trained format\n80 [75, 85]\nn = 60</title>" in text
    assert "<title>GRPO-zero\nstep 4: 0.4444</title>" in text
    assert "<a " not in text.split("<svg", 2)[1].split("</svg>")[0], "no mark is a link"
    assert "<title>" in (run / "report/reward.svg").read_text()
    for chart in re.findall(r"<figure.*?</figure>", text, re.S):
        names = set(re.findall(r'data-of="([^"]*)"', chart))
        assert names and names == set(re.findall(r'data-key="([^"]*)"', chart))


def test_charts_turn_dark_with_the_page(run):
    page = write_report(run).read_text()
    for drawn in re.findall(r"<svg.*?</svg>", page, re.S):
        colours = set(re.findall(r"#[0-9a-f]{6}\b", drawn.split("<defs>")[0]))
        assert not colours & {look[0] for look in LOOKS.values()}
        assert "var(--ink)" in drawn


def test_a_question_that_has_changed_is_not_shown(run):
    "Another version of the world draws other questions under the same ids"
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pq.read_table(run / "eval/answers.parquet").to_pylist()
    pq.write_table(
        pa.Table.from_pylist([dict(r, source="old world") for r in rows]), run / "eval/answers.parquet"
    )
    text = write_report(run).read_text()
    assert "be read any more)</b>" in text.split('id="learned"')[1].split("</section>")[0]
    assert "How many together?" not in text.split('id="learned"')[1].split("</section>")[0]


def test_same_run_same_page(run):
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


@pytest.mark.parametrize(
    "gone", ["zero", "pairs", "coldstart", "final", "eval/answers.parquet", "eval/stage.json", "config.yaml"]
)
def test_missing_stage_is_named(run, gone):
    import shutil

    path = run / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = write_report(run).read_text()
    assert not Reader(text).open
    if path.suffix == "":
        assert "not run" in text
    if gone in ("zero", "coldstart", "final"):
        assert f"<code>{gone}</code> left no history" in text


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"base": {}},
        {"final": None},
        {"final": {"id": {"accuracy": stat(0.5)}}, "base": {"id": {"accuracy": stat(None)}}},
    ],
)
def test_missing_numbers_are_dashes(run, metrics):
    put(run / "eval/metrics.json", metrics)
    text = write_report(run).read_text()
    assert (
        "<td>–" in text
        and "None" not in text.split("</style>")[1].split("What was run")[0]
        and "nan" not in text.lower().split("</style>")[1].split("<svg")[0]
    )


def test_no_metrics_no_report(run):
    (run / "eval/metrics.json").unlink()
    with pytest.raises(SpecsError, match="run `specs eval` first"):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    "name, hint",
    [
        ("eval/metrics.json", "delete it"),
        ("eval/answers.parquet", "specs eval"),
        ("pairs/pairs.parquet", "specs pairs"),
    ],
)
def test_broken_file_is_named(run, name, hint):
    (run / name).write_text("broken")
    with pytest.raises(SpecsError, match=hint):
        write_report(run)


def swap(run, names):
    "Give models each other's metrics and answers: model → whose"
    import pyarrow as pa
    import pyarrow.parquet as pq

    m = json.loads((run / "eval/metrics.json").read_text())
    put(run / "eval/metrics.json", {k: m[names.get(k, k)] for k in m})
    rows = pq.read_table(run / "eval/answers.parquet").to_pylist()
    of = {k: [r for r in rows if r["model"] == k] for k in MODELS}
    rows = [dict(r, model=k) for k in MODELS for r in of[names.get(k, k)]]
    pq.write_table(pa.Table.from_pylist(rows), run / "eval/answers.parquet")


def test_report_follows_the_numbers(run):
    "Final and base change places: the headline says so"
    swap(run, dict(final="base", base="final"))
    assert "right less often than the base" in write_report(run).read_text()
    swap(run, dict(final="base"))
    assert "not clearly different from the base" in write_report(run).read_text()


def words(run):
    "Title and findings of a report, without its charts"
    data = read_run(run)
    versus = comparisons(data["answers"])
    return title(data["metrics"], versus), findings(data["metrics"], versus, data["stages"])


def test_headline_goes_by_the_difference_on_the_same_questions(run):
    "Intervals that overlap hide no difference, and without the answers there is no verdict"
    m = json.loads((run / "eval/metrics.json").read_text())
    for model in ("base", "final"):
        m[model]["id"]["accuracy"].update(lo=0.0, hi=1.0)
    put(run / "eval/metrics.json", m)
    assert "right more often than the base" in words(run)[0]
    (run / "eval/answers.parquet").unlink()
    assert "no answers to compare question by question" in words(run)[0]


def test_no_difference_says_what_could_be_seen(run):
    swap(run, dict(final="zero"))
    line = words(run)[1][2]
    assert re.search(r"neither a gain nor a loss is shown; a true difference of \d+\.\d would be seen", line)
    assert "<small>could see " in write_report(run).read_text()


def test_cold_start_is_judged_at_equal_compute(run):
    "Final had more training than GRPO-zero: the report says so and doesn't answer"
    line = words(run)[1][2]
    assert "worth it can't be told from this" in line and "240 against 60 seconds" in line
    for s, sec in dict(zero=100, pairs=1, coldstart=1, final=1).items():
        put(run / s / "stage.json", dict(state="done", seconds=sec, steps=5))
    assert "10 against 5 steps of GRPO" in words(run)[1][2], "as long, and twice the steps"
    put(run / "final/stage.json", dict(state="done", seconds=1, steps=0))
    assert words(run)[1][2].startswith("Was the cold start worth it? Final − GRPO-zero, at equal compute")


def test_pairing_finds_what_two_intervals_hide():
    flat = [
        dict(model=m, split="id", id=i, accuracy=(i + k) % 4 < (i % 3) + (m == "a"))
        for m in "ab"
        for i in range(90)
        for k in range(4)
    ]
    means = question_means(flat, "accuracy")
    d = paired_difference(means["a", "id"], means["b", "id"])
    assert d["mean"] == 0.25 and d["n"] == 90
    assert 0.19 < d["lo"] < 0.25 < d["hi"] < 0.3, "as sure as ninety questions can be, and no more"


# ---- files beside the page


def test_numbers_are_files_too(run):
    write_report(run)
    rows = list(csv.DictReader((run / "report/scores.csv").open()))
    final = next(
        r
        for r in rows
        if (r["metric"], r["model"], r["split"]) == ("Right answer", "final", "trained format")
    )
    assert [float(final[k]) for k in ("mean", "lo", "hi", "n")] == pytest.approx([0.8, 0.75, 0.85, 60])
    assert "final & 80.0 {\\scriptsize [75.0, 85.0]}" in (run / "report/scores.tex").read_text()
    gf = [
        r
        for r in csv.DictReader((run / "report/gf.csv").open())
        if r["model"] == "final" and r["quantity"] == "gf_gain"
    ]
    assert len(gf) == 2 and float(gf[0]["lo"]) <= float(gf[0]["mean"]) <= float(gf[0]["hi"])
    for name in ("reward", "score-strict", "gf-strict", "passk-id", "coldstart-rewards"):
        assert (run / f"report/{name}.png").read_bytes()[:4] == b"\x89PNG" and (
            run / f"report/{name}.svg"
        ).read_text().lstrip().startswith("<?xml"), name


def test_hostile_names_stay_text_in_tables():
    t = Table("t", "50 % & more", [dict(a="=1+1", b="\\input{x}", c="c_1", mean=0.5)], ("a", "b", "c"))
    assert "\\textbackslash{}input\\{x\\}" in latex(t) and "50 \\% \\& more" in latex(t)


def test_judges_counts_are_shown(run):
    assert "What a judge decided" not in write_report(run).read_text()
    put(
        run / "pairs/stage.json",
        dict(
            state="done",
            seconds=1,
            judge={"<b>j": {"yes": 31, "no opinion": 2}, "spent": {"calls": 33, "tokens": 4321}},
            calibration=[dict(judge="<b>j", task="answer", agree=9, both=10)],
        ),
    )
    text = write_report(run).read_text()
    assert (
        all(
            w in text
            for w in (
                "What a judge decided",
                "33 requests, 4321 tokens",
                "&lt;b&gt;j",
                '<td>no opinion</td><td class="n">2</td>',
                "90.0",
            )
        )
        and "<b>j" not in text
    )


# ---- several runs


@pytest.fixture
def two(run):
    other = shutil.copytree(run, run.parent / "other")
    (other / "config.yaml").write_text((run / "config.yaml").read_text().replace("seed: 7", "seed: 8"))
    return [run, other]


def test_compared_on_the_same_questions(two):
    page = compare(two, two[0].parent / "out")
    text, rows = page.read_text(), list(csv.DictReader((page.parent / "report/differences.csv").open()))
    assert (
        not Reader(text).open
        and "unpaired" not in text
        and len(rows) == 12 * len(SPLITS)
        and all(float(r["lo"]) < float(r["mean"]) == 0 < float(r["hi"]) for r in rows)
    )
    assert "2 seeds" in text and "Seeds pooled" in text, "they differ in their seed alone"
    assert "<code>seed</code>" in text and "<code>eval.n_samples</code>" not in text


def test_other_questions_are_compared_unpaired(two):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    flat = pq.read_table(two[1] / "eval/answers.parquet").to_pylist()
    pq.write_table(
        pa.Table.from_pylist([dict(r, id="other" + r["id"]) for r in flat]), two[1] / "eval/answers.parquet"
    )
    page = compare(two, two[0].parent / "out")
    rows = [
        r
        for r in csv.DictReader((page.parent / "report/differences.csv").open())
        if "right answer" in r["what"] and r["model"] == "final"
    ]
    assert (
        "they are compared unpaired" in page.read_text()
        and len(rows) == 2 * len(SPLITS)
        and all(float(r["lo"]) < 0 < float(r["hi"]) for r in rows[: len(SPLITS)])
    )


def test_unfinished_run_is_not_compared(two):
    put(two[1] / "eval/stage.json", dict(state="running"))
    with pytest.raises(SpecsError, match="other is not finished"):
        compare(two, two[0].parent / "out")
    with pytest.raises(SpecsError, match="no run .*gone"):
        compare([two[0], two[0].parent / "gone"], two[0].parent / "out")
    assert not (two[0].parent / "out").exists()


def test_grid_has_intervals_over_seeds(tmp_path):
    rows = [
        dict(arm=a, seed=s, model="final", split="id", metric="strict", mean=0.5 + 0.1 * s)
        for a in ("<b>a", "b")
        for s in range(3)
    ] + [dict(arm="c", seed=0, model="final", split="id", metric="strict", mean=0.4)]
    text = grid_report(rows, tmp_path / "grid/report.html").read_text()
    assert (
        "<b>a" not in text
        and {r["arm"]: r["lo"] for r in csv.DictReader((tmp_path / "grid/report/grid.csv").open())}["c"] == ""
    )
    assert "[35.2, 84.8]" in text, "60 ± 4.303·10/√3"


def test_grid_has_paired_contrasts(tmp_path):
    "Seeds differ by far more than arms do: pairs of a seed show what arms alone hide"
    noise = [0.004, -0.003, 0.002, -0.004, 0.001]
    level = lambda a, s: 0.3 + 0.1 * s + (a == "b") * (0.05 + noise[s]) + (a == "c") * noise[s]
    rows = [
        dict(arm=a, seed=s, model="final", split="id", metric=m, mean=level(a, s))
        for a in "abc"
        for s in range(5)
        for m in ("strict", "accuracy")
    ]
    text = grid_report(rows, tmp_path / "grid/report.html").read_text()
    assert "b over a: +5.0 points [+4.6, +5.4]: holds." in text
    assert "c over a: 0.0 points [−0.4, +0.4]: does not hold." in text
    found = list(csv.DictReader((tmp_path / "grid/report/contrasts.csv").open()))
    assert {(r["pair"], r["model"]) for r in found} == {("b − a", "final"), ("c − a", "final")} and len(
        found
    ) == 4
    text = grid_report(rows, tmp_path / "grid/report.html", contrasts=[("b", "c")]).read_text()
    assert "b over c" in text and "over a" not in text
    text = grid_report([r for r in rows if r["seed"] == 0], tmp_path / "grid/report.html").read_text()
    assert "can&#39;t tell (one seed)" in text


# ---- seeds and groups


def made_run(seed, gain, n=40):
    "A run whose final model is right in half of its answers, and by `gain` more"
    luck = random.Random(100 * seed + gain)
    p = 0.5 + gain + luck.gauss(0, 0.02)
    answers = []
    for i in range(n):
        for split in SPLITS:
            scores = {m: luck.random() < p for m in ("accuracy", "format", "strict")}
            answers.append(dict(model="final", split=split, id=f"{seed}-{i}", asked="boxed", **scores))
    return dict(config=dict(seed=seed, data=dict(seed=seed), gain=gain), answers=answers)


def test_seeds_of_a_configuration_are_pooled():
    runs = {f"{gain}-{s}": made_run(s, gain) for s in range(5) for gain in (0, 0.3)}
    groups = seed_groups(runs)
    assert {k: len(v) for k, v in groups.items()} == {"0-0": 5, "0.3-0": 5}
    rows, remarks = seed_contrasts(groups)
    assert [(r["a"], r["seeds"], r["test"]) for r in rows] == [("0.3-0", 5, "t")] * 2 and not remarks
    assert all(r["p_holm"] >= r["p"] and abs(r["effect"] - 0.3) < 0.15 for r in rows)
    equal = seed_groups({f"{gain}-{s}": made_run(s, gain) for s in range(3) for gain in (0, 0.001)})
    row = seed_contrasts(equal)[0][0]
    assert "can't tell (could see " in contrast_words(row) and row["verdict"] == "can't tell"


def test_scores_by_kind_and_difficulty():
    about = lambda i: dict(kind="number" if i % 3 else "choice", difficulty=None if i % 2 else "hard")
    answers = [
        dict(model=m, split="id", id=i, accuracy=i % 3 > 0, format=True, strict=True, **about(i))
        for m in MODELS
        for i in range(30)
    ]
    rows = {(r["which"], r["model"]): r for r in group_table(answers).rows}
    assert rows["number (n = 20)", "final"]["mean"] == 1 > rows["number (n = 20)", "final"]["lo"]
    assert rows["choice (n = 10)", "final"]["mean"] == 0 and len(rows) == 8, "one difficulty makes no table"


# ---- in a browser


@pytest.fixture
def browser(tmp_path):
    if not chromium.find():
        pytest.skip("there is no Chromium or Chrome here")
    b = chromium.Browser(tmp_path / "profile")
    yield b
    b.close()


READY = "document.documentElement.dataset.ready"


@pytest.mark.parametrize("width, dark", [(390, True), (1280, False)])
def test_page_works_in_a_browser(run, browser, width, dark):
    browser.look(width, dark=dark)
    browser.open(write_report(run), READY)
    assert browser.run("document.querySelectorAll('figure[data-chart] > svg').length") == 12
    assert browser.run("document.title") == "SPECS: <i>run" and not browser.complaints(), browser.complaints()
    assert browser.run("document.documentElement.scrollWidth") <= width, "nothing to scroll sideways"
    light = browser.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert light < 60 if dark else light > 200
    fit = "Number(document.querySelector('output').dataset.fit)"

    def choose(name, value):
        browser.run(
            f"(e => {{ e.value = {json.dumps(value)}; e.dispatchEvent(new Event('input', {{bubbles: true}}))"
            f" }})(document.querySelector('[name={name}]'))"
        )

    every = browser.run(fit)
    choose("model", "final")
    some = browser.run(fit)
    assert 4 * some == every > 400
    choose("right", "none")
    assert 0 < browser.run(fit) < some
    assert browser.run(
        "[...document.querySelectorAll('.said')].filter(s => s.checkVisibility()).every(s => s.dataset.model"
        " === 'final' && s.dataset.right === 'none')"
    )
    choose("right", ""), choose("text", "PLAIN FINAL")
    assert 0 < browser.run(fit) < some
    choose("text", "nobody said this")
    assert browser.run("document.querySelector('output').value") == "no answer fits"


def test_names_of_a_legend_hide_their_marks(run, browser):
    browser.look(1000)
    browser.open(write_report(run), READY)
    figure = "document.querySelector('figure[data-chart=score-accuracy]')"
    marks = f"[...{figure}.querySelectorAll('[data-of=final]')]"
    seen = f"{marks}.filter(m => getComputedStyle(m).display !== 'none').length"
    every = browser.run(seen)
    assert every == browser.run(f"{marks}.length") > 0
    click = f"{figure}.querySelector('[data-key=final]').onclick()"
    browser.run(click)
    assert browser.run(seen) == 0
    assert browser.run(f"{figure}.querySelector('[data-key=final]').ariaPressed") == "false"
    browser.run(click)
    assert browser.run(seen) == every
