"tools/audit.py: an installed package that isn't the locked one, or was changed since, is found."

import base64
import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import audit


def _hash(data):
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


@pytest.fixture
def env(tmp_path):
    "An environment with one package, as pip leaves it, and the wheel it came from"
    site = tmp_path / "env/lib/python3.11/site-packages"
    files = {
        "toy/__init__.py": b"x = 1\n",
        "toy-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n",
    }
    rows = "".join(f"{n},sha256={_hash(d)},{len(d)}\n" for n, d in files.items())
    for n, d in {
        **files,
        "toy-1.0.dist-info/RECORD": (
            (rows + "toy-1.0.dist-info/RECORD,,\ntoy/__pycache__/__init__.cpython-311.pyc,,\n").encode()
        ),
    }.items():
        (site / n).parent.mkdir(parents=True, exist_ok=True)
        (site / n).write_bytes(d)
    with zipfile.ZipFile(tmp_path / "toy-1.0-py3-none-any.whl", "w") as z:
        for n, d in {
            **files,
            "toy-1.0.dist-info/RECORD": (rows + "toy-1.0.dist-info/RECORD,,\n").encode(),
        }.items():
            z.writestr(n, d)
    return tmp_path / "env"


def lock(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    return audit.read_lock(tmp_path / "lock")


PIN = "toy==1.0 \\\n    --hash=sha256:" + "a" * 64 + "\n"


def looked_at(env, pins):
    site = audit.site_of(env)
    dists = audit.installed(site)
    return [*audit.other_versions(pins, dists, audit.markers_of(env)), *audit.changed_files(site, dists)]


def test_what_was_installed_is_fine(env, tmp_path):
    assert looked_at(env, lock(tmp_path, PIN)) == []


@pytest.mark.parametrize(
    "file, says",
    [
        ("toy/__init__.py", "toy: toy/__init__.py is not what was installed"),
        ("planted.pth", "planted.pth belongs to no package"),
        ("toy/more.py", "toy/more.py belongs to no package"),
    ],
)
def test_a_changed_or_planted_file_is_found(env, tmp_path, file, says):
    with open(audit.site_of(env) / file, "a") as f:
        f.write("import os\n")
    assert looked_at(env, lock(tmp_path, PIN)) == [says]


def test_a_missing_file_is_found(env, tmp_path):
    (audit.site_of(env) / "toy/__init__.py").unlink()
    assert looked_at(env, lock(tmp_path, PIN)) == ["toy: toy/__init__.py is gone"]


@pytest.mark.parametrize(
    "text, says",
    [
        (PIN.replace("1.0", "1.1"), "toy is 1.0, the lock has 1.1"),
        ("", "toy 1.0 is not in the lock"),
        (PIN.replace("1.0 ", "1.0 ; python_full_version >= '3.12' "), "toy 1.0 is not in the lock"),
    ],
    ids=["version", "absent", "marker"],
)
def test_another_version_is_found(env, tmp_path, text, says):
    (env / "pyvenv.cfg").write_text("version = 3.11.7\n")
    found = looked_at(env, lock(tmp_path, text))
    assert len(found) == 1 and found[0].startswith(says), found


def test_a_forged_record_is_found_by_the_locked_wheel(env, tmp_path):
    "Who changes a file and its RECORD is not seen by looking at the environment alone"
    site = audit.site_of(env)
    was, now, rec = b"x = 1\n", b"x = 2\n", site / "toy-1.0.dist-info/RECORD"
    (site / "toy/__init__.py").write_bytes(now)
    rec.write_text(rec.read_text().replace(_hash(was), _hash(now)))
    assert looked_at(env, lock(tmp_path, PIN)) == []
    origin = audit.other_origin(
        site,
        audit.installed(site)["toy"],
        None,
        lambda name, version: tmp_path / f"{name}-{version}-py3-none-any.whl",
    )
    assert list(origin) == ["toy: toy/__init__.py is not that of the locked wheel"]


def test_the_lock_meets_pyproject():
    "After a change of pyproject.toml: `make audit`, then .venv-audit/bin/python tools/audit.py --write"
    assert list(audit.uncovered(audit.read_lock(), audit.asked(ROOT / "pyproject.toml"))) == []


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "toy is required and not in the lock"),
        (PIN.replace("1.0", "0.9"), "the lock has toy 0.9, toy>=1 is required"),
        ("toy==1.0\n", "toy has no hash in the lock"),
    ],
)
def test_a_lock_that_does_not_do_is_found(tmp_path, text, says):
    assert list(audit.uncovered(lock(tmp_path, text), [audit.Requirement("toy>=1")])) == [says]


def answers(known):
    return lambda pins: [
        dict(name=n, version=v, vulns=known[n]) if n in known else dict(name=n, skip_reason="not found")
        for n, v in pins
    ]


HOLE = [dict(id="CVE-1", fix_versions=["1.1"])]


def test_known_holes_are_told():
    assert audit.advisories([("toy", "1.0"), ("new", "2")], answers({"jinja2": HOLE, "toy": HOLE})) == (
        ["toy 1.0: CVE-1, mended in 1.1"],
        "not known to the source: new",
    )


@pytest.mark.parametrize("known", [{}, {"jinja2": [], "toy": HOLE}], ids=["nothing", "not the canary"])
def test_a_source_that_knows_nothing_is_not_trusted(known):
    found, why = audit.advisories([("toy", "1.0")], answers(known))
    assert found == [] and why.startswith("NOT LOOKED AT")


def test_the_whole_command(env, tmp_path, monkeypatch, capsys):
    "Exit code and the lines that are printed"
    monkeypatch.setattr(audit, "conflicts", lambda env: [])
    pins = lock(tmp_path, PIN)
    monkeypatch.setattr(audit, "read_lock", lambda: pins)
    monkeypatch.setattr(audit, "asked", lambda path: [audit.Requirement("toy>=1")])
    args = ["--env", str(env), "--offline"]
    assert audit.main(args) == 0 and "not asked (--offline)" in capsys.readouterr().out
    (audit.site_of(env) / "toy/__init__.py").write_text("x = 3\n")
    assert audit.main(args) == 1 and "toy/__init__.py is not what was installed" in capsys.readouterr().out
