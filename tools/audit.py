"""Are the installed packages those of requirements.lock, unchanged since, and free of known holes?

`make audit` runs this from an environment of its own.

    python tools/audit.py [--env .venv] [--offline] [--also NAME …] [--fetch NAME …]
    python tools/audit.py --write    write the lock anew: the versions of --env, with the registry's hashes

What is looked at, one line each; exit code 1 if anything is found:

- lock: it pins, with hashes, a version that fits for everything that pyproject.toml asks for (base and dev)
- versions: each installed package is in the lock with that version, or named with --also
- files: each file of each package has the hash that its RECORD noted when it was installed; files that no
  RECORD names are found
- conflicts: `pip check`
- origin (only with --fetch): the wheel that the lock's hash names is fetched again, and its files are those
  installed. RECORD alone can be forged, this can't
- advisories (not with --offline): pip-audit. First it is asked about a version with known holes: a source
  that doesn't know those is no source, which is said

Not looked at: compiled files (`__pycache__`; delete them in doubt), .venv-vllm, packages of the system, and
what code does that was published with bad intent."""

import argparse
import base64
import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from datetime import date
from importlib import metadata
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCK, EXTRAS = ROOT / "requirements.lock", ("dev",)
INSTALLERS = {"pip"}  # brings the others
CANARY = ("jinja2", "3.1.2")  # has had advisories since January 2024 (CVE-2024-22195)


def read_lock(path=LOCK):
    "Of each package its pins: (requirement, number of hashes)"
    pins = {}
    for text in re.sub(r"\\\n", " ", Path(path).read_text()).splitlines():
        line, *hashes = text.split("--hash=sha256:")
        if not line.strip() or line.startswith("#"):
            continue
        pins.setdefault(canonicalize_name((r := Requirement(line)).name), []).append((r, len(hashes)))
    return pins


def asked(pyproject, extras=EXTRAS):
    "What the project requires, its own extras resolved"
    p = tomllib.loads(Path(pyproject).read_text())["project"]
    todo, seen = [*p["dependencies"], *(r for e in extras for r in p["optional-dependencies"][e])], []
    for text in todo:
        r = Requirement(text)
        if canonicalize_name(r.name) == canonicalize_name(p["name"]):
            todo += [t for e in sorted(r.extras) for t in p["optional-dependencies"][e]]
        else:
            seen.append(r)
    return seen


def uncovered(pins, requirements):
    "Requirements that no pin meets, and pins without a hash"
    for r in requirements:
        have = pins.get(canonicalize_name(r.name), [])
        if not have:
            yield f"{r.name} is required and not in the lock"
        for pin, _ in have:
            if not r.specifier.contains(_version(pin), prereleases=True):
                yield f"the lock has {pin.name} {_version(pin)}, {r} is required"
    yield from (f"{pin.name} has no hash in the lock" for have in pins.values() for pin, n in have if not n)


def _version(pin):
    return next(iter(pin.specifier)).version


def site_of(env):
    "The folder of an environment's packages"
    found = [*Path(env).glob("lib/python3*/site-packages"), *Path(env).glob("Lib/site-packages")]
    if len(found) != 1:
        sys.exit(f"{env} is no environment with packages: `make install`")
    return found[0]


def markers_of(env):
    "What a lock's markers are read with: the environment's Python, not the one that runs this"
    cfg = Path(env) / "pyvenv.cfg"
    full = (
        re.search(r"version\s*=\s*(\d+\.\d+\.\d+)", cfg.read_text())[1]
        if cfg.exists()
        else sys.version.split()[0]
    )
    return {
        **default_environment(),
        "python_full_version": full,
        "python_version": ".".join(full.split(".")[:2]),
    }


def installed(site):
    return {canonicalize_name(d.metadata["Name"]): d for d in metadata.distributions(path=[str(site)])}


def own(dist):
    return '"editable": true' in (dist.read_text("direct_url.json") or "")


def other_versions(pins, dists, markers, also=()):
    "Packages that are not those of the lock"
    for name, d in sorted(dists.items()):
        fits = [
            _version(pin) for pin, _ in pins.get(name, []) if not pin.marker or pin.marker.evaluate(markers)
        ]
        if name in INSTALLERS or name in map(canonicalize_name, also) or own(d):
            continue
        if not fits:
            yield f"{name} {d.version} is not in the lock: uninstall it, or name it with --also"
        elif d.version not in fits:
            yield (
                f"{name} is {d.version}, the lock has {fits[0]}: pip install --require-hashes -r {LOCK.name}"
            )


def _sha256(path):
    with open(path, "rb") as f:
        return base64.urlsafe_b64encode(hashlib.file_digest(f, "sha256").digest()).rstrip(b"=").decode()


def record(text):
    "path → hash of a RECORD"
    return {path: h.partition("=")[2] for path, h, _ in csv.reader(io.StringIO(text))}


def changed_files(site, dists):
    "Files that are not as they were installed, are gone, or came otherwise"
    known = set()
    for name, d in sorted(dists.items()):
        if not (text := d.read_text("RECORD")):
            yield f"{name} has no RECORD: install it again"
            continue
        for rel, h in record(text).items():
            path = Path(os.path.normpath(site / rel))
            known.add(path)
            if not path.is_relative_to(site.parents[2]):
                yield f"{name} names a file outside the environment: {rel}"
            elif rel.endswith(".pyc"):
                continue
            elif not path.exists():
                yield f"{name}: {rel} is gone"
            elif h and _sha256(path) != h:
                yield f"{name}: {rel} is not what was installed"
            elif not h and not rel.endswith(".dist-info/RECORD"):
                yield f"{name}: {rel} has no hash in its RECORD"
    for path in sorted(site.rglob("*")):
        if path.is_file() and path not in known and "__pycache__" not in path.parts:
            yield f"{path.relative_to(site)} belongs to no package"


def conflicts(env):
    r = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(env), "check"], capture_output=True, text=True
    )
    return [] if r.returncode == 0 else (r.stdout or r.stderr).strip().splitlines()


def other_origin(site, dist, pins, fetch):
    "Files that differ from the wheel which the lock's hash names; `fetch` gives that wheel's path"
    have = record(dist.read_text("RECORD") or "")
    with zipfile.ZipFile(fetch(dist.metadata["Name"], dist.version)) as z:
        rows = record(z.read(next(n for n in z.namelist() if n.endswith(".dist-info/RECORD"))).decode())
    for rel, h in rows.items():
        if h and ".data/" not in rel and have.get(rel) != h:
            yield f"{dist.metadata['Name']}: {rel} is not that of the locked wheel"


def pip_fetch(env, tmp):
    "Fetching by pip, which compares with the lock's hashes"

    def fetch(name, version):
        lines = re.findall(rf"^{re.escape(name)}==(?:.*\\\n)+.*$", LOCK.read_text(), re.M | re.I) or sys.exit(
            f"{name} is not in the lock"
        )
        (one := Path(tmp) / f"{name}.txt").write_text("\n".join(lines) + "\n")
        to = Path(tmp) / name
        r = subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "--python",
                str(env),
                "download",
                "-q",
                "--no-deps",
                "--only-binary",
                ":all:",
                "--require-hashes",
                "-r",
                one,
                "-d",
                to,
            ],
            capture_output=True,
            text=True,
        )
        if r.returncode:
            sys.exit(f"{name} {version} can't be fetched as the lock names it:\n{r.stderr.strip()[-600:]}")
        return next(to.glob("*.whl"))

    return fetch


def pip_audit(pins):
    "What pip-audit knows about (name, version) pairs: its list of packages"
    exe = shutil.which(
        "pip-audit", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    )
    if not exe:
        raise OSError("pip-audit isn't installed (`make audit` installs it)")
    with tempfile.TemporaryDirectory() as tmp:
        (path := Path(tmp) / "pins.txt").write_text("".join(f"{n}=={v}\n" for n, v in pins))
        r = subprocess.run(
            [exe, "-r", path, "--no-deps", "--disable-pip", "-f", "json", "--progress-spinner", "off"],
            capture_output=True,
            text=True,
        )
    try:
        return json.loads(r.stdout)["dependencies"]
    except (ValueError, KeyError):
        raise OSError((r.stderr.strip().splitlines() or ["no answer"])[-1][:200]) from None


def advisories(pins, ask=pip_audit):
    "(known holes, what was not asked and why)"
    try:
        canary = ask([CANARY])
    except OSError as e:
        return [], f"NOT LOOKED AT: {e}"
    if not any(d.get("vulns") for d in canary):
        return (
            [],
            (
                "NOT LOOKED AT: the source that pip-audit asks here doesn't know the holes of"
                f" {' '.join(CANARY)}, so its silence about others says nothing"
            ),
        )
    try:
        answers = ask(pins)
    except OSError as e:
        return [], f"NOT LOOKED AT: {e}"
    found = [
        f"{d['name']} {d['version']}: {v['id']}, mended in {', '.join(v['fix_versions']) or 'no version yet'}"
        for d in answers
        for v in d.get("vulns", [])
    ]
    unknown = [d["name"] for d in answers if "skip_reason" in d]
    return found, f"not known to the source: {', '.join(unknown)}" if unknown else ""


def write_lock(env):
    "The lock anew with uv: the environment's versions where they fit, for all platforms"
    uv = shutil.which(
        "uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    ) or sys.exit("uv isn't installed (`make audit` installs it)")
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp) / "lock"
        # uv keeps what it finds there
        out.write_text(
            "".join(f"{n}=={d.version}\n" for n, d in sorted(installed(site_of(env)).items()) if not own(d))
        )
        extras = [a for e in EXTRAS for a in ("--extra", e)]
        subprocess.run(
            [
                uv,
                "pip",
                "compile",
                "-q",
                "pyproject.toml",
                *extras,
                "--universal",
                "--python-version",
                "3.11",
                "--generate-hashes",
                "--no-header",
                "--no-annotate",
                "-o",
                out,
            ],
            cwd=ROOT,
            check=True,
        )
        head = (
            f"# Written by tools/audit.py --write on {date.today()}: base and {', '.join(EXTRAS)} of"
            " pyproject.toml, Python >= 3.11, all platforms.\n# To install just these: pip install"
            f" --require-hashes -r {LOCK.name} && pip install --no-deps -e .\n"
        )
        LOCK.write_text(head + out.read_text())
    print(f"{LOCK.name}: {sum(map(len, read_lock().values()))} pins")


def report(name, found, fine):
    "One line, and one for each thing that was found"
    found = list(found)
    print(f"{name:11}{f'{len(found)} found' if found else fine}", flush=True)
    for f in found:
        print(f"  {f}")
    return bool(found)


def main(args=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--env", type=Path, default=ROOT / ".venv", help="the environment that is looked at")
    p.add_argument("--offline", action="store_true", help="ask nobody for advisories")
    p.add_argument(
        "--also",
        nargs="+",
        default=[],
        metavar="NAME",
        help="packages that may be there without being in the lock",
    )
    p.add_argument(
        "--fetch",
        nargs="+",
        default=[],
        metavar="NAME",
        help="packages whose locked wheels are fetched and compared; `all`: 4 GB",
    )
    p.add_argument("--write", action="store_true", help="write the lock anew")
    a = p.parse_args(args)
    if a.write:
        return write_lock(a.env)
    pins, site = read_lock(), site_of(a.env.absolute())
    dists = installed(site)
    bad = report(
        "lock",
        uncovered(pins, asked(ROOT / "pyproject.toml")),
        f"{sum(map(len, pins.values()))} pins, all with hashes, and they meet pyproject.toml",
    )
    bad |= report(
        "versions",
        other_versions(pins, dists, markers_of(a.env), a.also),
        f"{len(dists)} packages, as locked",
    )
    bad |= report("files", changed_files(site, dists), "each as its RECORD says, and no others")
    bad |= report("conflicts", conflicts(a.env), "none")
    if a.fetch:
        chosen = [
            d
            for n, d in sorted(dists.items())
            if n in pins and (a.fetch == ["all"] or n in map(canonicalize_name, a.fetch))
        ]
        with tempfile.TemporaryDirectory() as tmp:
            bad |= report(
                "origin",
                [f for d in chosen for f in other_origin(site, d, pins, pip_fetch(a.env, tmp))],
                f"{len(chosen)} packages have the files of the locked wheels",
            )
    found, why = (
        ([], "not asked (--offline)")
        if a.offline
        else advisories([(n, d.version) for n, d in sorted(dists.items()) if not own(d)])
    )
    bad |= report("advisories", found, why or "none")
    if found and why:
        print(f"  {why}")
    return bad


if __name__ == "__main__":
    sys.exit(main())
