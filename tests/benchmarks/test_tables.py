"""The README's figures are those of the recorded results."""

from pathlib import Path

from benchmarks.tables import ROOT, TABLES, filled


def test_the_tables_of_the_readme_are_the_recorded_ones():
    text = (Path(ROOT) / "README.md").read_text(encoding="utf-8")
    assert filled(text) == text
    assert all(f"<!-- {name} -->" in text for name in TABLES)
