"""`make audit`: are there known vulnerabilities in what the locks install? Asks the OSV database, by pip-audit.

Exit code 1 where there are, except for those that infra/locks/known.txt lists with a reason and a date. Where the
database or pip-audit cannot be reached, it says "not audited" and why, and the exit code is 0: no network, no verdict.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

LOCKS = Path(__file__).parent / "locks"
KNOWN = LOCKS / "known.txt"
TOOL = "pip-audit==2.10.1"
LIMIT_S = 300  # for one lock: a request a package


class Known(NamedTuple):
    """A line of known.txt: a vulnerability that is accepted, since when, and why."""

    id: str
    since: date
    why: str


class Found(NamedTuple):
    """A known vulnerability of a locked package; `names` are its id and aliases."""

    package: str
    names: tuple[str, ...]
    fixed: str

    def __str__(self) -> str:
        return f"{self.package}: {', '.join(self.names)}; {f'fixed in {self.fixed}' if self.fixed else 'no fix yet'}"


class Unreached(Exception):
    """There is no answer to go by; says why."""


def audit(lock: Path, *, osv_url: str | None = None) -> tuple[int, list[Found]]:
    """Number of packages that the database was asked for, and what it knows of them.

    Raises:
        Unreached: No pip-audit, no database, or an answer that says nothing of any package.
    """
    tool = [str(Path(sys.executable).with_name("uv")), "tool", "run", "--from", TOOL, "pip-audit"]
    words = ["-r", str(lock), "--no-deps", "--disable-pip", "-s", "osv", "-f", "json", "--progress-spinner", "off"]
    words += ["--timeout", "5", *(["--osv-url", osv_url] if osv_url else [])]
    try:
        done = subprocess.run([*tool, *words], capture_output=True, text=True, timeout=LIMIT_S)
        said: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise Unreached(f"no answer within {LIMIT_S} s") from None
    except json.JSONDecodeError:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise Unreached(lines[-1][:120] if lines else f"pip-audit ended with {done.returncode}") from None
    asked = [one for one in said["dependencies"] if "skip_reason" not in one]
    if not asked:
        raise Unreached("the database knows none of the packages, so it was not the database that answered")
    return len(asked), [
        Found(f"{one['name']} {one['version']}", (bad["id"], *bad["aliases"]), ", ".join(bad["fix_versions"]))
        for one in asked
        for bad in one["vulns"]
    ]


def known(path: Path) -> Iterator[Known]:
    """Lines `ID YYYY-MM-DD REASON`; `#` begins a comment.

    Raises:
        SystemExit: A line without a date or a reason.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            name, since, why = line.split(maxsplit=2)
            yield Known(name, date.fromisoformat(since), why)
        except ValueError:
            raise SystemExit(f"{path}:{number}: write `ID YYYY-MM-DD REASON`, not `{line}`") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Audit every lock; print what is new, what is accepted, and what was not audited."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--osv-url", help="another database with OSV's interface")
    parser.add_argument("--known", type=Path, default=KNOWN, help="accepted ones")
    parser.add_argument("locks", nargs="*", type=Path, default=sorted(LOCKS.glob("*.txt")))
    args = parser.parse_args(argv)
    accepted = {one.id: one for one in known(args.known)}
    bad, todo = 0, [one for one in args.locks if one.name != KNOWN.name]
    for number, lock in enumerate(todo):
        try:
            packages, found = audit(lock, osv_url=args.osv_url)
        except Unreached as error:
            print(f"not audited: {', '.join(one.name for one in todo[number:])}: {error}")
            break
        fresh = [one for one in found if not accepted.keys() & set(one.names)]
        bad += len(fresh)
        print(f"audited: {lock.name}: {packages} packages, {len(fresh)} known vulnerabilities")
        for one in found:
            allowed = next((accepted[name] for name in one.names if name in accepted), None)
            print(f"  {one}" + (f"; accepted since {allowed.since}: {allowed.why}" if allowed else ""))
    if bad:
        print(f"take fixed versions (`make lock`, `make lock-envs`), or accept with a reason in {KNOWN.name}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
