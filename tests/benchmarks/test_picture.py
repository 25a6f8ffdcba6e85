"""The picture of the README is that of the records."""

import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_picture_is_that_of_the_records(script, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    picture = script("picture")
    monkeypatch.setattr(picture, "PICTURE", tmp_path / "overview.svg")
    picture.main()
    drawn = (tmp_path / "overview.svg").read_text(encoding="utf-8")
    assert drawn == (ROOT / "docs" / "overview.svg").read_text(encoding="utf-8")
    shapes = [shape.get("class") for shape in xml.fromstring(drawn)]
    assert shapes.count("cell") == 160
    assert shapes.count("chosen") == 36  # as docs/results.md says
