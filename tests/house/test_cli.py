"""The `tasuki` command finds its verbs and fails in sentences."""

import http.server
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tasuki_cli import main


def test_version_and_help_need_no_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["version"]) == 0
    assert capsys.readouterr().out.startswith("tasuki 0.")
    assert main.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb}" in shown for verb in ("up", "ask", "gateway", "prefill", "decode"))


def test_an_unknown_verb_is_told_with_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["serve"]) == 2
    assert "no verb 'serve'" in capsys.readouterr().err


def test_a_wrong_flag_is_a_sentence_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["up", "x.yaml", "--prot", "1"]) == 2
    assert "--prot" in capsys.readouterr().err


def test_a_file_that_cannot_be_served_here_is_told_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "apiVersion: tasuki.dev/v1alpha1\nkind: InferenceDeployment\nmetadata: {name: x}\n"
        "spec: {model: {source: 'file://./none'}}\n"
    )
    assert main.main(["up", str(file)]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_asking_where_nobody_listens_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["ask", "x", "--url", "http://127.0.0.1:9/v1"]) == 1
    assert "does not answer" in capsys.readouterr().err


def test_what_runs_on_this_machine_is_asked_without_a_proxy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert main.main(["ask", "x", "--url", f"http://127.0.0.1:{server.server_port}/v1"]) == 1
        thread.join()
    assert "Unsupported method" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["gateway", "up", "ask"])
def test_a_verb_without_an_engine_never_imports_torch(verb: str) -> None:
    program = (
        "import sys\nfrom tasuki_cli import main\n"
        f"try:\n    main.main([{verb!r}, '--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
