"""vLLM's engines against transformers, on the embedded model in float32. `python tools/check.py vllm` runs
this in the environment of `make vllm`"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from importlib.util import find_spec

import pytest
import torch

if find_spec("vllm") is None:
    pytest.skip(
        "vLLM isn't installed here: `make vllm`, then `python tools/check.py vllm`", allow_module_level=True
    )

from pathlib import Path

from PIL import Image

from specs_nb import generate as g
from specs_nb import world
from specs_nb.core import GRPOStage, SpecsError, read_json
from specs_nb.engines import jobs
from specs_nb.engines.models import load_model, resolve
from specs_nb.formats import FORMATS

FMT = FORMATS["think_answer"]
CARD = torch.cuda.is_available()
# several engines share a card here, and compiling would take longer than all they are asked
ROOM = dict(gpu_memory=0.15, options=dict(enforce_eager=True)) if CARD else {}
GREEDY = g.Sampling(temperature=0, max_new_tokens=48)
torch.backends.cudnn.allow_tf32 = False  # nor are a GPU's convolutions exact as they come


def fond_of_images(folder):
    "The embedded model with a head of its own that wants the image's token nearly everywhere; its folder"
    import torch

    from specs_nb.engines.models import save_model

    m, p = load_model("tiny")
    some = world.rows("test", 4)
    with torch.no_grad():
        b = g.encode(p, some, asks(some))
        seen = m(**b, output_hidden_states=True).hidden_states[-1].flatten(0, 1)
        way = seen.mean(0) / seen.mean(0).norm()
        usual = m.lm_head(seen).max(1).values
        head = torch.nn.Linear(*reversed(m.lm_head.weight.shape), bias=False)
        head.weight.copy_(m.lm_head.weight)
        # 30 nats above the best other word, mostly; a bias of -100, the least that vLLM knows, is far more
        head.weight[p.image_token_id] = way * ((usual + 30) / (seen @ way)).median()
        over = head(seen)[:, p.image_token_id] - usual
        assert over.median() > 20 and over.max() < 80, over
    m.lm_head = head
    m.config.tie_word_embeddings = m.config.text_config.tie_word_embeddings = False
    save_model(m, p, folder)
    return str(folder)


def written(drawn):
    return [t for some in drawn for c in some for t in c.ids]


def asks(rows):
    return [FMT.instruction] * len(rows)


def farthest(drawn, scores):
    return max(
        abs(a - b)
        for d, s in zip(drawn, scores)
        for c, one in zip(d, s)
        for a, b in zip(c.logps, one, strict=True)
    )


@pytest.fixture(scope="module")
def rows():
    return world.rows("test", 12)


@pytest.fixture(scope="module")
def hard(rows, tmp_path_factory):
    "A good row, one with a broken image, one that is too long, and a good one again"
    path = tmp_path_factory.mktemp("images") / "broken.png"
    rows[1]["images"][0].save(path)
    path.write_bytes(path.read_bytes()[:150])
    return [
        rows[0],
        dict(rows[1], images=[Image.open(path)]),
        dict(rows[2], question="How many? " * 800),
        rows[3],
    ]


@pytest.fixture(scope="module")
def fond(tmp_path_factory):
    return fond_of_images(tmp_path_factory.mktemp("fond"))


@pytest.fixture(scope="module")
def hf():
    return g.Transformers("tiny", {}, {})


@pytest.fixture(scope="module")
def engine():
    return g.VLLM("tiny", {}, ROOM)


# ---- in process


def test_same_log_probabilities(hf, engine, rows):
    drawn = engine.sample(rows, asks(rows), g.Sampling(n=4, logps=True), 0)
    ids = [[c.ids for c in d] for d in drawn]
    assert farthest(drawn, hf.score(rows, asks(rows), ids)) < 1e-3
    assert farthest(drawn, engine.score(rows, asks(rows), ids)) < 1e-3
    theirs = hf.sample(rows, asks(rows), g.Sampling(n=2, logps=True), 0)
    assert farthest(theirs, engine.score(rows, asks(rows), [[c.ids for c in d] for d in theirs])) < 1e-3


def test_rows_of_text_alone(hf, engine, rows):
    plain = [dict(r, images=[]) for r in rows]
    drawn = engine.sample(plain, asks(rows), g.Sampling(n=2, logps=True), 0)
    assert farthest(drawn, hf.score(plain, asks(rows), [[c.ids for c in d] for d in drawn])) < 1e-3


def test_greedy_says_the_same(hf, engine, rows):
    assert [[c.ids for c in d] for d in engine.sample(rows, asks(rows), GREEDY, 0)] == [
        [c.ids for c in d] for d in hf.sample(rows, asks(rows), GREEDY, 0)
    ]


def test_distributions_agree(hf, engine, rows):
    "600 samples of one question: how often each first word comes is the same, up to chance"
    from collections import Counter

    n = g.Sampling(n=600, max_new_tokens=1)
    a, b = (Counter(c.ids[0] for c in e.sample(rows[:1], asks(rows[:1]), n, 1)[0]) for e in (hf, engine))
    assert sum(abs(a[t] - b[t]) for t in a | b) / 1200 < 0.1


def test_the_seed_decides(engine, rows):
    how, draw = g.Sampling(n=2), lambda rs, seed: g.texts_of(engine.sample(rs, asks(rs), how, seed), 2)
    assert draw(rows, 1) == draw(rows, 1) != draw(rows, 2)
    assert draw(rows[:2], 1) == draw(rows, 1)[:2], "whatever else is in the batch"


def test_same_failures(hf, engine, hard):
    for e in (hf, engine):
        drawn = e.sample(hard, asks(hard), g.Sampling(), 0)
        assert [isinstance(d, g.Failed) for d in drawn] == [False, True, True, False]
        assert "truncated" in drawn[1].reason and "2048" in drawn[2].reason


def test_bias_is_scored_alike(hf, engine, rows):
    "What transformers says of tokens when some can't be written is what vLLM sampled them with"
    drawn = hf.sample(rows[:2], asks(rows[:2]), g.Sampling(), 0)
    ids = [[c.ids for c in d] for d in drawn]
    free, bound = (
        g.score_tokens(hf.model, hf.processor, rows[:2], asks(rows[:2]), ids, bias=b)
        for b in (None, {drawn[0][0].ids[0] + 1: -100.0})
    )
    assert all(b >= f - 1e-6 for f, b in zip(free[0][0], bound[0][0])) and free != bound


def test_killed_and_continued(engine, tmp_path, monkeypatch):
    """A run that is killed after its first batch and goes on ends with the same answers as one that wasn't;
    the engine of these tests answers in the second process's place"""
    code = f"""        if __name__ == "__main__":
            import sys
            from specs_nb import generate as g, world
            from specs_nb.formats import FORMATS
            job = g.Job("a", "tiny", world.rows("test", 40), FORMATS["think_answer"].instruction)
            g.answer_all([job], g.Sampling(n=2, batch_size=8), 0, sys.argv[1], engine="vllm", options={ROOM})
    """
    (tmp_path / "run.py").write_text(textwrap.dedent(code))
    words = [sys.executable, tmp_path / "run.py", tmp_path / "cut"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    p, until = subprocess.Popen(words, start_new_session=True, **quiet), time.time() + 240
    while not list((tmp_path / "cut").glob("a-*.json")) and p.poll() is None and time.time() < until:
        time.sleep(0.02)
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "cut").glob("a-*.json")}
    assert 0 < len(before) < 10, "it was killed too early or too late"
    monkeypatch.setattr(jobs, "_processes", lambda engine, workers: (1, False))
    monkeypatch.setattr(jobs, "_loaded", {("vllm", g.root_of("tiny")): engine})
    job = g.Job("a", "tiny", world.rows("test", 40), FMT.instruction)
    how = dict(engine="vllm", options=ROOM)
    cut, whole = (
        g.answer_all([job], g.Sampling(n=2, batch_size=8), 0, tmp_path / to, **how)["a"]
        for to in ("cut", "whole")
    )
    assert len(whole) == 40 and cut == whole
    assert len(list((tmp_path / "whole").glob("a-*.json"))) == 10
    assert all(f.stat().st_mtime_ns == t for f, t in before.items()), "what was there is not asked again"


def test_no_room_says_by_how_much():
    room = dict(ROOM, max_model_len=1_000_000)
    if CARD:  # of a large card's memory even a share holds a million tokens of so small a model
        room["options"] = dict(enforce_eager=True, kv_cache_memory_bytes=2**30)
    code = f"from specs_nb import generate as g; g.VLLM('tiny', {{}}, {room})"
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"},
    )
    said = re.search("SpecsError: out of memory: .* lower vllm.max_model_len to ([0-9]+)", out.stderr)
    assert said and 100_000 < int(said[1]) < 1_000_000, out.stderr[-2000:]


def test_what_vllm_is_not_given():
    with pytest.raises(SpecsError, match="without quantize, or engine: transformers"):
        g.VLLM("tiny", dict(quantize=True), {})
    with pytest.raises(SpecsError, match="vLLM can't start with"):
        g.VLLM("tiny", {}, {"options": {"no_such_option": 1}})


@pytest.mark.parametrize("version", ["0.21.0", "0.32.0"])
def test_unsupported_version(version, monkeypatch):
    monkeypatch.setattr(g, "vllm_version", lambda: version)
    with pytest.raises(SpecsError, match=f"vLLM {version} is not supported; versions 0.22 to 0.31 are"):
        g.pick_engine("vllm")
    with pytest.raises(SpecsError, match="0.22 to 0.31"):
        g.VLLM("tiny", {}, {})
    assert g.pick_engine("auto")[0] == "transformers"


def test_no_tokens_of_images_and_one_engine(engine, fond, rows):
    "Last of those that share an engine: another one ends it"
    want = g.Transformers(fond, {}, {})
    bad = want.processor.image_token_id
    other = g.VLLM(fond, {}, ROOM)
    with pytest.raises(SpecsError, match="this vLLM engine was ended"):
        engine.sample(rows[:1], asks(rows[:1]), GREEDY, 0)
    assert [llm for llm, _ in g._running] == [other.llm]
    for e in (want, other):
        for how in (GREEDY, g.Sampling(n=4, max_new_tokens=16)):
            ids = written(e.sample(rows[:4], asks(rows[:4]), how, 0))
            assert len(ids) > 20 and bad not in ids
    other.never = None
    assert written(other.sample(rows[:4], asks(rows[:4]), GREEDY, 0)).count(bad) > 20, "it would like to"
    assert g.end_vllm() == 1 and g.end_vllm() == 0


# ---- many batches


def test_auto_and_failures_on_disk(hard, tmp_path, capsys, monkeypatch):
    why = ("vllm", "it is installed")
    assert g.pick_engine() == (
        why if CARD else ("transformers", "on a CPU vLLM is slower with so small a model")
    )
    monkeypatch.setattr(g, "SMALL", 0)  # as if the model were a larger one
    how = g.Sampling(n=2, batch_size=4)
    job = g.Job("hard", "tiny", hard, FMT.instruction)
    got = g.answer_all([job], how, 0, tmp_path, keep=False, options=ROOM)["hard"]
    assert [t[0] is None for t in got] == [False, True, True, False] and [
        f["row"] for f in got.failures()
    ] == [1, 2]
    said = capsys.readouterr().out
    assert "engine: vLLM 0." in said and "2 of 4 questions have no answer" in said
    assert "vLLM" in (tmp_path / "engine.txt").read_text()


# ---- a server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    p = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "vllm.entrypoints.cli.main",
            "serve",
            resolve("tiny"),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--dtype",
            "float32",
            "--enforce-eager",
            "--no-enable-chunked-prefill",
            "--logprobs-mode",
            "raw_logprobs",
            "--generation-config",
            "vllm",
            *(["--gpu-memory-utilization", "0.15"] if CARD else []),
        ],
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    url, until = f"http://127.0.0.1:{port}/v1", time.time() + 300
    try:
        while True:
            try:
                g.Server("tiny", {}, {"urls": [url]})
                break
            except SpecsError:
                time.sleep(1)
            assert p.poll() is None and time.time() < until, log.read_text()[-3000:]
        yield url, p
    finally:
        if p.poll() is None:
            os.killpg(p.pid, signal.SIGKILL)
        p.wait()


def test_server_says_the_same(hf, server, rows):
    s = g.Server("tiny", {}, {"urls": ["http://127.0.0.1:9/v1", server[0]]})
    drawn = s.sample(rows, asks(rows), g.Sampling(n=4, logps=True), 0)
    assert farthest(drawn, hf.score(rows, asks(rows), [[c.ids for c in d] for d in drawn])) < 1e-3
    assert g.texts_of(s.sample(rows, asks(rows), GREEDY, 0), 1) == g.texts_of(
        hf.sample(rows, asks(rows), GREEDY, 0), 1
    )
    assert g.texts_of(s.sample(rows, asks(rows), g.Sampling(), 3), 1) == g.texts_of(
        s.sample(rows, asks(rows), g.Sampling(), 3), 1
    )
    with pytest.raises(SpecsError, match="can't score given tokens"):
        s.score(rows, asks(rows), [])


def test_a_server_is_told_what_not_to_write(hf, server, rows):
    s = g.Server("tiny", {}, {"urls": [server[0]]})
    assert s.never[hf.processor.image_token_id] == -100.0
    how = g.Sampling(temperature=0, max_new_tokens=8, logps=True)
    first = written(s.sample(rows[:2], asks(rows[:2]), how, 0))[0]
    s.never = {first: -100.0}  # as if the word it likes most stood for an image
    assert first not in written(s.sample(rows[:2], asks(rows[:2]), how, 0))


def test_server_answers_jobs(server, hard, tmp_path):
    how = dict(engine="server", options={"urls": [server[0]]})
    got = g.answer_all(
        [g.Job("hard", resolve("tiny"), hard, FMT.instruction)],
        g.Sampling(n=2, batch_size=4),
        0,
        tmp_path,
        keep=False,
        **how,
    )["hard"]
    assert [t[0] is None for t in got] == [False, True, True, False] and "2048" in [
        f["reason"] for f in got.failures()
    ][1]
    with pytest.raises(SpecsError, match="no server has other .there is .* at .*vllm serve other"):
        g.answer_all([g.Job("o", "other", hard, FMT.instruction)], g.Sampling(), 0, tmp_path, **how)


def test_server_that_goes(server, rows, tmp_path):
    "Last, since the server is gone afterwards"
    url, p = server
    s = g.Server("tiny", {}, {"urls": [url]})
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    with pytest.raises(SpecsError, match="can't be reached any more .*start it again with `vllm serve"):
        s.sample(rows[:1], asks(rows[:1]), g.Sampling(), 0)
    with pytest.raises(SpecsError, match="no server answers at .*start one with `vllm serve tiny --port"):
        g.answer_all(
            [g.Job("r", "tiny", rows, FMT.instruction)],
            g.Sampling(),
            0,
            tmp_path,
            engine="server",
            options={"urls": [url]},
        )


# ---- GRPO

HERE = Path(__file__).parent
CASES = ("full", "lora", "qlora", "questions", "mixed_rows", "broken_sync", "other_prompts")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "What train_case.py found, by case: one process trains them all"
    out = tmp_path_factory.mktemp("trained")
    words = [sys.executable, str(HERE / "train_case.py"), str(out), *CASES]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    r = subprocess.run(words, capture_output=True, text=True, env=env)
    assert r.returncode == 0, r.stderr[-3000:]
    facts = {name: read_json(out / f"{name}.json") for name in CASES}

    def found(name):
        assert "error" not in facts[name], facts[name]["trace"]
        return facts[name]["found"]

    return found


@pytest.mark.parametrize("how", ["full", "lora", "qlora"])
def test_colocate_trains_with_checked_weights(how, trained):
    seen = trained(how)
    spent, found = seen["spent"], seen["found"]
    assert {"write", "sync", "score", "train"} <= {name for name, seconds in spent.items() if seconds > 0}
    assert seen["scores_once"], "prompts are computed once beside vLLM, too"
    assert [f["step"] for f in found] == [1, 2]
    assert max(f["max"] for f in found) < 1e-3
    assert min(f["tokens"] for f in found) > 10
    if how != "full":
        assert (seen["layers"], seen["moved"]) == (28, 0), "the base under an adapter stands still"
        assert seen["handed"] == [3, False], "the adapter by itself: at the start and after each step"


def test_questions_are_chosen_and_held_out_ones_asked(trained):
    """With rows that have pictures and rows that have none; validation changes no step, and what vLLM wrote
    for a replaced question is scored as that question's answer"""
    plain, watched = trained("questions")
    keys = ("reward", "loss", "questions/spread", "questions/extra", "completions/mean_length")
    assert [[h[k] for k in keys] for h in plain] == [[h[k] for k in keys] for h in watched]
    assert sum(h["questions/extra"] for h in plain) and all("validate/accuracy" in h for h in watched)
    # An answer that is scored as another question's differs by whole nats. vLLM never writes the tokens of
    # images, so its log-probabilities are larger by what the model gives to them: up to 5e-3 for a row
    # without a picture on this base (2026-11-27, seed 0). `mixed_rows` takes that out.
    assert max(h["sampling/sampling_logp_difference/max"] for h in plain) < 0.02
    assert max(h["sampling/sampling_logp_difference/mean"] for h in plain) < 1e-3


def test_rows_without_a_picture_in_a_mixed_batch(trained):
    "vLLM's distribution is the trainer's without the tokens that are never written, and nothing else"
    seen = trained("mixed_rows")
    assert 0 < seen["without"] < seen["rows"]
    assert seen["gap"] < 1e-4


def test_a_broken_sync_is_noticed(trained):
    assert "after step 1 vLLM's log-probabilities are" in trained("broken_sync")


def test_other_prompts_are_noticed(trained):
    "Without `one_per_image` vLLM would read other prompts, and the first batch says so"
    assert "vLLM reads other tokens than the trainer in 16 of 16 prompts" in trained("other_prompts")


def in_process(body):
    "Run code that starts vLLM in a Python of its own: two engines in one process get in each other's way"
    return subprocess.run(
        [
            sys.executable,
            "-c",
            f"""if True:
        import json, sys
        sys.path.insert(0, {str(HERE)!r})
        from train_case import BESIDE, EAGER, FMT, GRPO, ROWS as rows
        from specs_nb.core import GRPOStage, VLLMConfig
        from specs_nb.grpo import grpo_trainer, train_grpo
        ROOM = {ROOM}
        {body}""",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def test_training_with_a_model_fond_of_images(tmp_path):
    """It goes on, and no image's token is written; two seeds draw different answers; our settings reach vLLM;
    the engine is gone afterwards. In one process, to start vLLM's libraries once"""
    fond = fond_of_images(tmp_path / "fond")
    out = in_process(f"""
        import torch
        from specs_nb import generate, vllm_sync
        first = []
        def beside(name, model, seed, **kw):
            keys = dict(GRPO, use_vllm=True, vllm_mode="colocate", shuffle_dataset=False)
            stage = GRPOStage(steps=2, trainer=keys, **kw)
            t = grpo_trainer(model, rows, {str(tmp_path)!r} + name, stage, FMT, seed,
                vllm=VLLMConfig(sync_every=1, options=dict(EAGER, max_num_batched_tokens=2048)))
            g, seen = t.vllm_generation, []
            generate_ = g.generate
            g.generate = lambda *a, **kw: (seen.append(generate_(*a, **kw)), seen[-1])[1]
            t.train()
            return t, seen
        t, seen = beside("a", {fond!r}, 0)
        ids = [i for s in seen for c in s[1] for i in c]
        c = t.vllm_generation.llm.llm_engine.vllm_config
        print("FACTS", json.dumps(dict(
            bad=ids.count(t.processing_class.image_token_id), tokens=len(ids), steps=t.state.global_step,
            length=c.model_config.max_model_len,
            video=c.model_config.multimodal_config.get_limit_per_prompt("video"),
            batched=c.scheduler_config.max_num_batched_tokens,
            longest=max(len(p) for s in seen for p in s[0]))), flush=True)
        for seed in (1, 2, 1):
            t, seen = beside("s", "tiny", seed)
            first.append(seen[0][1])
        print("SEEDS", json.dumps([first[0] == first[1], first[0] == first[2]]), flush=True)
        print("LEFT", len(generate._running), flush=True)
        stage = GRPOStage(steps=1, trainer={{**GRPO, **BESIDE}})
        train_grpo("tiny", rows, {str(tmp_path)!r} + "t", stage, FMT, vllm=VLLMConfig(options=EAGER))
        print("ENDED", len(generate._running), torch.distributed.is_initialized(), flush=True)
        again = generate.VLLM("tiny", {{}}, ROOM)
        print("AGAIN", len(again.sample(rows[:1], [FMT.instruction], generate.Sampling(), 0)), flush=True)
        """)
    assert out.returncode == 0, out.stderr[-3000:]
    said = {l.split(" ", 1)[0]: l.split(" ", 1)[1] for l in out.stdout.splitlines() if " " in l}
    facts = json.loads(said["FACTS"])
    assert facts["bad"] == 0 and facts["tokens"] > 100 and facts["steps"] == 2
    assert facts["video"] == 0 and facts["batched"] == 2048, "TRL says 4096, the user 2048"
    assert facts["longest"] + 48 <= facts["length"] < 256, "of 2048 that the model has"
    assert json.loads(said["SEEDS"]) == [False, True], "another seed, other answers; the same, the same"
    assert said["LEFT"] == "1", "four trainers one after the other, one engine"
    assert said["ENDED"] == "0 False" and said["AGAIN"] == "1"


def test_server_mode_is_refused_without_its_server():
    from specs_nb.engines.vllm_sync import before_vllm

    for how, says in (
        (dict(), "no vLLM server answers at http://127.0.0.1:9"),
        (dict(qlora=True), "packed 4-bit weights"),
    ):
        with pytest.raises(SpecsError, match=says):
            before_vllm(
                GRPOStage(
                    **how,
                    trainer=dict(
                        use_vllm=True, vllm_mode="server", vllm_server_base_url="http://127.0.0.1:9"
                    ),
                ),
                "tiny",
            )
