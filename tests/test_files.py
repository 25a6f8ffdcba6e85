"""What other processes write, and where one may write."""

from pathlib import Path

from esft_jax import files


def test_a_file_of_another_host_is_waited_for(tmp_path: Path, monkeypatch) -> None:
    late = tmp_path / "late"
    monkeypatch.setattr(files.time, "sleep", lambda seconds: late.write_text(""))
    assert files.seen(late)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    assert not files.seen(tmp_path / "nowhere" / "file")
