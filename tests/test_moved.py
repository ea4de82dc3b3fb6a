"""The modules' old paths stand for the new ones, and a patch of a name ends where it began"""

from unittest.mock import patch

from specs_nb import generate
from specs_nb.engines import jobs, vllm_engine


def test_a_patch_through_an_old_path_ends(monkeypatch):
    "pytest and `unittest.mock` alike, one within the other, twice"
    was = vllm_engine.pick_engine
    for _ in range(2):
        with monkeypatch.context() as m:
            m.setattr(generate, "pick_engine", "pytest's")
            assert vllm_engine.pick_engine == jobs.pick_engine == "pytest's", "wherever the name is used"
            with patch.object(generate, "pick_engine", "mock's"):
                assert vllm_engine.pick_engine == jobs.pick_engine == "mock's"
            assert vllm_engine.pick_engine == jobs.pick_engine == "pytest's"
        assert vllm_engine.pick_engine is was
        assert jobs.pick_engine is was


def test_a_name_that_nobody_has_is_gone_again(monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(generate, "no_such_name", 1, raising=False)
        assert generate.no_such_name == 1
    assert not hasattr(generate, "no_such_name")
