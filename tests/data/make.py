"""The small files of this folder, each in the schema of a published set, drawn from our own scenes: `python
tests/data/make.py`"""

import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from specs_nb import world

HERE = Path(__file__).parent


def png(img):
    out = io.BytesIO()
    img.save(out, "PNG", optimize=True)
    return out.getvalue()


def write(path, rows, schema=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=16, compression="zstd")


def boxed(a):
    return "\\boxed{" + a + "}"


# ---- ViRL39K: paths below images/, boxed answers, -1 where no rate is known, choices in the question


def virl39k(folder=HERE / "virl39k", n=80):
    rng, rows, shown = random.Random(0), [], {}
    for i in range(n):
        # two questions a picture
        scene, kind = shown.get(i // 2) or world.draw_grid(rng), ("count", "subtract", "compare")[i % 3]
        shown[i // 2] = scene
        q = {"count": world.ask_count, "subtract": world.ask_subtract, "compare": world.ask_compare}[kind](
            scene, rng
        )
        path = f"images/World-{i // 2}-0.png"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(png(world.picture(scene)))
        text = q.text
        if q.choices and i % 2:
            text = (
                text[: text.index("(A)")].strip()
                + "\nChoices:\n"
                + "\n".join(f"{chr(65 + k)}. {c}" for k, c in enumerate(q.choices))
            )
        rows.append(
            dict(
                question="<image>" + text,
                answer=boxed(q.answer),
                PassRate_32BTrained=[1.0, 0.5, 0.75][i % 3],
                PassRate_7BBase=[-1.0, 0.25, 0.5, 1.0][i % 4],
                category="(GradeSchool) Geometric",
                source="world",
                qid=f"world-{i}",
                image=[path],
            )
        )
    one, two = rows[0]["image"][0], rows[2]["image"][0]
    # unbalanced, can be mended
    traps = [
        dict(question="<image>What is a half?", answer=r"\boxed{\frac{1}{2}", image=[one]),
        # cannot
        dict(question="<image>What is a half?", answer=r"\boxed{\frac{1}{2", image=[two]),
        dict(
            question=(
                "<image>Look at the first.<image>Look at the second. In which are more objects?\n(A) first"
                " (B) second"
            ),
            answer=boxed("B"),
            image=[one, two],
        ),
        # two placeholders, one image
        dict(question="<image><image>How many?", answer=boxed("3"), image=[one]),
        # lost its placeholder
        dict(question="How many objects are in the picture?", answer=boxed("4"), image=[two]),
        dict(question="<image>Where is it?", answer=boxed("left"), image=["images/gone.png"]),
        dict(question="<image>Who am I?", answer=boxed("4"), image=["../make.py"]),
        dict(question="<image>Which colour?\n(A) red (B) blue", answer=boxed("green"), image=[one]),
    ]
    write(
        folder / "39Krelease.parquet",
        rows
        + [
            dict(
                dict(
                    PassRate_32BTrained=0.5,
                    PassRate_7BBase=0.5,
                    category="traps",
                    source="world",
                    qid=f"trap-{i}",
                ),
                **t,
            )
            for i, t in enumerate(traps)
        ],
    )


# ---- Orsta-Data-47k: embedded images, nested reward_model, its own test/

RATIO = {
    k: pa.float32()
    for k in ("iou_max_label_first", "iou_max_iou_first", "iou_completeness", "map", "map50", "map75")
}
ORSTA = pa.schema([
    ("data_source", pa.string()),
    ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
    ("prompt", pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))),
    ("ability", pa.string()),
    (
        "reward_model",
        pa.struct([
            ("answer", pa.string()),
            ("ground_truth", pa.string()),
            ("accuracy_ratio", pa.float32()),
            ("format_ratio", pa.float32()),
            ("verifier", pa.string()),
            (
                "verifier_parm",
                pa.struct([
                    ("det_verifier_normalized", pa.bool_()),
                    ("det_reward_ratio", pa.struct(list(RATIO.items()))),
                ]),
            ),
        ]),
    ),
    ("extra_info", pa.struct([("id", pa.string()), ("image_path", pa.string())])),
])
ASK_BOXES = (
    "<image>\nLocate every object of the class present in the image:\n- {label}\n\nStart by explaining your"
    " thoughts enclosed within <think> and </think> tags. Then present the boxes enclosed within <answer> and"
    " </answer> tags.\nFor example:\n<think>\nWhat you see.\n</think>\n<answer>\n[{{'bbox_2d':"
    " [x1,y1,x2,y2],'label': label_name}}]\n</answer>"
)


def orsta_row(scene, question, truth, verifier, source, i):
    detection = verifier == "detection"
    return dict(
        data_source=source,
        images=[dict(bytes=png(world.picture(scene)), path=None)],
        prompt=[dict(content=question, role="user")],
        ability="cv_detection" if detection else "math",
        reward_model=dict(
            answer=truth,
            ground_truth=f"<answer>\n{truth}\n</answer>" if detection else boxed(truth),
            accuracy_ratio=1.0,
            format_ratio=0.1 if detection else 0.0,
            verifier=verifier,
            verifier_parm=dict(
                det_verifier_normalized=True if detection else None,
                det_reward_ratio={k: 1.0 if detection else None for k in RATIO},
            ),
        ),
        extra_info=dict(id=None, image_path=f"images/{i}.png"),
    )


def boxes(scene, thing):
    "Where `thing` stands, scaled to 1000, as the set writes it: Python's quotes, not JSON's"
    third = 1000 // 3
    return str([
        {
            "bbox_2d": [i % 3 * third + 40, i // 3 * third + 40, i % 3 * third + 290, i // 3 * third + 290],
            "label": " ".join(thing),
        }
        for i, o in enumerate(scene.items)
        if o == thing
    ])


def orsta(folder=HERE / "orsta"):
    rng = random.Random(1)
    asked = [world.ask_count(world.draw_grid(rng), rng) for _ in range(12)]
    write(
        folder / "train/train_math_world_12.parquet",
        [
            orsta_row(q.scene, "<image>" + q.text, q.answer, "mathverify", "world_math", i)
            for i, q in enumerate(asked)
        ],
        ORSTA,
    )
    scenes = [world.draw_grid(rng) for _ in range(4)]
    write(
        folder / "train/train_detection_world_4.parquet",
        [
            orsta_row(
                s,
                ASK_BOXES.format(label=" ".join(s.objects()[0])),
                boxes(s, s.objects()[0]),
                "detection",
                "world_train",
                i,
            )
            for i, s in enumerate(scenes)
        ],
        ORSTA,
    )
    asked = [world.ask_count(world.draw_grid(rng), rng) for _ in range(2)]
    write(
        folder / "test/test_math_megabench_2.parquet",
        [
            orsta_row(q.scene, "<image>" + q.text, q.answer, "mathverify", "megabench", i)
            for i, q in enumerate(asked)
        ],
        ORSTA,
    )


# ---- MathVista: decoded_image, a choice's text as its answer, precision and unit

MATHVISTA = pa.schema(
    [(k, pa.string()) for k in ("pid", "question", "image")]
    + [
        ("decoded_image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("choices", pa.list_(pa.string())),
        ("unit", pa.string()),
        ("precision", pa.float64()),
    ]
    + [(k, pa.string()) for k in ("answer", "question_type", "answer_type", "query")]
    + [("metadata", pa.struct([("source", pa.string()), ("task", pa.string())]))]
)


def mathvista(folder=HERE / "mathvista"):
    rng, rows = random.Random(2), []

    def add(scene, question, answer, kind, choices=None, precision=None, unit=None):
        n = str(len(rows) + 1)
        hint = (
            "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the"
            " end."
            if choices
            else "Hint: Please answer the question and provide the final value."
        )
        rows.append(
            dict(
                pid=n,
                question=question,
                image=f"images/{n}.png",
                decoded_image=dict(bytes=png(world.picture(scene)), path=None),
                choices=choices,
                unit=unit,
                precision=precision,
                answer=answer,
                question_type="multi_choice" if choices else "free_form",
                answer_type=kind,
                query=f"{hint}\nQuestion: {question}",
                metadata=dict(source="world", task="figure question answering"),
            )
        )

    for _ in range(4):
        q = world.ask_count(world.draw_grid(rng), rng)
        add(q.scene, q.text, q.answer, "integer")
        q = world.ask_compare(world.draw_grid(rng), rng)
        add(
            q.scene,
            q.text[: q.text.index("(A)")].strip(),
            q.choices["ABC".index(q.answer)],
            "text",
            list(q.choices),
        )
    s = world.draw_grid(rng)
    add(s, "What share of the nine cells is filled?", "0.3", "float", precision=2.0)
    add(s, "How long is a side of the picture?", "84", "integer", unit="mm")
    add(s, "In which row and column is the first object?", "[1, 2]", "list")
    add(s, "Which letter is right?", "A", "text", ["B", "A"])  # a text that is another choice's letter
    add(s, "What is it?", "", "text")  # the hidden answers of its test split
    write(folder / "testmini-00000-of-00001.parquet", rows, MATHVISTA)


# ---- a folder of your own, and a set with other names


def own(folder=HERE / "folder"):
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for name, split, n in (("data.jsonl", "train", 6), ("test.jsonl", "test", 3)):
        lines = []
        for i, r in enumerate(world.rows(split, n, seed=3, tasks=world.SIMPLE)):
            path = f"pictures/{split}-{i}.png"
            (folder / path).write_bytes(png(r["images"][0]))
            lines.append(
                json.dumps(
                    {k: r[k] for k in ("id", "question", "answer", "choices") if r[k]} | {"images": [path]}
                )
            )
        (folder / name).write_text("\n".join(lines) + "\n")


def renamed(folder=HERE / "renamed"):
    write(
        folder / "train.parquet",
        [
            dict(
                problem=r["question"],
                meta=dict(solution=f"The answer is {r['answer']}.", key=r["id"]),
                picture=dict(bytes=png(r["images"][0]), path="x.png"),
                options=str(r["choices"]) if r["choices"] else None,
                passed=0.5,
            )
            for r in world.rows("train", 6, seed=4, tasks=world.SIMPLE)
        ],
    )


if __name__ == "__main__":
    for f in (virl39k, orsta, mathvista, own, renamed):
        f()
    print(sum(p.stat().st_size for p in HERE.rglob("*") if p.is_file()), "bytes in all")
