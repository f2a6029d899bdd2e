"""The command line: exit codes and messages."""

import subprocess
import sys

import pytest

import adamw_triton
from adamw_triton.cli import main
from adamw_triton.installing import missing


def in_fresh_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` where nothing is imported yet."""
    code = f"import sys; sys.path[:0] = {[path for path in sys.path if path]!r}; {code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_arguments_reach_the_demo(monkeypatch):
    calls = []
    monkeypatch.setattr("adamw_triton.demo.run.run_demo", lambda *arguments: calls.append(arguments))
    line = "demo --steps 7 --seed 3 --out x.svg --device cpu --variants 8bit torch"
    assert main(line.split()) == 0
    assert calls == [(7, 3, "x.svg", ["8bit", "torch"], "cpu")]


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"adamw-triton {adamw_triton.__version__}\n"


@pytest.mark.parametrize("line", ["", "dance", "demo --steps many", "demo --bogus"])
def test_what_the_grammar_does_not_know_exits_with_2(line, capsys):
    with pytest.raises(SystemExit) as exit:
        main(line.split())
    assert exit.value.code == 2
    assert "usage: adamw-triton" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--steps 0", "steps must be at least 1, not 0"),
        ("--variants 4bit", "unknown variant '4bit'"),
        ("--out /no/such/folder/loss.png", "there is no folder '/no/such/folder'"),
    ],
)
def test_arguments_that_cannot_work_exit_with_2_and_one_line(line, message, capsys):
    assert main(["demo", *line.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_interrupt_exits_with_130_and_says_nothing(monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("adamw_triton.demo.run.run_demo", interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_a_missing_package_exits_with_2_and_the_fix(package, monkeypatch, capsys):
    for name in list(sys.modules):
        if name.startswith((f"{package}.", "adamw_triton.demo.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == f"adamw-triton demo: {missing(package, 'demo')}\n"


def test_help_loads_none_of_the_heavy_packages():
    ran = in_fresh_python(
        "from adamw_triton.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('loaded:', {'torch', 'rich', 'matplotlib', 'triton', 'transformers'} & set(sys.modules))"
    )
    assert ran.returncode == 0
    assert "demo" in ran.stdout
    assert "loaded: set()" in ran.stdout


def test_python_dash_m_is_the_same_command():
    ran = in_fresh_python(
        "import runpy; sys.argv = ['adamw_triton', '--version']; "
        "runpy.run_module('adamw_triton', run_name='__main__', alter_sys=True)"
    )
    assert ran.returncode == 0
    assert ran.stdout.startswith("adamw-triton ")
