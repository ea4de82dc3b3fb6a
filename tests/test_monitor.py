"""Trainings that really go wrong: each is a GRPO run of a few steps on the embedded model, with settings that
cause it, and the callback says so."""

import json

import pytest


def brief(completions, **kw):
    "Pays for short answers alone: the policy learns to say nothing"
    return [-float(len(c[0]["content"] if isinstance(c, list) else c)) for c in completions]


def unsure(completions, **kw):
    "A grader that has no opinion on anything"
    return [None] * len(completions)


def train(tmp_path, steps, rewards, **trainer):
    """What the monitor said, and the history it saw; the limits are the defaults, only the patience is
    shorter."""
    from specs_nb import world
    from specs_nb.core import GRPOStage
    from specs_nb.engines.monitor import Limits, monitor
    from specs_nb.formats import FORMATS
    from specs_nb.grpo import grpo_trainer

    how = dict(
        per_device_train_batch_size=8,
        num_generations=4,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        max_completion_length=16,
        gradient_checkpointing=False,
        save_strategy="no",
    )
    t = grpo_trainer(
        "tiny",
        world.rows("train", 32),
        tmp_path,
        GRPOStage(steps=steps, rewards=rewards, trainer={**how, **trainer}),
        FORMATS["think_answer"],
        stage="zero",
    )
    said = []
    watch = monitor("zero", tmp_path, Limits(patience=3, stuck=4), say=said.append)
    t.add_callback(watch)
    t.train()
    written = json.loads((tmp_path / "warnings.json").read_text())
    assert [f"zero: step {w['step']}: {w['text']}" for w in written.values()] == said, "what is said is kept"
    return written, watch.history


def test_completions_are_all_truncated(tmp_path):
    written, history = train(tmp_path, 6, {"format": 1.0, "accuracy": 1.0}, max_completion_length=1)
    assert "of the completions hit max_completion_length for 3 steps" in written["truncated"]["text"]
    assert written["truncated"]["step"] == 3 and "entropy" not in written and "kl" not in written


def test_all_groups_have_equal_rewards(tmp_path):
    "Rollouts drawn without chance are one and the same; from question to question the reward does change."
    written, history = train(tmp_path, 4, {"test_monitor:brief": 1.0}, top_k=1, max_completion_length=32)
    assert list(written) == ["no spread"] and "equal rewards for 3 steps" in written["no spread"]["text"]
    assert len({h["reward"] for h in history}) > 1 and all(h["frac_reward_zero_std"] == 1 for h in history)


def test_the_reward_is_stuck(tmp_path):
    # too short for an answer
    written, history = train(tmp_path, 4, {"accuracy": 1.0}, max_completion_length=8)
    assert (
        "the mean reward stays at 0.000 for 4 steps" in written["stuck"]["text"]
        and written["stuck"]["step"] == 4
    )


def test_a_grader_without_opinion(tmp_path):
    "It is no constant reward: TRL leaves it out, and logs nothing for it"
    written, history = train(
        tmp_path, 3, {"test_monitor:unsure": 1.0, "format": 1.0}, max_completion_length=8
    )
    assert (
        "the reward unsure has had no opinion on any completion for 3 steps" in written["no opinion: unsure"][
            "text"
        ]
    )
    assert not [w for w in written if "format" in w], "the other one has"


def test_the_kl_runs_away(tmp_path):
    written, history = train(tmp_path, 5, {"test_monitor:brief": 1.0}, beta=0.001, learning_rate=1e-2)
    assert "the policy runs away" in written["kl"]["text"] and written["kl"]["step"] > 3
    assert history[0]["kl"] == pytest.approx(0, abs=1e-5), "it began at the reference"


def test_the_entropy_collapses(tmp_path):
    written, history = train(
        tmp_path,
        14,
        {"test_monitor:brief": 1.0},
        per_device_train_batch_size=16,
        num_generations=16,
        learning_rate=1e-2,
        max_completion_length=8,
    )
    assert "it no longer explores" in written["entropy"]["text"]
    assert (
        history[0]["entropy"] > 0.1
        and history[-1]["entropy"] < 0.002
        and history[-1]["frac_reward_zero_std"] == 1
    )


def test_a_healthy_run_is_not_blamed(tmp_path):
    "The same limits, the default's learning rate: nothing to say (with warnings.json absent)"
    with pytest.raises(FileNotFoundError):
        train(
            tmp_path,
            5,
            {"format": 1.0, "accuracy": 1.0},
            beta=0.001,
            learning_rate=2e-4,
            max_completion_length=64,
        )
