"Published sets, folders and other data: what is read, what is dropped and why, what is refused"

import contextlib
import io
import json
import pickle
import random
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from specs_nb import world
from specs_nb.core import Config, DataConfig, SpecsError, check, load_config, merge, read_json
from specs_nb.data import (
    Picture,
    Rows,
    decode,
    find_choices,
    grpo_dataset,
    prompt_text,
    to_png,
    without,
    write_rows,
)
from specs_nb.grading import grade
from specs_nb.inputs.apart import Guard, alike, fingerprint_of
from specs_nb.inputs.drafts import (
    Drop,
    Tally,
    draft_mapped,
    draft_mathvista,
    draft_orsta,
    draft_virl39k,
    finish,
    image_bytes,
    infer,
    tidy_question,
    unbox,
)
from specs_nb.inputs.files import data_files
from specs_nb.inputs.sources import (
    digest,
    keep_within,
    load_rows,
    look_over,
    open_source,
    part,
    pass_rates,
    prepare,
    stream,
)

DATA = Path(__file__).parent / "data"
VIRL, ORSTA, VISTA, OWN, RENAMED = (DATA / n for n in ("virl39k", "orsta", "mathvista", "folder", "renamed"))
MAP = {
    "question": "problem",
    "answer": "meta.solution",
    "images": "picture",
    "choices": "options",
    "id": "meta.key",
    "pass_rate": "passed",
}


def ready(data, out):
    "`prepare` without its words"
    with contextlib.redirect_stdout(io.StringIO()):
        return prepare(data, out)


def read(data, role="train", guard=None):
    "All rows of a source, and the tally"
    t = Tally()
    return list(stream(open_source(data, role), data, t, guard)), t


def png(size=(40, 40), colour="red", mode="RGB", format="PNG", **kw):
    out = io.BytesIO()
    Image.new(mode, size, colour).save(out, format, **kw)
    return out.getvalue()


def lines(folder, *rows, name="data.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return folder


def reasons(t):
    return {k: n for k, n in t.dropped.items()}


# ---- the fixtures, schema by schema


def test_fixtures_are_small_and_can_be_made_again(tmp_path):
    files = [
        p
        for p in DATA.rglob("*")
        if p.is_file() and not p.name.startswith(("graded", "grading")) and "__pycache__" not in p.parts
    ]
    assert sum(p.stat().st_size for p in files) < 100_000
    sys.path.insert(0, str(DATA))
    import make

    for name, f in (
        ("virl39k", make.virl39k),
        ("orsta", make.orsta),
        ("mathvista", make.mathvista),
        ("folder", make.own),
        ("renamed", make.renamed),
    ):
        f(tmp_path / name)
    for old in files:
        new = tmp_path / old.relative_to(DATA)
        if old.suffix == ".parquet":
            assert pq.read_table(old).equals(pq.read_table(new)), old
        elif old.suffix in (".jsonl", ".png"):
            assert old.read_bytes() == new.read_bytes(), old


def test_virl39k():
    rows, t = read(DataConfig(source=str(VIRL)))
    assert t.read == 88 == len(rows) + t.dropped.total() and t.kept == len(rows) == 83
    assert reasons(t) == {
        "the box of its answer isn't closed": 1,
        "its image marks don't fit its images": 1,
        "an image is missing": 1,
        "an image lies outside of the folder": 1,
        "its answer is none of its choices": 1,
    }
    assert t.notes == {"had an answer whose box wasn't closed, and is now": 1}
    by = {r["id"]: r for r in rows}
    assert (
        by["world-0"]["answer"].isdigit()
        and by["world-0"]["kind"] == "number"
        and "<image>" not in by["world-0"]["question"]
    )
    compare = [r for r in rows if r["kind"] == "choice"]
    assert {bool(find_choices(r["question"])[0]) for r in compare} == {True} and all(
        r["answer"] in "ABC" and len(r["choices"]) >= 2 for r in compare
    )
    assert (
        by["trap-0"]["answer"] == r"\frac{1}{2}"
        and len(by["trap-2"]["images"]) == 2
        and by["trap-2"]["answer"] == "B"
    )
    assert by["world-0"]["rate"] is None and by["world-1"]["rate"] == 0.25, "-1 is unknown, not never"


def test_the_kind_of_virl39k_is_inferred_as_the_world_knows_it():
    rng, shown = random.Random(0), {}
    rows = {r["id"]: r for r in read(DataConfig(source=str(VIRL)))[0]}
    for i in range(80):
        scene = shown.setdefault(i // 2, None) or world.draw_grid(rng)
        shown[i // 2] = scene
        q = [world.ask_count, world.ask_subtract, world.ask_compare][i % 3](scene, rng)
        if r := rows.get(f"world-{i}"):
            assert (r["answer"], r["kind"], r["choices"]) == (
                q.answer,
                q.kind,
                list(q.choices) if q.choices else None,
            )


def test_orsta():
    source = open_source(DataConfig(source=str(ORSTA)))
    assert [f.name for f in source.left_out] == ["test_math_megabench_2.parquet"] and source.total == 16
    rows, t = read(DataConfig(source="orsta", path=str(ORSTA)))
    assert Counter(r["kind"] for r in rows) == {"number": 12, "box": 4} and not t.dropped
    for r in rows:
        assert grade(r["answer"], r["answer"], r["kind"]) is True
        assert not any(w in r["question"] for w in ("<image>", "<think>", "<answer>", "For example")), r[
            "question"
        ]
        if r["kind"] == "box":
            assert json.loads(r["answer"])[0]["label"] and r["question"].endswith("coordinates in pixels.")
            off = json.loads(r["answer"])
            off[0]["bbox_2d"] = [0, 0, 5, 5]
            assert grade(json.dumps(off), r["answer"], "box") is False


@pytest.mark.parametrize(
    "data",
    [
        dict(source=str(ORSTA / "test")),
        dict(source="orsta", path=str(ORSTA / "test")),
        dict(source=str(ORSTA / "test/test_math_megabench_2.parquet")),
    ],
)
def test_orstas_test_split_is_refused(data, tmp_path):
    with pytest.raises(SpecsError, match="never train on it"):
        prepare(DataConfig(**data), tmp_path)


def test_a_megabench_sample_is_dropped_wherever_it_lies(tmp_path):
    (tmp_path / "renamed.parquet").write_bytes((ORSTA / "test/test_math_megabench_2.parquet").read_bytes())
    with pytest.raises(SpecsError, match="MEGA-Bench"):
        prepare(DataConfig(source=str(tmp_path)), tmp_path / "out")


def test_orsta_may_be_tested_on(tmp_path):
    lines(tmp_path / "own", *({"question": f"What is {i} + {i}?", "answer": 2 * i} for i in range(4)))
    rows, t = read(DataConfig(test=str(ORSTA)), "test")
    assert reasons(t) == {"it is a sample of MEGA-Bench": 2}, "graded by MEGA-Bench's own evaluator, not here"


def test_mathvista():
    rows, t = read(DataConfig(source="mathvista", path=str(VISTA)))
    assert set(reasons(t)) == {"it has no answer", "its answer can't be graded"} and t.kept == 11
    raw = {d["pid"]: d for d in pq.read_table(data_files(VISTA)[0]).to_pylist()}
    for r in rows:
        assert "Hint" not in r["question"]
        if r["kind"] == "choice":
            assert r["choices"]["ABC".index(r["answer"])] == raw[r["id"]]["answer"]
    by = {r["id"]: r["answer"] for r in rows}
    assert by["9"] == "0.30" and by["10"] == "84 mm" and by["11"] == "[1, 2]"
    assert grade("0.301", by["9"], "number") is True and grade("0.31", by["9"], "number") is False
    assert grade("84 cm", by["10"], "number") is False and grade("84", by["10"], "number") is True


def test_mathvistas_json_with_pictures_beside_it(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.jpg").write_bytes(png(format="JPEG"))
    d = dict(
        question="How many?",
        image="images/1.jpg",
        choices=None,
        unit=None,
        precision=None,
        answer="3",
        question_type="free_form",
        answer_type="integer",
        metadata={},
    )
    (tmp_path / "testmini.json").write_text(json.dumps({"1": d}))
    rows, t = read(DataConfig(source=str(tmp_path)))
    assert [(r["id"], r["answer"]) for r in rows] == [("1", "3")]


def test_own_folder(tmp_path):
    report = ready(DataConfig(source=str(OWN)), tmp_path)
    assert report["rows"] == {"train": 6, "test": 3}
    assert [
        (r["question"], r["answer"], r["kind"], r["choices"]) for r in Rows(tmp_path / "train.arrow")
    ] == [
        (r["question"], r["answer"], r["kind"], r["choices"])
        for r in world.rows("train", 6, seed=3, tasks=world.SIMPLE)
    ]
    assert [r["images"][0].tobytes() for r in Rows(tmp_path / "test.arrow")] == [
        r["images"][0].tobytes() for r in world.rows("test", 3, seed=3, tasks=world.SIMPLE)
    ]
    assert load_rows(DataConfig(source=str(OWN)), "ood_visual", tmp_path) == []


@pytest.mark.parametrize(
    "data", [dict(source=str(RENAMED), columns=MAP), dict(source="datasets", path=str(RENAMED), columns=MAP)]
)
def test_any_set_by_a_map_of_columns(data, tmp_path):
    rows, t = read(DataConfig(**data))
    want = {r["id"]: r for r in world.rows("train", 6, seed=4, tasks=world.SIMPLE)}
    assert {r["id"] for r in rows} == set(want) and not t.dropped
    for r in rows:
        w = want[r["id"]]
        assert (r["question"], r["choices"], r["kind"], r["rate"]) == (
            w["question"],
            w["choices"],
            w["kind"],
            0.5,
        )
        assert (
            grade(w["answer"], r["answer"], r["kind"], r["choices"]) is True
            and r["images"][0].image.tobytes() == w["images"][0].tobytes()
        )


@pytest.mark.parametrize("how", ["saved", "split", "folder", "csv"])
def test_datasets_of_other_forms(how, tmp_path):
    from datasets import Dataset, DatasetDict, Features, Value
    from datasets import Image as Img

    some, d = world.rows("train", 12), tmp_path / "set"
    ds = Dataset.from_list(
        [dict(q=r["question"], a=r["answer"], image=r["images"][0]) for r in some],
        features=Features({"q": Value("string"), "a": Value("string"), "image": Img()}),
    )
    if how == "saved":
        ds.save_to_disk(str(d))
    if how == "split":
        DatasetDict(train=ds.select(range(2)), dev=ds).save_to_disk(str(d))
    if how == "folder":
        (d / "dev").mkdir(parents=True)
        for i, r in enumerate(some):
            r["images"][0].save(d / "dev" / f"{i}.png")
        lines(
            d / "dev",
            *(dict(file_name=f"{i}.png", q=r["question"], a=r["answer"]) for i, r in enumerate(some)),
            name="metadata.jsonl",
        )
    if how == "csv":
        lines(d, "q,a", *(f"What is {i} + 1?,{i + 1}" for i in range(12)), name="dev.csv")
    data = DataConfig(
        source="datasets",
        path=str(d),
        split="train" if how == "saved" else "validation" if how in ("folder", "csv") else "dev",
        columns={"question": "q", "answer": "a"},
        n_train=7,
        n_test=3,
    )
    if how == "csv":
        data = replace(data, split="validation")
    assert ready(data, tmp_path / "out")["rows"] == {"train": 7, "test": 3}
    assert [len(r["images"]) for r in Rows(tmp_path / "out/train.arrow")] == [int(how != "csv")] * 7


@pytest.mark.parametrize(
    "data, says",
    [
        (dict(source="no/such"), "data.jsonl"),
        (dict(source="virl39"), "did you mean 'virl39k'"),
        (dict(source="orsta"), "data.path"),
        (dict(source="orsta", path=str(VIRL)), "not in the schema of orsta"),
        (dict(source=str(RENAMED)), "data.columns="),
        (dict(source=str(RENAMED), columns={"question": "problm"}), "did you mean 'problem'"),
        (dict(source=str(RENAMED), columns={"qestion": "problem"}), "did you mean 'question'"),
        (dict(source=str(RENAMED), columns={"question": "problem"}), "no column 'answer'"),
        (dict(source=str(RENAMED), columns={"question": 3}), "must be the name of a column"),
        (dict(source="datasets", path=str(RENAMED), columns=MAP, split="trian"), "data.split"),
        (dict(source="datasets", path="no/such"), "data.path"),
        (dict(source=str(OWN), decontaminate=["no/such"]), "data.decontaminate"),
        (dict(source=str(VIRL), test="no/such"), "data.test"),
        (dict(source=str(Path(__file__))), "no data set"),
        (dict(source="world", pass_rate=[0, 1]), "pass_rate_samples"),
    ],
)
def test_errors_name_the_key_and_the_way_out(data, says, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SpecsError, match=says.replace("(", r"\(")) as e:
        load_rows(DataConfig(**data), "train", tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "values, says",
    [
        ({"pass_rate": [0.9, 0.1]}, "lowest, highest"),
        ({"pass_rate": [0.1]}, "lowest, highest"),
        ({"pass_rate": [True, False]}, "lowest, highest"),
        ({"images": "wiht"}, "'with'"),
        ({"bad_rows": "keep"}, "data.bad_rows"),
        ({"decontaminate_by": ["picture"]}, "data.decontaminate_by"),
        ({"max_pixels": 0}, "max_pixels"),
        ({"pass_rate_samples": -1}, "pass_rate_samples"),
    ],
)
def test_configuration_is_checked(values, says):
    with pytest.raises(SpecsError, match=says):
        check(merge(Config(), {"data": values}))


def test_default_yaml():
    assert load_config("default") == Config()


# ---- questions, answers, choices


@pytest.mark.parametrize(
    "question, n, want",
    [
        ("<image>How many?", 1, "How many?"),
        ("How many?", 1, "How many?"),
        ("<image>\n<image> Compare.", 2, "Compare."),
        ("What does <image> show?", 1, "What does show?"),
        ("First <image>then <image>.", 2, "First [image 1] then [image 2]."),
        ("<image>First. <image>Second.", 2, "First. [image 2] Second."),
        ("In <image 2>, not <image 1>?", 2, "In [image 2], not [image 1]?"),
        ("a\r\nb", 0, "a\nb"),
    ],
)
def test_image_marks(question, n, want):
    assert tidy_question(question, n) == want


@pytest.mark.parametrize(
    "question, n", [("<image>?a", 0), ("<image><image>a", 1), ("<image>a", 2), ("<image 4>a", 3)]
)
def test_image_marks_that_do_not_fit(question, n):
    with pytest.raises(Drop, match="don't fit"):
        tidy_question(question, n)


@pytest.mark.parametrize(
    "answer, want",
    [
        (r"\boxed{4}", "4"),
        (r"\boxed{\text{B}}", r"\text{B}"),
        (r"$\boxed{x}$", "x"),
        (r"\boxed{\frac{1}{2}", r"\frac{1}{2}"),
        (r"\boxed{4", "4"),
        (0, "0"),
        (2.5, "2.5"),
        (r"\boxed{4}}", "4"),
    ],
)
def test_boxes(answer, want):
    assert unbox(answer) == want


@pytest.mark.parametrize(
    "answer", [None, "", "  ", "\u200b", float("nan"), r"\boxed{}", r"\boxed{\frac{1}{2", [], {"a": 1}, b"3"]
)
def test_answers_that_are_none(answer):
    with pytest.raises(Drop):
        unbox(answer)


@pytest.mark.parametrize(
    "question, answer, choices, want",
    [
        ("?", "12", None, ("12", "number", None)),
        ("?", "no", None, ("no", "text", None)),
        ("?", "C", None, ("C", "choice", None)),
        ("?", r"\frac{x}{2}", None, (r"\frac{x}{2}", "latex", None)),
        ("Which? (A) red (B) blue", "B", None, ("B", "choice", ["red", "blue"])),
        ("Which? (A) red (B) blue", "blue", None, ("B", "choice", ["red", "blue"])),
        ("Which? (A) red (B) blue", "(B) blue", None, ("B", "choice", ["red", "blue"])),
        ("How long?\nA. 3 cm\nB. 4 cm", "4 cm", None, ("B", "choice", ["3 cm", "4 cm"])),
        ("How long?\nA. 3 cm\nB. 4 cm", "4", None, ("B", "choice", ["3 cm", "4 cm"])),
        ("Which?\nA: a\nB: b\nC: c", "AC", None, ("A, C", "choice", ["a", "b", "c"])),
        ("Which?", "red", ["red", "blue"], ("A", "choice", ["red", "blue"])),
    ],
)
def test_kinds(question, answer, choices, want):
    assert infer(question, answer, choices) == want


@pytest.mark.parametrize(
    "question, answer",
    [
        ("Which? (A) red (B) blue", "green"),
        ("Which? (A) red (B) blue", "E"),
        ("Which? (A) red (B) blue", "7"),
    ],
)
def test_an_answer_that_is_none_of_the_choices(question, answer):
    with pytest.raises(Drop, match="none of its choices"):
        infer(question, answer)


def test_choices_are_asked_once():
    for q in ("Which?\nA. red\nB. blue", "Which? (A) red (B) blue", "Which?\nA) red\nB) blue"):
        assert prompt_text(dict(question=q, choices=["red", "blue"]), "") == q
    assert prompt_text(dict(question="Which?", choices=["red", "blue"]), "") == "Which? (A) red (B) blue"
    for r in world.rows("train", 300):
        assert prompt_text(r, "Go.") == r["question"] + "\nGo.", "the world's prompts stay as they were"


# ---- hostile and broken images and paths


def bomb(w=7000, h=7000):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "data",
    [
        bomb(),
        bomb(60_000, 60_000),
        bomb(2**31 - 1, 2**31 - 1),
        b"",
        b"hello",
        png()[:60],
        png((900, 2)),
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"GIF89a" + b"\xff" * 50,
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        bytes(10_000),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ],
)
def test_images_that_are_refused(data):
    start = time.monotonic()
    with pytest.raises(ValueError):
        decode(data)
    assert time.monotonic() - start < 1, "before anything is decoded"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.binary(max_size=60),
    st.integers(0, 400),
    st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]),
)
def test_a_damaged_image_is_read_or_refused(junk, at, format):
    good = png(format=format)
    try:
        p = decode(good[:at] + junk + good[at + len(junk) :])
    except ValueError:
        return
    assert p.image.mode == "RGB" and decode(p.data).image.size == p.image.size


def test_what_an_image_becomes():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(png((60, 30), format="JPEG", exif=exif)).image.size == (30, 60)
    clear = Image.new("RGBA", (30, 30), (0, 0, 0, 0))
    out = io.BytesIO()
    clear.save(out, "PNG")
    assert decode(out.getvalue()).image.getpixel((5, 5)) == (255, 255, 255)
    assert decode(png(mode="L", colour=100)).image.getpixel((0, 0)) == (100,) * 3
    for raw in (png(), png(format="JPEG"), png(format="WEBP")):
        assert decode(raw).data == raw
    for raw in (png(format="GIF"), png(mode="P", colour=3), png(format="JPEG", exif=exif)):
        assert decode(decode(raw).data).image.tobytes() == decode(raw).image.tobytes()


@pytest.mark.parametrize(
    "path",
    [
        "../secret.png",
        "/etc/hostname",
        "images/../../secret.png",
        "link.png",
        "a\0b.png",
        "x" * 5000,
        "",
        ".",
        "gone.png",
        "https://example.com/a.png",
        "file:///etc/hostname",
    ],
)
def test_paths_that_are_not_followed(path, tmp_path):
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(png())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(Drop):
        (
            image_bytes(path, folder) and decode(image_bytes(path, folder))
            if path
            else finish(
                draft_mapped(dict(question="?", answer=1, images=[""]), {}), "row", folder, DataConfig()
            )
        )


def test_a_pipe_is_no_image(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(Drop, match="missing"):
        image_bytes("pipe.png", tmp_path)


def test_pictures_may_lie_one_folder_deeper(tmp_path):
    (tmp_path / "images/images").mkdir(parents=True)
    (tmp_path / "images/images/a.png").write_bytes(png())
    assert image_bytes("images/a.png", tmp_path) == png()


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from([r"\boxed{3}", "A", "(A) x (B) y", "<image>", "images/World-0-0.png"]),
    lambda x: st.lists(x, max_size=3)
    | st.dictionaries(
        st.sampled_from(["bytes", "path", "role", "content", "ground_truth", "verifier", "answer"]),
        x,
        max_size=3,
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.sampled_from([draft_virl39k, draft_orsta, draft_mathvista, draft_mapped]),
    st.fixed_dictionaries({
        k: junk
        for k in (
            "qid",
            "pid",
            "question",
            "answer",
            "image",
            "images",
            "choices",
            "prompt",
            "reward_model",
            "data_source",
            "answer_type",
            "kind",
            "pass_rate",
        )
    }),
)
def test_any_row_becomes_a_row_or_is_dropped(draft, d):
    from specs_nb.inputs.sources import Source

    class One(Source):
        def raw(self, *a):
            yield "row 1", d

    t = Tally()
    rows = list(stream(One("x", ["x"], VIRL, draft, {}), DataConfig(), t))
    assert t.read == 1 == len(rows) + t.dropped.total()
    for r in rows:
        assert r["question"].strip() and grade(r["answer"], r["answer"], r["kind"], r["choices"]) is True
        assert all(isinstance(p, Picture) for p in r["images"]) and all(
            isinstance(r[k], str) for k in ("id", "source", "answer")
        )


def test_every_drop_is_counted_shown_and_written(tmp_path, capsys):
    report = prepare(DataConfig(source=str(VIRL), n_train=200, n_test=4), tmp_path)
    said, t = capsys.readouterr().out, report["splits"]["train"]
    assert report == read_json(tmp_path / "report.json")
    assert t["read"] == 88 == t["of_use"] + sum(d["rows"] for d in t["dropped"].values())
    for reason, d in t["dropped"].items():
        assert reason in said and d["examples"] and "row" in d["examples"][0]
    assert "an image lies outside of the folder, as in 39Krelease.parquet row 87" in said


# ---- bad rows in a folder of one's own


@pytest.mark.parametrize(
    "line, says",
    [
        ("{", "no valid JSON"),
        ("[1]", "no JSON object"),
        ({"question": "How many?"}, "no answer"),
        ({"answer": 3}, "no question"),
        ({"question": "?", "answer": 1, "images": ["gone.png"]}, "gone.png"),
        ({"question": "?", "answer": 1, "images": ["../x.png"]}, "outside"),
        ({"question": "?", "answer": 1, "kind": "nubmer"}, "did you mean 'number'"),
        ({"question": "?", "answer": 1, "images": ["broken.png"]}, "broken.png"),
    ],
)
def test_own_folder_stops_or_counts(line, says, tmp_path):
    d = lines(tmp_path / "d", {"question": "What is 1 + 1?", "answer": 2}, line)
    lines(d, {"question": "What is 2 + 2?", "answer": 4}, name="test.jsonl")
    (d / "broken.png").write_text("no")
    with pytest.raises(SpecsError, match="data.jsonl line 2") as e:
        prepare(DataConfig(source=str(d)), tmp_path / "out")
    assert says in str(e.value) and "data.bad_rows=drop" in str(e.value)
    report = ready(DataConfig(source=str(d), bad_rows="drop"), tmp_path / "out")
    assert (
        report["rows"] == {"train": 1, "test": 1}
        and sum(x["rows"] for x in report["splits"]["train"]["dropped"].values()) == 1
    )


def test_published_sets_stop_if_asked_to(tmp_path):
    with pytest.raises(SpecsError, match="39Krelease.parquet row"):
        prepare(DataConfig(source=str(VIRL), bad_rows="stop"), tmp_path)


def test_images_that_were_not_unpacked_are_noticed_early(tmp_path):
    rows = [
        dict(
            question=f"What is in picture {i}?",
            answer=r"\boxed{3}",
            PassRate_32BTrained=0.5,
            PassRate_7BBase=0.5,
            category="",
            source="",
            qid=str(i),
            image=[f"images/{i}.png"],
        )
        for i in range(3000)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(SpecsError, match="none of 200 rows .* unpack the set's images"):
        prepare(DataConfig(source=str(tmp_path)), tmp_path / "out")


def test_hidden_answers_are_noticed(tmp_path):
    raw = pq.read_table(data_files(VISTA)[0]).to_pylist()
    pq.write_table(
        pa.Table.from_pylist([dict(d, answer="") for d in raw], pq.read_table(data_files(VISTA)[0]).schema),
        tmp_path / "test-0.parquet",
    )
    with pytest.raises(SpecsError, match="answers are hidden"):
        prepare(DataConfig(source=str(tmp_path)), tmp_path / "out")


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(SpecsError, match="a.parquet"):
        prepare(DataConfig(source=str(tmp_path)), tmp_path / "out")


# ---- with and without images


def test_rows_with_and_without_pictures_go_together(tmp_path):
    d = lines(
        tmp_path / "d",
        {"question": "How many?", "answer": 2, "image": "a.png"},
        {"question": "What is 1 + 1?", "answer": 2},
        {"question": "What is 1 + 2?", "answer": 3},
    )
    lines(d, {"question": "What is 2 + 2?", "answer": 4}, name="test.jsonl")
    (d / "a.png").write_bytes(png())
    assert ready(DataConfig(source=str(d)), tmp_path / "o")["rows"]["train"] == 3
    assert ready(DataConfig(source=str(d), images="without"), tmp_path / "o")["rows"]["train"] == 2
    assert (
        ready(DataConfig(source=str(d), images="with", test=str(VIRL), bad_rows="drop"), tmp_path / "o")[
            "rows"
        ]["train"]
        == 1
    )
    ready(DataConfig(source=str(d)), tmp_path / "m")
    for rows in (
        Rows(tmp_path / "m/train.arrow"),
        world.rows("train", 1) + [dict(r, images=[]) for r in world.rows("train", 2)],
    ):
        assert sorted(len(i) for i in grpo_dataset(rows, "", "think_answer")["images"]) == [0, 0, 1]


# ---- chosen by lot, held out, the same again


def test_rows_are_drawn_from_all_of_a_sorted_set(tmp_path):
    rows = [
        dict(
            question=f"What is {i} + 0?",
            answer=str(i),
            qid=str(i),
            image=[],
            PassRate_7BBase=0.5,
            PassRate_32BTrained=0.5,
            category="",
            source="a" if i < 1000 else "b",
        )
        for i in range(2000)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    report = ready(DataConfig(source=str(tmp_path), n_train=200, n_test=50), tmp_path / "o")
    got = [int(r["id"]) for r in Rows(tmp_path / "o/train.arrow")]
    assert (
        report["rows"] == {"train": 200, "test": 50} and report["splits"]["train"]["read"] < 400
    ), "no more is read than is needed"
    assert (
        60 < sum(i < 1000 for i in got) < 140
        and got != sorted(got)
        and 15 < sum(i < 1000 for i in got[:50]) < 35
    ), "of all parts, in any stretch"


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    def made(name, **kw):
        ready(DataConfig(source=str(VIRL), n_train=20, n_test=5, **kw), tmp_path / name)
        return (tmp_path / name / "train.arrow").read_bytes() + (tmp_path / name / "test.arrow").read_bytes()

    assert made("a") == made("b") != made("c", seed=1)


def test_a_picture_is_never_on_both_sides(tmp_path):
    for seed in range(5):
        report = ready(DataConfig(source=str(VIRL), n_train=100, n_test=10, seed=seed), tmp_path / str(seed))
        train, test = (Rows(tmp_path / str(seed) / f"{s}.arrow") for s in ("train", "test"))
        assert (
            not {d for some in train.column("digests") for d in some}
            & {d for some in test.column("digests") for d in some}
            and len(test) == 10
        )
        assert report["splits"]["train"]["notes"]["shared a picture with the test and were left out"] > 0


def test_a_test_of_its_own(tmp_path):
    report = ready(DataConfig(source=str(VIRL), test=str(VISTA), n_train=50, n_test=5), tmp_path)
    assert report["rows"] == {"train": 50, "test": 5} and all(
        r["source"].startswith("mathvista") for r in Rows(tmp_path / "test.arrow")
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=3), max_size=30),
    st.integers(0, 5),
    st.integers(1, 20),
    st.integers(0, 9),
)
def test_parts_share_nothing(keys, n_test, n_train, seed):
    train, test, shared = part(keys, n_test, n_train, seed)
    assert not {k for i in train for k in keys[i]} & {k for i in test for k in keys[i]}
    assert (
        len(test) == min(n_test, len(keys))
        and len(train) == min(n_train, len(keys) - len(test) - shared)
        and not set(train) & set(test)
    )


def test_prepared_once_and_again_when_something_changed(tmp_path):
    d = lines(tmp_path / "d", {"question": "What is 1 + 1?", "answer": 2})
    lines(d, {"question": "What is 2 + 2?", "answer": 4}, name="test.jsonl")
    data = DataConfig(source=str(d))
    first = ready(data, tmp_path / "o")
    stamp = (tmp_path / "o/train.arrow").stat().st_mtime_ns
    assert ready(data, tmp_path / "o") == first and (tmp_path / "o/train.arrow").stat().st_mtime_ns == stamp
    lines(d, {"question": "What is 1 + 1?", "answer": 2}, {"question": "What is 1 + 3?", "answer": 4})
    assert ready(data, tmp_path / "o")["rows"]["train"] == 2
    (tmp_path / "o/test.arrow").unlink()
    assert ready(data, tmp_path / "o")["rows"]["test"] == 1 and (tmp_path / "o/test.arrow").exists()


def test_repetitions_are_dropped(tmp_path):
    d = lines(
        tmp_path / "d",
        {"question": "What is 1 + 1?", "answer": 2},
        {"question": "what is 1+1 ?", "answer": 3},
        {"question": "What is 1 - 1?", "answer": 0},
    )
    rows, t = read(DataConfig(source=str(d)))
    assert [r["answer"] for r in rows] == ["2", "0"] and reasons(t) == {"it was there before": 1}


# ---- pass rates


def test_pass_rates_of_the_set():
    rows, t = read(DataConfig(source=str(VIRL), pass_rate=[0.2, 0.6]))
    assert (
        {r["rate"] for r in rows} == {0.25, 0.5}
        and t.dropped["no pass rate of it is known"] == 20
        and t.dropped["its pass rate is out of data.pass_rate"] == 20
    )
    rows, t = read(
        DataConfig(source=str(VIRL), pass_rate=[1, 1], columns={"pass_rate": "PassRate_32BTrained"})
    )
    assert {r["rate"] for r in rows} == {1.0} and "no pass rate of it is known" not in t.dropped


def test_a_set_without_rates_says_how_to_measure(tmp_path):
    with pytest.raises(SpecsError, match="pass_rate_samples=4"):
        prepare(DataConfig(source=str(ORSTA), pass_rate=[0.1, 0.9]), tmp_path)


def test_measured_rates():
    rows = world.rows("train", 4, tasks=("count",))
    good, bad = [
        f"<think>x</think><answer>{r['answer']}</answer>" for r in rows
    ], "<think>x</think><answer>977</answer>"
    texts = [[good[0]] * 4, [good[1], bad, bad, bad], [bad] * 4, [good[3], good[3], bad, "no idea"]]
    assert pass_rates(rows, texts) == [1, 0.25, 0, 0.5]
    kept, facts = keep_within(rows, texts, 0.2, 0.6)
    assert (
        [r["id"] for r in kept] == [rows[1]["id"], rows[3]["id"]]
        and facts["too_easy"] == facts["too_hard"] == 1
        and facts["keep"] == [1, 3]
    )
    unread = dict(rows[0], answer="x^2+", kind="latex")
    assert pass_rates([unread], [["1", "2"]]) == [None], "no opinion is not a failure"
    with pytest.raises(SpecsError, match="no question has a measured pass rate"):
        keep_within([unread], [["1"]], 0, 1)
    with pytest.raises(ValueError):
        pass_rates(rows, texts[:2])


# ---- kept apart from the benchmarks


def test_leaked_questions_and_pictures_are_dropped(tmp_path):
    leak = pq.read_table(data_files(VISTA)[0]).to_pylist()
    d = tmp_path / "d"
    d.mkdir()
    shown = Image.open(io.BytesIO(leak[0]["decoded_image"]["bytes"])).convert("RGB")
    shown.resize((200, 200)).save(d / "copy.jpg", quality=70)
    world.picture(world.draw_grid(random.Random(99)), 2).save(d / "other.png")
    lines(
        d,
        {"question": "What do you see?", "answer": 3, "image": "copy.jpg"},
        {"question": leak[0]["question"].upper(), "answer": 3, "image": "other.png"},
        {"question": "Is it large?", "answer": "no", "image": "other.png"},
    )
    lines(d, {"question": "Where?", "answer": "here", "image": "other.png"}, name="test.jsonl")
    t = ready(DataConfig(source=str(d), decontaminate=[str(VISTA)]), tmp_path / "o")
    assert t["rows"]["train"] == 1 and {k: v["rows"] for k, v in t["splits"]["train"]["dropped"].items()} == {
        "its question is in a benchmark": 1,
        "its picture is in a benchmark": 1,
    }
    assert "13 pictures" in t["guard"]
    for by, n in ((["image"], 2), (["question"], 2)):
        assert (
            ready(DataConfig(source=str(d), decontaminate=[str(VISTA)], decontaminate_by=by), tmp_path / "o")[
                "rows"
            ]["train"]
            == n
        )


def test_guards_against_any_schema(tmp_path):
    mmmu = [
        dict(
            id="1",
            question="What is shown in <image 1>?",
            options="['a cat', 'a dog']",
            image_1=dict(bytes=png((50, 50), "blue"), path="1.png"),
            image_2=None,
            answer="A",
        )
    ]
    pq.write_table(pa.Table.from_pylist(mmmu), tmp_path / "mmmu.parquet")
    lines(tmp_path / "text", {"problem": "What is the seventh prime?"}, name="x.jsonl")
    g = Guard([tmp_path / "mmmu.parquet", tmp_path / "text", ORSTA, VIRL])

    def asked(q, choices=None):
        return dict(question=q, choices=choices, images=[])

    for q in (asked("What is shown in?", ["a cat", "a dog"]), asked("What is the seventh prime?")):
        with pytest.raises(Drop, match="its question is in a benchmark"):
            g.check(q)
    g.check(asked("What is shown in?", ["a cow", "a dog"]))
    g.check(asked("What is the eighth prime?"))
    with pytest.raises(Drop, match="its picture is in a benchmark: mmmu.parquet row 1"):
        g.check(dict(asked("?"), images=[decode(png((90, 90), "blue", format="JPEG"))]))
    assert g.unread == 1, "the lost picture of ViRL39K's file"


def test_a_benchmark_without_questions_is_an_error(tmp_path):
    pq.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    with pytest.raises(SpecsError, match="no question and no picture"):
        Guard([tmp_path])


def test_near_duplicates():
    scenes = [world.picture(s, 3) for s in {world.ask("train", 5, i).scene: 1 for i in range(60)}]
    prints = [fingerprint_of(s) for s in scenes]
    assert not any(alike(a, b) for i, a in enumerate(prints) for b in prints[:i])
    for s, p in zip(scenes, prints):
        out = io.BytesIO()
        s.resize((200, 200)).save(out, "JPEG", quality=75)
        assert alike(p, fingerprint_of(Image.open(out).convert("RGB")))


# ---- rows on disk


def test_rows_look_like_a_list(tmp_path):
    some = world.rows("train", 12)
    assert (
        write_rows(
            ({**r, "images": [decode(to_png(i)) for i in r["images"]]} for r in some), tmp_path / "r.arrow"
        )
        == 12
    )
    rows = Rows(tmp_path / "r.arrow")

    def plain(rs):
        return [{k: v if k != "images" else [i.tobytes() for i in v] for k, v in r.items()} for r in rs]

    assert plain(rows) == plain(some) and len(rows) == 12 and plain([rows[-1]]) == plain(some[-1:])
    assert (
        plain(rows[2:9][1:3]) == plain(some[3:5])
        and isinstance(rows[2:9], Rows)
        and plain(rows.pick([5, 1])) == plain([some[5], some[1]])
    )
    assert plain(pickle.loads(pickle.dumps(rows[3:6]))) == plain(some[3:6]) and len(pickle.dumps(rows)) < 1000
    assert (
        [r["id"] for r in without(rows, some[:5])]
        == [r["id"] for r in some[5:]]
        == [r["id"] for r in without(some, rows[:5])]
    )
    with pytest.raises(IndexError):
        rows[12]
    a, b = grpo_dataset(rows[:4], "Go.", "think_answer"), grpo_dataset(some[:4], "Go.", "think_answer")
    assert (
        set(a.column_names) == set(b.column_names)
        and a["prompt"][:] == b["prompt"][:]
        and a["choices"][:] == b["choices"][:]
        and a[2]["images"][0].tobytes() == b[2]["images"][0].tobytes()
    )
    assert [x["id"] for x in grpo_dataset(rows.pick([7, 3]), "", "think_answer")] == [
        some[7]["id"],
        some[3]["id"],
    ]


def test_a_killed_preparation_leaves_nothing_half(tmp_path):
    def cut():
        yield {**world.rows("train", 1)[0], "images": []}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows(cut(), tmp_path / "r.arrow")
    assert not (tmp_path / "r.arrow").exists()


WATCH = """
import contextlib, io, sys, threading, imagehash, datasets
from specs_nb.core import DataConfig
from specs_nb.data import Rows, grpo_dataset
from specs_nb.sources import prepare
def anon():  # MB, without files that are mapped
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) / 1024
def watch():
    while not done.wait(.003): top.append(anon())
small, large, n, out = sys.argv[1:]
with contextlib.redirect_stdout(io.StringIO()):
    prepare(DataConfig(source=small, n_train=20, n_test=2), out + "/warm")
top, done, start = [], threading.Event(), anon()
w = threading.Thread(target=watch); w.start()
with contextlib.redirect_stdout(io.StringIO()):
    prepare(DataConfig(source=large, n_train=int(n), n_test=5), out)
rows = Rows(out + "/train.arrow")
for r in rows: pass
for b in grpo_dataset(rows, "", "think_answer").iter(8): pass
done.set(); w.join()
print(len(rows), max(top) - start)
"""


def big(folder, n):
    import numpy as np

    sys.path.insert(0, str(DATA))
    import make

    rng = np.random.default_rng(0)
    folder.mkdir()
    with pq.ParquetWriter(folder / "train_math_noise_1.parquet", make.ORSTA) as w:
        rows = []
        for i in range(n):
            out = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (200, 200, 3), dtype=np.uint8)).save(out, "PNG")
            rows.append(
                dict(
                    make.orsta_row(
                        world.draw_grid(random.Random(i)),
                        f"<image>What is in picture {i}?",
                        str(i),
                        "mathverify",
                        "noise",
                        i,
                    ),
                    images=[dict(bytes=out.getvalue(), path=None)],
                )
            )
        w.write_table(pa.Table.from_pylist(rows, make.ORSTA), row_group_size=50)
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells private memory")
def test_memory_does_not_grow_with_the_set(tmp_path):
    """Eight times the rows (96 MB, 50 to a row group): private memory stays where it was, from the file to
    TRL's data set"""
    peaks = {}
    for n in (100, 800):
        r = subprocess.run(
            [
                sys.executable,
                "-c",
                WATCH,
                str(VIRL),
                str(big(tmp_path / f"d{n}", n)),
                str(n),
                str(tmp_path / f"o{n}"),
            ],
            capture_output=True,
            text=True,
        )
        assert r.returncode == 0, r.stderr[-2000:]
        rows, peaks[n] = map(float, r.stdout.split()[-2:])
        assert rows == n - 5
    assert peaks[800] < peaks[100] + 40, peaks


# ---- the pipeline


def checksum(rows):
    import hashlib

    h = hashlib.sha256()
    for r in rows:
        h.update(
            repr([r[k] for k in ("id", "question", "answer", "kind", "choices", "source")]).encode()
            + r["images"][0].tobytes()
        )
    return h.hexdigest()[:16]


def test_world_rows_are_what_they_were():
    "Runs from before must stay reproducible: checksums of the first rows, of scores since 2026-11-27"
    old = [r for split in world.STREAMS[:3] for r in world.rows(split, 20, tasks=world.SIMPLE)]
    assert checksum(old) == "c9d02f46f77abcd3", "the simple families are those of commit 370cbdb"
    config = DataConfig(n_train=20, n_test=20)
    new = [r for split in world.STREAMS for r in load_rows(config, split, None)]
    assert checksum(new) == "7bd44e178d0156b6"


def specs(*words):
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from specs_nb.pipeline import main; sys.exit(main())",
            *map(str, words),
        ],
        capture_output=True,
        text=True,
    )


SMOKE = ["-c", "smoke", "workers=1", "report_to=none"]


def test_a_whole_run_on_virl39ks_schema(tmp_path):
    r = specs(
        "run",
        *SMOKE,
        "--run-dir",
        tmp_path / "r",
        f"data.source={VIRL}",
        "pairs.n_prompts=12",
        "data.n_test=4",
    )
    assert r.returncode == 0, r.stderr[-3000:]
    assert "an image is missing, as in 39Krelease.parquet row 86" in r.stdout
    metrics = read_json(tmp_path / "r/eval/metrics.json")
    assert (
        set(metrics) == {"base", "zero", "coldstart", "final"}
        and metrics["final"]["id"]["accuracy"]["n"] == 4
        and (tmp_path / "r/report.html").exists()
    )
    again = specs("run", "--run-dir", tmp_path / "r")
    assert again.returncode == 0 and again.stdout.count("done before") == 6


def test_rates_are_measured_once(tmp_path):
    words = [
        "zero",
        *SMOKE,
        "--run-dir",
        tmp_path / "r",
        f"data.source={VIRL}",
        "data.n_train=24",
        "data.n_test=2",
        "data.pass_rate=[0.01, 0.99]",
        "data.pass_rate_samples=4",
    ]
    r = specs(*words)
    assert r.returncode == 0, r.stderr[-3000:]
    facts = read_json(tmp_path / "r/data/rates.json")
    assert (
        facts["read"] == 24 == facts["kept"] + facts["too_hard"] + facts["too_easy"] + facts["no_opinion"]
        and 0 < facts["kept"] < 24
    ), facts
    assert "rates" in r.stdout and "done before" in specs(*words).stdout


# ---- several sources


def mixture(**more):
    sources = [
        dict(source="virl39k", path=str(VIRL), weight=3),
        dict(source="orsta", path=str(ORSTA)),
        dict(source="world", weight=2),
    ]
    return merge(DataConfig(), {"sources": sources, "n_train": 30, "n_test": 12, **more})


def test_sources_are_mixed_by_their_weights(tmp_path):
    data = mixture()
    with contextlib.redirect_stdout(said := io.StringIO()):
        report = prepare(data, tmp_path / "a")
    rows = {s: load_rows(data, s, tmp_path / "a") for s in ("train", "test")}
    of = {s: Counter(x.split("/")[0] for x in r.column("source")) for s, r in rows.items()}
    assert of["train"] == {"virl39k": 15, "orsta": 5, "world": 10} == {k: n for k, n in of["train"].items()}
    assert of["test"] == {"virl39k": 6, "orsta": 2, "world": 4}, "each source is tested on"
    shown = {s: {d for ds in r.column("digests") for d in ds} for s, r in rows.items()}
    assert not shown["train"] & shown["test"], "no picture is on both sides, whichever source it is from"
    ids = rows["train"].column("id")
    assert len(set(ids)) == 30 and len({x.split("/")[0] for x in rows["train"].column("source")[:10]}) == 3
    assert "virl39k 15 rows" in " ".join(said.getvalue().split()) and "ran out" not in said.getvalue()
    assert set(report["splits"]) == {"virl39k", "orsta", "world"}
    ready(data, tmp_path / "b")
    assert Rows(tmp_path / "b/train.arrow").column("id") == ids, "the same again"
    assert (
        ready(replace(data, seed=1), tmp_path / "b") and Rows(tmp_path / "b/train.arrow").column("id") != ids
    )


def test_other_pictures_of_a_mixtures_parts_are_pooled(tmp_path):
    shutil.copytree(OWN, tmp_path / "mine")
    pictured = (OWN / "test.jsonl").read_text().splitlines()
    (tmp_path / "mine/ood_visual.jsonl").write_text("\n".join(pictured) + "\n")
    sources = [dict(source=str(tmp_path / "mine"), name="mine"), dict(source="orsta", path=str(ORSTA))]
    data = merge(DataConfig(), {"sources": sources, "n_train": 20, "n_test": 4})
    report = prepare(data, tmp_path / "o")
    found = load_rows(data, "ood_visual", tmp_path / "o")
    assert {s.split("/")[0] for s in found.column("source")} == {"mine"} and len(found) == report["rows"][
        "ood_visual"
    ]
    assert "ood_visual of mine" in report["splits"]
    shown = [
        {d for ds in load_rows(data, s, tmp_path / "o").column("digests") for d in ds}
        for s in ("train", "ood_visual")
    ]
    assert not shown[0] & shown[1], "no picture of it is trained on"
    assert load_rows(replace(data, sources=data.sources[1:]), "ood_visual", tmp_path / "p") == []


def test_a_source_that_runs_out_is_said_and_a_folders_own_test_is_kept(tmp_path):
    sources = [dict(source=str(OWN), name="mine"), dict(source="orsta", path=str(ORSTA))]
    data = merge(DataConfig(), {"sources": sources, "n_train": 20, "n_test": 4})
    with contextlib.redirect_stdout(said := io.StringIO()):
        prepare(data, tmp_path / "o")
    assert "mine 6 rows to train from: it ran out, its share of 50% would be 10" in " ".join(
        said.getvalue().split()
    )
    tests = Rows(tmp_path / "o/test.arrow")
    assert Counter(s.split("/")[0] for s in tests.column("source")) == {"mine": 2, "orsta": 2}
    assert set(tests.column("question")) & {
        r["question"] for r in world.rows("test", 3, seed=3, tasks=world.SIMPLE)
    }
    named = ready(replace(data, test=str(VIRL), sources=sources[:1]), tmp_path / "o")
    assert named["rows"] == {"train": 6, "test": 4}


def test_the_files_of_every_source_are_fingerprinted(tmp_path):
    lines(tmp_path / "d", *({"question": f"What is {i} + {i}?", "answer": 2 * i} for i in range(8)))
    data = merge(DataConfig(), {"sources": [dict(source=str(tmp_path / "d")), dict(source=str(OWN))]})
    before = digest(data)
    lines(tmp_path / "d", *({"question": f"What is {i} + {i}?", "answer": 2 * i} for i in range(9)))
    assert digest(data) != before


# ---- inputs that people have reported


def test_ids_are_made_unique_on_reading(tmp_path):
    "Sets that use the picture's id: six questions must not become one"
    for name, k in (("data.jsonl", 1), ("test.jsonl", 2)):
        asked = [{"id": "img-1", "question": f"What is {i} + {k}?", "answer": i + k} for i in range(6)]
        lines(tmp_path / "d", *asked, name=name)
    ready(DataConfig(source=str(tmp_path / "d")), tmp_path / "o")
    for split in ("train", "test"):
        ids = Rows(tmp_path / f"o/{split}.arrow").column("id")
        assert ids == ["img-1", *(f"img-1-{i}" for i in range(2, 7))]


ASKED = {"role": "user", "content": "What is 1 + 1?"}
VERL = {"prompt": [ASKED], "reward_model": {"ground_truth": "2"}, "data_source": "geo3k", "images": []}


@pytest.mark.parametrize(
    "rows, columns",
    [
        (VERL, {}),
        (VERL, {"question": "prompt.0.content", "answer": "reward_model.ground_truth"}),
        ({"messages": [ASKED, {"role": "assistant", "content": "2"}]}, {}),
        (
            {"conversations": [{"from": "human", "value": "What is 1 + 1?"}, {"from": "gpt", "value": "2"}]},
            {},
        ),
        ({"question": "What is 1 + 1?", "answer": "2", "images": "[]"}, {}),
    ],
)
@pytest.mark.parametrize("name", ["data.jsonl", "train.jsonl", "train.json"])
def test_layouts_of_other_tools(rows, columns, name, tmp_path):
    lines(tmp_path, rows, name=name)
    found, t = read(DataConfig(source=str(tmp_path), columns=columns))
    assert [(r["question"], r["answer"], r["images"]) for r in found] == [
        ("What is 1 + 1?", "2", [])
    ], t.dropped


@pytest.mark.parametrize(
    "row, says",
    [
        ({"question": {"text": "1 + 1?"}, "answer": 2}, "line 2.*no text"),
        ({"question": 5, "answer": 2}, "line 2.*no text"),
        ({"question": "<|image_pad|>How many?", "answer": 2}, r"line 2.*model's template.*<\|image_pad\|>"),
        ({"question": "?", "answer": 2, "image": "data:image/png;base64," + "iVBOR" * 10**5}, "line 2"),
        ({"question": "?", "answer": 2, "image": "iVBOR" * 10**5}, "line 2"),
    ],
)
def test_odd_rows_are_refused_with_their_line(row, says, tmp_path):
    lines(tmp_path / "d", {"question": "What is 1 + 1?", "answer": 2}, row)
    lines(tmp_path / "d", {"question": "What is 2 + 2?", "answer": 4}, name="test.jsonl")
    with pytest.raises(SpecsError, match=says) as e:
        prepare(DataConfig(source=str(tmp_path / "d")), tmp_path / "o")
    assert len(str(e.value)) < 700, "no picture is printed"


def test_choices_with_labels_and_a_column_of_options(tmp_path):
    asked = dict(question="Which?", answer="B. 4", options=["A. 3", "B. 4"])
    lines(tmp_path, asked, dict(question="Which one?", answer="4", choices={"A": "3", "B": "4"}))
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "data.jsonl").read_bytes())
    found, t = read(DataConfig(source=str(tmp_path)))
    assert [(r["choices"], r["answer"], r["kind"]) for r in found] == [(["3", "4"], "B", "choice")] * 2
    assert "(A) 3 (B) 4" in prompt_text(found[0], "")


# ---- columns that nobody reads, and tests that test nothing


SUM = {"question": "What is 1 + 1?", "answer": 2}


def sums(*numbers):
    return [{"question": f"What is {i} + {i}?", "answer": 2 * i} for i in numbers]


@pytest.mark.parametrize(
    "more, says",
    [
        ({"imges": ["a.png"]}, "data.columns={images: imges}"),
        ({"Images": ["a.png"]}, "looks like images"),
        ({"imgs": "a.png"}, "Rename it to images"),
        ({"pictures": [{"path": "a.png"}]}, "data.columns={images: pictures}"),
        ({"image_path": "a.png"}, "data.ignore=[image_path]"),
        ({"scan": "a.PNG"}, "names a picture (a.PNG)"),
        ({"meta": {"figure": "a.jpeg"}}, "data.columns={images: meta.figure}"),
        ({"choises": ["1", "2"]}, "data.columns={choices: choises}"),
        ({"optoins": {"A": "1", "B": "2"}}, "looks like choices"),
        ({"kinds": "number"}, "data.columns={kind: kinds}"),
        ({"tolerance": 0.1}, "data.columns={tol: tolerance}"),
        ({"precison": 2}, "data.columns={precision: precison}"),
    ],
)
def test_a_column_that_holds_what_a_row_lacks_stops(more, says, tmp_path):
    "In a row of one's own folder and of any other set; the doctor and a preparation say the same"
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    for name in ("data.jsonl", "train.jsonl"):
        d = lines(tmp_path / name, sums(2)[0], {**SUM, **more}, *sums(3, 4), name=name)
        lines(d, *sums(9), name="test.jsonl")
        shutil.copy(tmp_path / "a.png", d)
        shutil.copy(tmp_path / "a.png", d / "a.PNG")
        data = DataConfig(source=str(d), n_test=1)
        with pytest.raises(SpecsError) as e:
            prepare(data, tmp_path / "o")
        assert says in str(e.value) and f"{name} line 2: its column '{[*more][0]}" in str(e.value)
        assert look_over(data)[0] == [str(e.value)]
        for fine, n in ((replace(data, ignore=[*more]), 4), (replace(data, bad_rows="drop"), 3)):
            assert look_over(fine) == ([], [])
            assert ready(fine, tmp_path / "o")["splits"]["train"]["of_use"] == n


def test_a_column_is_mapped_as_the_message_says(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    lines(tmp_path, {**SUM, "imges": ["a.png"], "tolerance": 0.1})
    columns = {"images": "imges", "tol": "tolerance"}
    found, _ = read(DataConfig(source=str(tmp_path), columns=columns))
    assert len(found[0]["images"]) == 1 and json.loads(found[0]["grading"]) == {"tol": 0.1}


def test_rows_that_are_read_in_another_way_are_prepared_again(tmp_path, monkeypatch):
    from specs_nb.inputs import sources

    data = DataConfig(source="virl39k", path=str(DATA / "virl39k"), n_train=2, n_test=1)
    key = prepare(data, tmp_path)["key"]
    assert prepare(data, tmp_path)["key"] == key
    monkeypatch.setattr(sources, "READING", sources.READING + 1)
    assert prepare(data, tmp_path)["key"] != key


@pytest.mark.parametrize("name", ["virl39k", "orsta", "mathvista"])
def test_a_map_that_a_named_set_does_not_read_is_refused(name):
    named = DataConfig(source=name, path=str(DATA / name), columns={"answer": "hint"})
    with pytest.raises(SpecsError, match=f"{name} is read by its own columns"):
        open_source(named)
    assert open_source(replace(named, columns={})).name == name


def test_a_map_of_columns_is_checked_for_a_folder_of_ones_own(tmp_path):
    lines(tmp_path, SUM, {**SUM, "imges": ["a.png"]})
    for columns, says in (
        ({"images": "imgs"}, "no column 'imgs'; did you mean 'imges'"),
        ({"image": "x"}, "we have no"),
    ):
        with pytest.raises(SpecsError, match=says):
            open_source(DataConfig(source=str(tmp_path), columns=columns))
    assert open_source(DataConfig(source=str(tmp_path), columns={"images": "imges"})).ordered


THEIRS = {  # rows as published sets have them, with nothing overlooked
    "virl39k": dict(
        qid="v-1",
        category="Spatial",
        source="Processed",
        image=[],
        PassRate_7BBase=0.5,
        PassRate_32BTrained=1.0,
    ),
    "orsta": dict(data_source="math", images=[], ability="math", extra_info={"id": "7", "image_path": ""}),
    "mathvista": dict(
        pid="3",
        image=[],
        decoded_image=None,
        choices=None,
        unit=None,
        precision=1.0,
        question_type="free_form",
        answer_type="integer",
        metadata={
            "category": "math",
            "grade": "daily life",
            "img_height": 720,
            "img_width": 1514,
            "skills": ["a"],
        },
        query="Hint: answer with a number. What is 1 + 1?",
    ),
    "mathverse": dict(
        sample_index="1",
        problem_version="Text Only",
        image=None,
        question_type="multi-choice",
        metadata={"split": "testmini", "source": "Geometry3K", "subject": "Plane Geometry"},
        query_wo="Directly answer.",
        query_cot="First reason.",
        question_for_eval="What is 1 + 1?",
    ),
    "geometry3k": dict(images=[], problem="Find x.", split="train"),
    "verl": dict(
        data_source="gsm8k",
        ability="math",
        reward_model={"style": "rule", "ground_truth": "2"},
        extra_info={"split": "train", "index": 0, "answer": "1 + 1 = 2", "question": "What is 1 + 1?"},
    ),
    "scienceqa": dict(
        image=None, hint="", task="closed choice", grade="grade2", skill="add", solution="Add."
    ),
    "own": dict(
        image_source="coco",
        img_size=[84, 84],
        image_id="COCO_000000397133",
        picture_id="p-7",
        image_hash="f00ba4",
        answer_type="integer",
        question_type="count",
        category="sums",
        choice="A",
        option="B",
        kind_of_task="sum",
        difficulty="easy",
        tool="pencil",
        author="images@example.org",
    ),
}


@pytest.mark.parametrize("name", THEIRS)
def test_columns_of_their_own_are_left_alone(name, tmp_path):
    lines(tmp_path, {**SUM, **THEIRS[name]})
    found, t = read(DataConfig(source=str(tmp_path)))
    assert len(found) == 1, t
    assert look_over(DataConfig(source=str(tmp_path), test=str(VIRL))) == ([], [])


def test_a_row_with_pictures_may_name_others(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    lines(tmp_path, {**SUM, "image": "a.png", "images": [], "thumbnail": "small.png", "img_path": "x/a.png"})
    assert len(read(DataConfig(source=str(tmp_path)))[0][0]["images"]) == 1


def test_pictures_in_numbered_columns_are_not_lost(tmp_path):
    "MMMU's image_1 … image_7"
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    Image.new("RGB", (50, 40)).save(tmp_path / "b.png")
    ask = {**SUM, "question": "Is <image 2> wider than <image 1>?"}
    pictures = {f"image_{i}": {"bytes": None, "path": n} for i, n in ((1, "a.png"), (2, "b.png"))}
    d = lines(tmp_path, {**ask, **pictures, "image_3": None})
    found, _ = read(DataConfig(source=str(d)))
    assert [p.image.width for p in found[0]["images"]] == [40, 50]
    assert read(DataConfig(source=str(d), images="without"))[1].kept == 0
    lines(tmp_path, {**ask, "image_1": None, "image_2": "b.png"})
    _, t = read(DataConfig(source=str(d)))
    assert "column 'image_1' is empty, later ones aren't; data.ignore=[image_1]" in str(t)


@pytest.mark.parametrize("name", ["image_1", "image_2", "image02", "img_3"])
def test_a_picture_beside_the_one_that_is_read_stops(name, tmp_path):
    for size, file in ((40, "a.png"), (50, "b.png")):
        Image.new("RGB", (size, size)).save(tmp_path / file)
    d = lines(tmp_path, {**SUM, "image": "a.png", name: "b.png"})
    with pytest.raises(SpecsError, match=f"column '{name}' isn't read.*data.ignore=.{name}"):
        read(DataConfig(source=str(d)))
    found, _ = read(DataConfig(source=str(d), ignore=[name]))
    assert [p.image.width for p in found[0]["images"]] == [40]
    lines(tmp_path, {**SUM, "image_1": "a.png", "image_2": "b.png"})
    found, _ = read(DataConfig(source=str(d)))
    assert [p.image.width for p in found[0]["images"]] == [40, 50]


def test_an_answer_in_a_list(tmp_path):
    "ChartQA's labels are lists of one"
    lines(tmp_path, {**SUM, "answer": ["2"]}, {"question": "Who?", "answer": ["Ann", "Bob"]})
    found, t = read(DataConfig(source=str(tmp_path)))
    assert found[0]["answer"] == "2" and "name one of them in data.columns" in str(t)


@pytest.mark.parametrize("names", ["A B C D", "choice_a choice_b choice_c", "option1 option2 option3"])
def test_choices_in_columns_of_their_own(names, tmp_path):
    "MMBench's A … D, SEED-Bench's choice_a … choice_d, CMMMU's option1 …"
    spread = dict(zip(names.split(), ("red", "blue", "", None)))
    d = lines(tmp_path, {"question": "Which?", "answer": "B", **spread, "image_id": 7})
    row = read(DataConfig(source=str(d)))[0][0]
    assert (row["answer"], row["kind"], row["choices"]) == ("B", "choice", ["red", "blue"])
    lines(tmp_path, {"question": "What is B?", "answer": 7, **dict(zip(names.split(), (3, 7)))})
    assert read(DataConfig(source=str(d), ignore=names.split()))[0][0]["choices"] is None
    first = names.split()[0]  # a column that is mapped, or stands alone, is no list
    lines(tmp_path, {"Q": "What is 3 + 4?", first: "7"})
    mapped = DataConfig(source=str(d), columns={"question": "Q", "answer": first})
    assert read(mapped)[0][0]["choices"] is None


@pytest.mark.parametrize("first, right", [(0, "BA"), (1, "AC")])
def test_answers_that_count_the_choices(first, right, tmp_path):
    "ScienceQA's and AI2D's; in the first row the number is also a choice's text"
    rows = [
        {"question": "Which?", "choices": ["2", "1", "0"], "answer": 1},
        {"question": "Who?", "choices": ["Ann", "Bob", "Cleo"], "answer": "0" if first == 0 else "3"},
    ]
    d = lines(tmp_path, *rows)
    assert "".join(r["answer"] for r in read(DataConfig(source=str(d), first_choice=first))[0]) == right
    with pytest.raises(SpecsError, match="line 2.*none of its choices.*say data.first_choice=0"):
        prepare(DataConfig(source=str(d), test=str(VIRL)), tmp_path / "o")
    lines(tmp_path, {**rows[1], "answer": 7})
    _, t = read(DataConfig(source=str(d), first_choice=first))
    assert "number 7 of ['Ann', 'Bob', 'Cleo'], counted from" in str(t)


def test_an_answer_under_another_name_is_pointed_to(tmp_path):
    lines(tmp_path, SUM, {"question": "What is 1 + 2?", "anwser": 3})
    lines(tmp_path, SUM, name="test.jsonl")
    with pytest.raises(SpecsError, match="line 2.*no answer.*data.columns={answer: anwser}"):
        prepare(DataConfig(source=str(tmp_path)), tmp_path / "o")


@pytest.mark.parametrize("split", ["test", "ood_visual", "compositional"])
def test_a_test_inside_the_training_rows_is_refused(split, tmp_path):
    d = lines(tmp_path / "d", *sums(*range(10)))
    lines(d, *sums(20, 21), name="test.jsonl")
    lines(d, *sums(7, 8, 9), name=f"{split}.jsonl")
    data = DataConfig(source=str(d))
    with pytest.raises(SpecsError, match=f"all 3 rows of .*{split}.jsonl are among the training rows") as e:
        prepare(data, tmp_path / "o")
    assert look_over(data)[0] == [str(e.value)]
    elsewhere = replace(data, test=str(d / "data.jsonl"))
    assert "all 10 rows of" in look_over(elsewhere)[0][0]
    with pytest.raises(SpecsError, match="all 10 rows of .*data.jsonl are"):
        prepare(elsewhere, tmp_path / "o")


@pytest.mark.parametrize("shared, warned", [(1, False), (2, True), (9, True)])
def test_a_test_that_shares_many_rows_is_warned_of(shared, warned, tmp_path, capsys):
    d = lines(tmp_path / "d", *sums(*range(10)))
    lines(d, *sums(*range(10 - shared, 20 - shared)), name="test.jsonl")
    report = prepare(DataConfig(source=str(d)), tmp_path / "o")
    said = f"{shared} of 10 rows of {d / 'test.jsonl'} ({shared}0%) are among the training rows"
    problems, warnings = look_over(DataConfig(source=str(d)))
    assert not problems and bool(warnings) == warned == (said in (out := capsys.readouterr().out))
    assert report["warnings"] == warnings and (not warned or warnings[0].startswith(said))
    assert f"{shared} are also training rows" in out


def test_a_published_set_is_not_its_own_test(tmp_path):
    file = next(VIRL.glob("*.parquet"))
    for name in ("a", "b"):
        shutil.copytree(VIRL, tmp_path / name)
    (tmp_path / "b" / file.name).rename(tmp_path / "b/eval.parquet")
    data = DataConfig(source=str(tmp_path / "a"), test=str(tmp_path / "b"))
    assert "holds the same rows" in look_over(data)[0][0]
    with pytest.raises(SpecsError, match="share a picture with the test"):
        ready(data, tmp_path / "o")
    assert look_over(replace(data, n_test=20)) == (
        [],
        [],
    ), "some of them are tested on, others are trained on"


def test_pictures_tell_rows_apart(tmp_path):
    "The same question about other pictures is another row"
    for i in range(4):
        Image.new("RGB", (40, 40), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    asked = [{"question": "How many?", "answer": 1, "images": [f"{i}.png"]} for i in range(4)]
    lines(tmp_path, *asked[:2])
    lines(tmp_path, *asked[2:], name="test.jsonl")
    assert look_over(DataConfig(source=str(tmp_path))) == ([], [])
    lines(tmp_path, *asked[1:3], name="test.jsonl")
    (warned,) = look_over(DataConfig(source=str(tmp_path)))[1]
    assert warned.startswith("1 of 2 rows of ") and "test.jsonl (50%)" in warned


def test_a_source_of_a_mixture_that_is_all_test_is_refused(tmp_path):
    d = lines(tmp_path / "d", *sums(*range(4)))
    lines(d, *sums(*range(4)), name="test.jsonl")
    sources = [dict(source=str(d), name="mine"), dict(source=str(OWN))]
    problems, _ = look_over(merge(DataConfig(), {"sources": sources}))
    assert len(problems) == 1 and problems[0].startswith("data.sources, mine: all rows of")
    with pytest.raises(SpecsError, match="data.sources, mine: all 4 rows of use share"):
        ready(merge(DataConfig(), {"sources": sources}), tmp_path / "o")


@pytest.mark.parametrize(
    "name, says",
    [
        (None, "there is no"),
        ("tests.jsonl", "is it test.jsonl"),
        ("ood-visual.jsonl", "is it ood_visual.jsonl"),
        ("composition.jsonl", "is it compositional.jsonl"),
    ],
)
def test_a_missing_test_is_told_before_a_row_is_read(name, says, tmp_path, monkeypatch):
    from specs_nb.inputs import sources

    d = lines(tmp_path / "d", *sums(*range(4)))
    if name:
        lines(d, *sums(9), name=name)
    if name and name != "tests.jsonl":
        lines(d, *sums(8), name="test.jsonl")
    data = DataConfig(source=str(d))
    assert says in look_over(data)[0][0]
    monkeypatch.setattr(sources, "stream", None)
    with pytest.raises(SpecsError, match=says):
        prepare(data, tmp_path / "o")


def test_what_is_held_out_and_what_is_not_read_is_printed(tmp_path, capsys):
    d = lines(tmp_path / "d", *sums(*range(20)), name="train.jsonl")
    prepare(DataConfig(source=str(d), n_test=4), tmp_path / "o")
    assert "4 rows are held out of them for the test" in capsys.readouterr().out
    lines(d, *sums(1))
    lines(d, *sums(2), name="test.jsonl")
    prepare(DataConfig(source=str(d)), tmp_path / "o")
    assert "not read: train.jsonl" in capsys.readouterr().out
