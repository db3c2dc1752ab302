"""The page inside a notebook: complete, without a script, and a sentence where there is none."""

import re
from html import unescape

import pytest

from plan_jax.page.notebook import Report
from plan_jax.types import UserError

PAGE = "<!doctype html><p title=\"a\">x < y & 'z'</p><script>alert(1)</script>"


@pytest.mark.parametrize("name", ["run", "run/report.html"])
def test_the_frame_holds_the_whole_page_and_runs_no_script(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/report.html").write_text(PAGE, "utf-8")
    frame = Report(tmp_path / name, height=321)._repr_html_()
    match = re.fullmatch(r'<iframe srcdoc="([^"]*)" ([^>]*)></iframe>', frame)
    assert unescape(match[1]) == PAGE
    assert " sandbox " in f" {match[2]} " and 'height="321"' in match[2]
    assert "allow-scripts" not in match[2]


def test_a_terminal_shows_the_path(tmp_path):
    (tmp_path / "report.html").write_text(PAGE)
    assert repr(Report(tmp_path)) == f"Report('{tmp_path / 'report.html'}')"


def test_a_run_without_a_page_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"report.html cannot be read \(No such file.*; pass the f"):
        Report(tmp_path)


def test_a_notebook_shows_the_sentence_of_a_mistake():
    assert UserError("batch 30 is odd; use 32")._render_traceback_() == ["batch 30 is odd; use 32"]
