"""Open-I's XML reports: literal ones, and all of the published ones where they are present."""

import tarfile
from collections import Counter
from pathlib import Path

import pytest

from plan_jax.data.sections.captions import make_caption
from plan_jax.data.sections.openi import read_report

ARCHIVE = Path(__file__).resolve().parents[2] / "shared/data/openi_reports/NLMCXR_reports.tgz"
XML = """<?xml version="1.0" encoding="utf-8"?>
<eCitation>
  <uId id="CXR7"/>
  <licenseURL>http://creativecommons.org/licenses/by-nc-nd/4.0/</licenseURL>
  <MedlineCitation><Article><Abstract>
    <AbstractText Label="COMPARISON"/>
    <AbstractText Label="INDICATION"> Cough,
      XXXX. </AbstractText>
    <AbstractText Label="FINDINGS">Clear &lt;BR&gt; No  effusion.</AbstractText>
    <AbstractText Label="IMPRESSION">  </AbstractText>
  </Abstract></Article></MedlineCitation>
  <MeSH><major>Opacity/lung/base/left</major><major>normal</major><automatic>nodule</automatic></MeSH>
  <parentImage id="CXR7_IM-1-1001"><figureId>F1</figureId><caption>PA view</caption></parentImage>
  <parentImage id="CXR7_IM-1-2001"><caption/></parentImage>
</eCitation>"""


def test_a_report_is_read():
    report = read_report(XML.encode())
    assert report.uid == "CXR7"
    assert report.sections == {"indication": "Cough, XXXX.", "findings": "Clear\nNo effusion."}
    assert report.mesh_major == ("Opacity/lung/base/left", "normal")
    assert report.mesh_automatic == ("nodule",)
    assert report.licence == "http://creativecommons.org/licenses/by-nc-nd/4.0/"
    assert report.images == {"CXR7_IM-1-1001": "PA view", "CXR7_IM-1-2001": ""}


DOCTYPE = '<!DOCTYPE eCitation [<!ENTITY a "Miller"><!ENTITY b "&a;&a;">]>'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (XML.replace("<eCitation>", DOCTYPE + "<eCitation>"), "it declares a document type"),
        (XML.replace("<eCitation>", '<!DOCTYPE a SYSTEM "file:///a"><eCitation>'), "document type"),
        (XML[:300], r"it is not XML \(line 9, column"),
        (XML.replace("utf-8", "miller"), "not XML in a known encoding"),
        ("", r"it is not XML \(line 1, column"),
        ("<html><body>Miller</body></html>", "it has no <uId id=...>, so it is not a report of"),
        (
            XML.replace("FINDINGS", "MILLER"),
            "its sections are not comparison, indication, findings",
        ),
        (XML.replace('id="CXR7_IM-1-2001"', ""), "it has an image without an id"),
    ],
)
def test_another_file_is_refused(content, message):
    for encoding in ("utf-8", "utf-16"):
        if encoding == "utf-16" and "utf-8" in content:
            content = content.replace("utf-8", encoding)
        with pytest.raises(ValueError, match=message) as raised:
            read_report(content.encode(encoding))
        assert "miller" not in str(raised.value).lower()


@pytest.mark.skipif(not ARCHIVE.exists(), reason="the reports of Open-I are not beside the project")
def test_every_published_report_is_read():
    with tarfile.open(ARCHIVE) as archive:
        files = [member for member in archive if member.isfile()]
        reports = {
            Path(file.name).stem: read_report(archive.extractfile(file).read()) for file in files
        }
    assert len(reports) == 3955
    assert all(report.uid == f"CXR{name}" for name, report in reports.items())
    texts = [
        (r.sections.get("findings", ""), r.sections.get("impression", "")) for r in reports.values()
    ]
    present = Counter((bool(findings), bool(impression)) for findings, impression in texts)
    assert present == {(True, True): 3419, (False, True): 502, (True, False): 6, (False, False): 28}
    # 768 copies of a text, and 27 more reports without one.
    assert len(texts) - len(set(texts)) == 795
    assert Counter(filter(any, texts)).most_common(1)[0][1] == 53
    images = [image for report in reports.values() for image in report.images]
    assert len(images) == len(set(images)) == 7470
    assert Counter(len(report.images) for report in reports.values()) == {
        0: 104,
        1: 446,
        2: 3208,
        3: 181,
        4: 15,
        5: 1,
    }
    assert sum(len(report.mesh_major) for report in reports.values()) == 8298
    assert sum(report.mesh_major == ("normal",) for report in reports.values()) == 1391
    assert sum(len(report.mesh_automatic) for report in reports.values()) == 7047
    assert len({report.licence for report in reports.values()}) == 1
    captions = {rule: 0 for rule in ("mgca", "gloria", "findings_impression")}
    for report in reports.values():
        for rule in captions:
            captions[rule] += make_caption(rule, report.sections) != ""
    assert captions == {"mgca": 3927, "gloria": 3911, "findings_impression": 3927}
