"The report of a run: whole, half, and with hostile content. Numbers here are made up."
import html.parser, json, re
from pathlib import Path
import pytest
from specs_nb.analysis import MODELS, SPLITS, paired_difference, question_means
from specs_nb.core import SpecsError
from specs_nb.report import write_report

HOSTILE = "<think>\"'><script>alert(1)</script><img src=https://example.com/x.png></think>\n{{ 7*7 }} {% raw %} <answer>1</answer>"

def stat(mean, n=60): return dict(mean=mean, lo=None if mean is None else max(0, mean - .05), hi=None if mean is None else min(1, mean + .05), n=n)

def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))

@pytest.fixture
def run(tmp_path):
    "A run folder with everything in it"
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from specs_nb import distill, world
    run, level = tmp_path/"<i>run", dict(base=.3, zero=.5, coldstart=.6, final=.8)
    put(run/"eval/metrics.json", {m: {s: {k: stat(level[m]) for k in ("accuracy", "format", "strict", "passk")} for s in SPLITS} for m in MODELS})
    flat = [dict(model=m, split=s, id=f"q{i}", accuracy=i < 60*level[m], format=True, strict=i < 60*level[m]) for m in MODELS for s in SPLITS for i in range(60)]
    pq.write_table(pa.Table.from_pylist(flat), run/"eval/answers.parquet")
    for s in ("zero", "final"): put(run/s/"history.json", [{"step": i, "reward": i/9, "rewards/format_reward/mean": .4, "rewards/accuracy_reward/mean": None} for i in range(9)])
    put(run/"coldstart/history.json", [{"step": 1, "loss": 1, "rewards/chosen": 0, "rewards/rejected": float("nan")}])
    for s in ("zero", "pairs", "coldstart", "final", "eval"): put(run/s/"stage.json", dict(state="done", seconds=60, peak_memory_gb=1.5))
    pairs = [dict(r, prompt=[], chosen=distill._says(HOSTILE), rejected=distill._says("& <b>"), corruption="plain_answer") for r in world.rows("train", 3)]
    distill.write_pairs(pairs, run/"pairs/pairs.parquet")
    (run/"config.yaml").write_text("seed: 7\nmodel: {path: '<script>m'}\neval: {n_samples: 4}\n")
    return run

class Reader(html.parser.HTMLParser):
    "Elements of a page, its links, its ids; a closing tag must fit"
    void = {"meta", "img", "br", "link", "hr"}
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.ids, self.open = [], [], [], []
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        self.ids += [v for k, v in attrs if k == "id"]
        if tag not in self.void: self.open.append(tag)
    def handle_startendtag(self, tag, attrs): self.handle_starttag(tag, attrs); tag in self.void or self.open.pop()
    def handle_endtag(self, tag):
        while self.open and self.open[-1] != tag and self.open[-1] in ("tr", "td", "th", "li", "p", "tbody", "thead"): self.open.pop()
        assert self.open.pop() == tag

def test_page_is_whole_and_self_contained(run):
    text = write_report(run).read_text()
    page = Reader(text)
    assert not page.open and page.tags.count("svg") == 6 and page.tags.count("img") == 3
    assert all(l.startswith(("data:image/png;base64,", "#")) for l in page.links)
    assert not re.search(r"url\((?!#)|@import", text)
    assert {l[1:] for l in page.links if l[0] == "#"} <= set(page.ids)
    for word in ("right more often than the base: 80.0 % against 30.0 %", "in 4 tries", "5 min 00 s", "gf_gain"): assert word in text, word

def test_what_models_wrote_is_text(run):
    text = write_report(run).read_text()
    assert not {"script", "i", "link", "iframe"} - {"i"} & set(Reader(text).tags) and "<i>run" not in text
    assert "{{ 7*7 }} {% raw %}" in text, "and no template either"

def test_same_run_same_page(run): assert write_report(run).read_bytes() == write_report(run).read_bytes()

@pytest.mark.parametrize("gone", ["zero", "pairs", "coldstart", "final", "eval/answers.parquet", "eval/stage.json", "config.yaml"])
def test_missing_stage_is_named(run, gone):
    import shutil
    path = run/gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = write_report(run).read_text()
    assert not Reader(text).open
    if path.suffix == "": assert "not run" in text
    if gone in ("zero", "coldstart", "final"): assert f"<code>{gone}</code> left no history" in text

@pytest.mark.parametrize("metrics", [{}, {"base": {}}, {"final": None}, {"final": {"id": {"accuracy": stat(.5)}}, "base": {"id": {"accuracy": stat(None)}}}])
def test_missing_numbers_are_dashes(run, metrics):
    put(run/"eval/metrics.json", metrics)
    text = write_report(run).read_text()
    assert "<td>–" in text and "None" not in text.split("</style>")[1].split("What was run")[0] and "nan" not in text.lower().split("</style>")[1].split("<svg")[0]

def test_no_metrics_no_report(run):
    (run/"eval/metrics.json").unlink()
    with pytest.raises(SpecsError, match="run `specs eval` first"): write_report(run)
    assert not (run/"report.html").exists()

@pytest.mark.parametrize("name, hint", [("eval/metrics.json", "delete it"), ("eval/answers.parquet", "specs eval"), ("pairs/pairs.parquet", "specs distill")])
def test_broken_file_is_named(run, name, hint):
    (run/name).write_text("broken")
    with pytest.raises(SpecsError, match=hint): write_report(run)

def test_report_follows_the_numbers(run):
    "Final and base change places: the headline says so"
    m = json.loads((run/"eval/metrics.json").read_text())
    put(run/"eval/metrics.json", {**m, "final": m["base"], "base": m["final"]})
    assert "right less often than the base" in write_report(run).read_text()
    put(run/"eval/metrics.json", {**m, "final": m["base"]})
    assert "not clearly different from the base" in write_report(run).read_text()

def test_pairing_finds_what_two_intervals_hide():
    flat = [dict(model=m, split="id", id=i, accuracy=(i + k) % 4 < (i % 3) + (m == "a")) for m in "ab" for i in range(90) for k in range(4)]
    means = question_means(flat, "accuracy")
    d = paired_difference(means["a", "id"], means["b", "id"])
    assert d["lo"] == d["hi"] == d["mean"] == .25 and d["n"] == 90
