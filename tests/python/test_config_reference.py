from pathlib import Path

from flexkv.config.reference import reference_page
from flexkv.config.table import TABLE

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "settings.md"


def test_the_page_is_up_to_date() -> None:
    hint = "run: python -m flexkv.config.reference > docs/reference/settings.md"
    assert PAGE.read_text() == reference_page(), hint


def test_the_page_has_every_name() -> None:
    page = reference_page()
    for one in TABLE:
        assert all(f"`{name}`" in page for name in (*one.env, *one.aliases))
        assert one.doc in page
