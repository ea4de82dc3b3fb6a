"""Questions that a GRPO step chooses: with every engine, with and without pictures, with several ranks, and
bitwise the same after a run was cut off"""

import json

import pytest
from short_grpo import FMT, HOW, history, weights

from specs_nb import core, world
from specs_nb.core import GRPOStage, QuestionSampling, SpecsError
from specs_nb.grpo import grpo_trainer, train_grpo


def stage(steps=2, by_pass_rate=True, refill=1.0, fast=True, **how):
    sampling = QuestionSampling(by_pass_rate, 0.1, refill)
    return GRPOStage(steps=steps, fast=fast, sampling=sampling, trainer={**HOW, **how})


def rows(n=16, eyes=lambda i: True):
    return [r if eyes(i) else {**r, "images": []} for i, r in enumerate(world.rows("train", n))]


RATES = {r["id"]: 0.5 if i % 2 else 0.0 for i, r in enumerate(rows())}


def step(t):
    "One step's batch, and what was paid for it"
    t.model.train()
    t.current_gradient_accumulation_steps = t.args.gradient_accumulation_steps
    heard, score = [], t._calculate_rewards

    def listen(inputs, prompts, completions, *rest):
        heard.append(
            ([r["id"] for r in inputs], prompts, completions, score(inputs, prompts, completions, *rest))
        )
        return heard[-1][-1]

    t._calculate_rewards = listen
    batch = t._prepare_inputs(next(iter(t.get_train_dataloader())))
    return batch, *heard[0]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("eyes", ["all", "none", "some"])
def test_a_step_is_trls_own_on_the_chosen_questions(eyes, fast, tmp_path):
    with_eyes = {"all": lambda i: True, "none": lambda i: False, "some": lambda i: i % 3 == 0}[eyes]
    t = grpo_trainer("tiny", rows(16, with_eyes), tmp_path, stage(fast=fast), FMT, rates=RATES)
    batch, ids, prompts, completions, rewards = step(t)
    assert [ids.count(i) for i in dict.fromkeys(ids)] == [4, 4], "two questions, four answers each"
    by_id = {r["id"]: r for r in rows(16, with_eyes)}
    for i, prompt in zip(ids, prompts):
        assert by_id[i]["question"] in str(prompt), "the prompt of the question that was chosen"
    told = t.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    assert sorted(told) == sorted(c[0]["content"] for c in completions), "what is trained on is what was paid"
    # the rewards say the same of these completions as they say without us
    columns = dict(answer=[by_id[i]["answer"] for i in ids], kind=[by_id[i]["kind"] for i in ids])
    columns["choices"] = [by_id[i]["choices"] for i in ids]
    assert rewards[:, 1].tolist() == t.reward_funcs[1](completions, **columns)
    seen = {q: r for q, r in zip(t.questions.ids, t.questions.rates)}
    assert all(seen[i] is not None for i in ids)
    if fast:
        assert "writing" in t._tried and set(t._why.values()) == {None}, t._why


def test_alike_groups_are_replaced_within_the_budget(tmp_path):
    "Answers to a question of five differ, those to the others are all wrong"
    t = grpo_trainer("tiny", rows(), tmp_path, stage(by_pass_rate=False, refill=3.0), FMT)
    tok, calls = t.processing_class.tokenizer, []
    end = tok.convert_tokens_to_ids("<|im_end|>")

    def canned(prompt_ids, images, fields, n, *args):
        calls.append(len(prompt_ids) // n)
        texts = ["yes" if k % n else "no" for k in range(len(prompt_ids))]
        return [tok(FMT.render("Look.", x))["input_ids"] + [end] for x in texts], None

    t._generate_single_turn = canned
    t.reward_funcs[1] = lambda completions, id, **kw: [
        float(i.endswith(("3", "7")) and "no" in c[0]["content"]) for c, i in zip(completions, id)
    ]
    t.model.train()
    loader = iter(t.get_train_dataloader())
    for _ in range(3):
        t._generate_and_score_completions(next(loader))
    m = t._metrics["train"]
    assert sum(calls) == 3 * 2 + sum(m["questions/extra"]) / 4
    assert all(e <= 3 * 8 for e in m["questions/extra"]), "never beyond the budget"
    assert max(m["questions/extra"]) > 0
    for first, kept, extra in zip(m["questions/spread"], m["questions/spread_kept"], m["questions/extra"]):
        assert kept >= first and (
            kept == 1 or extra == 24
        ), "the budget is used before anything alike is kept"
    assert len(m["completions/mean_length"]) == 3, "lengths are of the questions that were asked first"


@pytest.mark.parametrize("fast", [True, False])
def test_cut_off_and_continued_it_is_the_same_to_the_bit(fast, tmp_path):
    def train(name, tick=None):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "look.json").write_text(json.dumps({"rates": RATES}))
        return train_grpo("tiny", rows(), tmp_path / name, stage(4, fast=fast), FMT, tick=tick, look_every=0)

    def stop():
        core._asked.append("a test")

    with pytest.raises(core.Interrupted):
        try:
            train("cut", stop)
        finally:
            core._asked.clear()
    train("cut"), train("whole")
    cut, whole = history(tmp_path / "cut"), history(tmp_path / "whole")
    keys = {k for h in whole for k in h if k.startswith(("questions/", "reward", "loss", "completions/mean"))}
    assert "questions/extra" in keys and len(whole) == 4
    assert [{k: h.get(k) for k in keys} for h in cut] == [{k: h.get(k) for k in keys} for h in whole]
    assert weights(tmp_path / "cut/model") == weights(tmp_path / "whole/model")
    states = [
        json.loads((tmp_path / d / "checkpoints/checkpoint-4/questions.json").read_text())
        for d in ("cut", "whole")
    ]
    assert states[0] == states[1] and states[0]["draws"] >= 4


def test_a_checkpoint_without_its_questions_is_refused(tmp_path):
    out = tmp_path / "zero"
    train_grpo("tiny", rows(), out, stage(2, refill=0.0), FMT, look_every=0)
    (out / "checkpoints/checkpoint-2/questions.json").unlink()
    with pytest.raises(SpecsError, match="questions.json is missing"):
        train_grpo("tiny", rows(), out, stage(3, refill=0.0), FMT, look_every=0)


def test_switched_off_nothing_is_changed(tmp_path):
    "Not the numbers of a step, and not the fingerprint of a run that is there already"
    from specs_nb.core import Config, load_config
    from specs_nb.pipeline import inputs

    assert not [
        k for table in inputs(Config()).values() for k in table if ".sampling" in k or ".validate" in k
    ]
    on = inputs(load_config(None, ["zero.sampling={by_pass_rate: true}"]))["zero"]
    assert on["zero.sampling.by_pass_rate"] is True and on["zero.look"] == 64, "the look tells what is drawn"
    t = grpo_trainer("tiny", rows(), tmp_path, stage(by_pass_rate=False, refill=0.0), FMT)
    assert t.questions is None


def test_no_reward_for_accuracy_is_told_before_anything_is_trained():
    from specs_nb.core import load_config
    from specs_nb.pipeline import check_names

    words = ["final.sampling={refill: 1.0}", "final.rewards={format: 1}"]
    with pytest.raises(SpecsError, match="final.sampling goes by accuracy"):
        config = load_config(None, words)
        config.final.rewards = {"format": 1.0}
        check_names(config)
    with pytest.raises(SpecsError, match="did you mean 'by_pass_rate'"):
        load_config(None, ["zero.sampling={by_passrate: true}"])
    with pytest.raises(SpecsError, match="zero.sampling.refill is a share"):
        load_config(None, ["zero.sampling={refill: -1}"])
