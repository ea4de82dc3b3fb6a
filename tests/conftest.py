"""Which test files are heavy, and in which order the whole run takes them.

The longest come first, so that two processes end at about the same time.
"""

import pytest

# They start processes, servers or training runs; `make check` leaves them out. Longest first.
HEAVY = [
    "test_survival.py",
    "test_launch.py",
    "test_pipeline.py",
    "test_stop.py",
    "test_judge.py",
    "test_coldstart.py",
    "test_fast.py",
    "test_models.py",
    "test_doctor.py",
    "test_doctor_measured.py",
    "test_ablate.py",
    "test_report.py",
    "test_monitor.py",
    "test_audit.py",
    "test_benchmarks.py",
    "test_sources.py",
    "test_grouped.py",
    "test_sampling.py",
    "test_validate.py",
    "test_pools.py",
    "test_algorithms.py",
    "test_gpu_truth.py",
    "test_resume.py",
]
# The longest of the others: they come right behind, so that no process is left with one of them at the end.
LONG = ["test_grading.py", "test_project.py"]


def pytest_collection_modifyitems(items):
    "Mark the tests of heavy files, and put the longest files first"
    place = {name: i for i, name in enumerate([*HEAVY, *LONG])}
    for item in items:
        if item.path.name in HEAVY or "engines" in item.path.parts:
            item.add_marker(pytest.mark.heavy)
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
