"""Validation while GRPO trains: training takes the same steps, the best step's weights are kept, also by a
run that was cut off, and a stage may end early"""

import pytest
from short_grpo import FMT, HOW, history, weights

from specs_nb import core, validate, world
from specs_nb.core import GRPOStage, SpecsError, Validation
from specs_nb.grpo import train_grpo

ROWS = world.rows("train", 24)
TRAIN, HELD = validate.hold_out(ROWS, 6)


def train(out, steps=4, tick=None, held=HELD, lora=False, fast=True, **how):
    v = Validation(rows=6, **how)
    config = GRPOStage(steps=steps, fast=fast, lora=lora, validate=v, trainer=HOW)
    return train_grpo(
        "tiny", TRAIN, out, config, FMT, tick=tick, look_every=0, held=held if v.every else None
    )


@pytest.fixture
def said(monkeypatch):
    "Accuracies that validation finds, one after the other"
    values = {}

    def ask(trainer, table, accuracy):
        return dict(accuracy=values["all"][trainer.state.global_step - 1], form=1.0, no_opinion=0.0)

    monkeypatch.setattr(validate, "ask_held_out", ask)
    return values


@pytest.mark.parametrize("fast", [True, False])
def test_training_takes_the_same_steps(fast, tmp_path):
    train(tmp_path / "a", fast=fast), train(tmp_path / "b", fast=fast, every=1)
    a, b = history(tmp_path / "a"), history(tmp_path / "b")
    for key in ("reward", "loss", "grad_norm", "completions/mean_length", "num_tokens"):
        assert [h[key] for h in a] == [h[key] for h in b], key
    assert all(0 <= h["validate/accuracy"] <= 1 >= h["validate/form"] for h in b)
    assert weights(tmp_path / "a/model") == weights(tmp_path / "b/model")


@pytest.mark.parametrize("lora", [False, True])
def test_the_best_steps_weights_are_kept(lora, said, tmp_path):
    said["all"] = [0.25, 0.5, 0.5, 0.25]
    facts = train(tmp_path, every=1, keep="best", lora=lora)
    assert (facts["best_step"], facts["best_accuracy"], facts["steps"]) == (
        2,
        0.5,
        4,
    ), "the earlier of equals"
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("c*")) == ["checkpoint-2", "checkpoint-4"]
    checkpoint, last = (tmp_path / f"checkpoints/checkpoint-{n}" for n in (2, 4))
    assert same_weights(tmp_path / "model", checkpoint) and not same_weights(tmp_path / "model", last)


def same_weights(a, b):
    from specs_nb.engines.models import load_model

    a, b = (load_model(str(p))[0].state_dict() for p in (a, b))
    return all((x == y).all() for x, y in zip(a.values(), b.values(), strict=True))


def test_cut_off_it_keeps_the_best_so_far(said, tmp_path):
    said["all"] = [0.5, 0.25, 0.25, 0.25]

    def stop():
        if (tmp_path / "cut/checkpoints/checkpoint-2").exists():
            core._asked.append("a test")

    with pytest.raises(core.Interrupted):
        try:
            train(tmp_path / "cut", tick=stop, every=1, keep="best")
        finally:
            core._asked.clear()
    assert train(tmp_path / "cut", every=1, keep="best")["best_step"] == 1
    train(tmp_path / "whole", every=1, keep="best")
    assert weights(tmp_path / "cut/model") == weights(tmp_path / "whole/model")


def test_it_ends_when_nothing_gets_better(said, tmp_path):
    said["all"] = [0.5, 0.25, 0.5, 0.9]
    facts = train(tmp_path, every=1, patience=2)
    assert (
        facts["steps"] == 3
        and facts["best_step"] == 1
        and [h["step"] for h in history(tmp_path)] == [1, 2, 3]
    )
    # begun again, as after a cut while the model was saved: no step more
    before = weights(tmp_path / "model")
    assert train(tmp_path, every=1, patience=2)["steps"] == 3 and weights(tmp_path / "model") == before


def test_every_few_steps_and_at_the_last(said, tmp_path):
    said["all"] = [0.1, 0.2, 0.3]
    train(tmp_path, 3, every=2)
    assert [h.get("validate/accuracy") for h in history(tmp_path)] == [None, 0.2, 0.3]


def test_stages_hold_the_same_rows_out():
    from specs_nb.core import load_config
    from specs_nb.pipeline import _n_held, inputs

    both = ["zero.validate={every: 5, rows: 8}", "final.validate={every: 5, rows: 16}"]
    config = load_config(None, both)
    assert _n_held(config) == 16 and inputs(config)["pairs"]["rows held out"] == 16
    assert _n_held(load_config(None)) == 0 and "rows held out" not in inputs(load_config(None))["zero"]


def test_trls_own_evaluation_is_refused_with_a_way_out():
    from specs_nb.pipeline import check_names

    for name in ("zero", "final"):
        with pytest.raises(SpecsError, match=f"set {name}.validate instead"):
            check_names(core.load_config(None, [f"{name}.trainer={{eval_strategy: steps, eval_steps: 5}}"]))
    with pytest.raises(SpecsError, match="coldstart.trainer.eval_strategy.*leave it out"):
        check_names(core.load_config(None, ["coldstart.trainer={eval_strategy: epoch}"]))
