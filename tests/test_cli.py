"""The command line: commands, exit codes, and errors in one line."""

import errno
import os
import subprocess
import sys

import pytest

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

from fastclip import cli
from fastclip.errors import UserError


def fails(capsys, *arguments: str) -> tuple[int, str]:
    """(exit code, what was said on stderr) of a command that must fail."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    return stopped.value.code, capsys.readouterr().err


def test_search_without_a_checkpoint_says_how_to_make_one(capsys, tmp_path):
    code, error = fails(capsys, "search", "snowman", "--run", str(tmp_path / "none"))
    assert code == 1 and error.count("\n") == 1
    assert "no checkpoint in" in error and f"fastclip demo --out {tmp_path / 'none'}" in error


def test_search_without_words_is_refused(capsys, tmp_path):
    assert fails(capsys, "search", "  ", "--run", str(tmp_path)) == (1, "fastclip: the query is empty\n")


def test_unwritable_folder_is_one_line(capsys, tmp_path):
    (tmp_path / "file").touch()
    code, error = fails(capsys, "demo", "--steps", "1", "--out", str(tmp_path / "file" / "run"))
    assert code == 1 and error == f"fastclip: cannot write into {tmp_path}/file/run: Not a directory\n"


@pytest.mark.parametrize(
    ("problem", "code", "said"),
    [
        (UserError("too small"), 1, "too small"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.json"), 1, "No space left on device"),
        (
            ModuleNotFoundError("no", name="sklearn"),
            1,
            "needs the package scikit-learn: install it, or fastclip with the extra [demo]",
        ),
        (MemoryError(), 1, "lower --batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, "lower --batch"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_mistakes_end_in_one_line(capsys, monkeypatch, problem, code, said):
    def run(self):
        raise problem

    monkeypatch.setattr(cli.Demo, "run", run)
    got, error = fails(capsys, "demo")
    assert got == code and error.startswith("fastclip: ") and said in error and error.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error():
    code = "import sys; from fastclip import cli; cli.Env.run = lambda self: print('x' * 1_000_000); cli.main(['env'])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141
    process.stderr.close()


def test_bugs_keep_their_traceback(monkeypatch):
    def run(self):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli.Demo, "run", run)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["demo"])


def test_options_reach_the_command(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(cli.Demo, "run", lambda self: seen.append(self))
    cli.main(
        [
            "demo",
            "--steps",
            "7",
            "--batch",
            "512",
            "--out",
            str(tmp_path),
            "--threads",
            "1",
            "--faces-held-out",
            "STIXGeneral",
            "DejaVuSans",
        ]
    )
    (demo,) = seen
    assert (demo.steps, demo.batch, demo.out, demo.threads) == (7, 512, tmp_path, 1)
    assert demo.faces_held_out == ("STIXGeneral", "DejaVuSans")
    assert cli.Demo().batch >= 2048


def test_env_prints_the_backends_report(capsys, monkeypatch):
    from fastclip import backends

    monkeypatch.setattr(backends, "report", lambda: "  cpu  yes: ready")
    cli.main(["env"])
    printed = capsys.readouterr().out
    assert printed.endswith("  cpu  yes: ready\n")
    assert all(word in printed for word in ("Versions", "torch", "Processor", "GPUs", "Backends"))


@pytest.mark.parametrize("arguments", [["nonsense"], ["demo", "--stepz", "3"], []], ids=["command", "option", "none"])
def test_usage_errors_exit_with_2(capsys, arguments):
    code, _ = fails(capsys, *arguments)
    assert code == 2


def test_module_runs_and_help_names_the_commands():
    done = subprocess.run([sys.executable, "-m", "fastclip", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(command in done.stdout for command in cli.COMMANDS)


def test_import_fastclip_loads_none_of_the_demos_packages():
    heavy = ("tyro", "matplotlib", "sklearn", "tokenizers", "safetensors", "fastclip.cli", "fastclip.train")
    code = f"import fastclip, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_help_does_not_wait_for_the_plots():
    code = "import fastclip.cli, sys; print([m for m in ('matplotlib', 'sklearn', 'tokenizers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
