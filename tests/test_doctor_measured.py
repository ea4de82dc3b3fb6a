"""The doctor's estimates against peaks that are measured here; bench/doctor.py measures the other cases"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from measure_case import CASES, measure, predict

LIMIT, TRIES = 0.15, 3
SAVED = json.loads((Path(__file__).parent.parent / "bench/results/doctor_measured.json").read_text())["cases"]


def off(name, measured):
    "By what part of the measured peak the estimate is too high, or too low"
    return predict(CASES[name], measured).peak / measured["peak"] - 1


@pytest.mark.parametrize("name", ["full, deep", "lora, deep, checkpointing", "generate", "grpo, full"])
def test_measured_peak(name):
    """Within 15 % in one of three tries. Pages that the kernel counts late and a busy allocator can only add
    to a peak, so that of several tries the smallest is the best."""
    seen = []
    for _ in range(TRIES):
        seen.append(measure(CASES[name]))
        if abs(off(name, min(seen, key=lambda m: m["peak"]))) <= LIMIT:
            return
    pytest.fail(f"{name}: {[f'{off(name, m):+.1%}' for m in seen]}")


def test_saved_peaks():
    assert list(SAVED) == list(CASES)
    for name, case in SAVED.items():
        assert (
            json.loads(json.dumps(CASES[name])) == case["spec"]
        ), f"{name}: measure it again (bench/doctor.py)"
        assert abs(off(name, case["measured"])) <= 0.1, (name, off(name, case["measured"]))


@pytest.mark.parametrize("what, kinds", [("training", 11), ("generation", 2)])
def test_an_estimate_that_is_wrong_is_seen(what, kinds, monkeypatch):
    "A third more on one formula takes every case that uses it out of the limit"
    import measure_case

    right = getattr(measure_case, what)

    def wrong(*args, **kw):
        p = right(*args, **kw)
        return replace(p, peak=1.3 * p.peak)

    monkeypatch.setattr(measure_case, what, wrong)
    out = [name for name, case in SAVED.items() if abs(off(name, case["measured"])) > LIMIT]
    assert len(out) >= kinds, out
