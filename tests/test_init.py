"""`esft init`: in a checkout, and from a wheel in an empty folder."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from esft_jax import init
from esft_jax.config import load_config

ROOT = Path(__file__).parents[1]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_folder_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a b"
    assert init.main([str(folder)]) == 0
    assert f"Next: cd '{folder}' && esft train quickstart.yaml" in capsys.readouterr().out
    monkeypatch.chdir(folder)
    config = load_config("quickstart.yaml")
    for path in (*config.data.train, *config.data.valid, config.evaluation.data):
        assert Path(path).read_bytes() == (ROOT / path).read_bytes()
    shipped = files(ROOT / "models" / "tiny-moe")
    assert files(Path(config.model)) == shipped
    assert "model.safetensors" in shipped
    assert Path("models/tiny-moe/../../data/LICENSES").is_dir()  # the model's card links to it


def test_no_file_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert init.main([]) == 0
    before = files(tmp_path)
    out = capsys.readouterr().out
    assert f" {len(before)} files written" in out
    assert "Next: esft train quickstart.yaml" in out
    assert init.main([]) == 0
    assert " 0 files written" in capsys.readouterr().out
    Path("data/intent/valid.jsonl").unlink()
    Path("quickstart.yaml").write_text("own: true")
    assert init.main(["."]) == 2
    assert capsys.readouterr().err.startswith("error: quickstart.yaml: exists, with other content;")
    assert not Path("data/intent/valid.jsonl").exists()
    assert Path("quickstart.yaml").read_text() == "own: true"
    Path("quickstart.yaml").unlink()
    Path("quickstart.yaml").symlink_to("nowhere")
    assert init.main([]) == 2
    Path("quickstart.yaml").unlink()
    assert init.main([]) == 0
    assert files(tmp_path) == before


def test_a_file_in_the_place_of_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "models").write_text("")
    assert init.main([str(tmp_path)]) == 2
    assert "models is a file; expected a folder" in capsys.readouterr().err
    assert list(files(tmp_path)) == ["models"]


@pytest.mark.slow
def test_a_wheel_in_an_empty_folder(tmp_path: Path) -> None:
    """Three commands: install, init, train. The same files come from a wheel and a checkout."""
    for builder in ("hatchling", "hatch_fancy_pypi_readme"):
        pytest.importorskip(builder, reason=f"needs {builder} to build the wheel")

    def run(*command: str | Path, **options: object) -> str:
        done = subprocess.run(command, capture_output=True, text=True, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        page = archive.read(metadata).decode()
    targets = re.findall(r"(?:\]\(|src=\")([^)\"]+)", page)
    assert "https://raw.githubusercontent.com" in "".join(targets)
    assert not [target for target in targets if not target.startswith(("https://", "#"))]
    installed, empty, checkout = (tmp_path / name for name in ("installed", "empty", "checkout"))
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps"]
    run(*pip, "--target", installed, wheel)
    environment = os.environ | {"PYTHONPATH": str(installed)}  # before an editable installation
    esft = installed / "bin" / "esft"
    run(esft, "init", cwd=empty, env=environment)
    assert init.main([str(checkout)]) == 0
    assert files(empty) == files(checkout)
    short = ["train.steps=2", "optimizer.warmup_steps=1", "score.samples=8", "score.batch_size=8"]
    short += ["evaluation.limit=8", "evaluation.max_new_tokens=8", "mesh.data=1"]
    out = run(esft, "train", "quickstart.yaml", *short, cwd=empty, env=environment)
    assert "experts trained" in out
    assert "comparison: runs/quickstart" in out
