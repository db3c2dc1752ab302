"""Open-I with eight reports, as the NLM, Kaggle and R2Gen publish it."""

import csv
import io
import json
import tarfile
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image
from radiographs import make_dicom

SECTIONS = ("COMPARISON", "INDICATION", "FINDINGS", "IMPRESSION")
COPY = "Heart size normal. Lungs are clear. XXXX are normal."
# Number, ids of images, four sections, MeSH terms.
REPORTS = (
    (1, ("CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"), ("None.", "", COPY, "Normal."), ["normal"]),
    (
        2,
        ("CXR2_IM-0652-1001", "CXR2_IM-0652-2001", "CXR2_IM-0652-3001"),
        ("", "XXXX", "Large effusion.<BR>No edema.", "Effusion."),
        ["Pleural Effusion/left/large", "Fractures, Bone/ribs"],
    ),
    (3, ("CXR3_IM-1384-0001-0001",), ("", "", "", "No acute findings."), ["No Indexing"]),
    (4, (), ("", "", "The lungs are clear.", "Normal."), ["normal"]),
    (5, ("CXR5_IM-2117-1003002",), ("", "Cough", "", ""), ["normal"]),
    (6, ("CXR6_IM-2192-1001", "CXR6_IM-2192-2001"), ("", "", COPY, ""), ["Cardiomegaly/mild"]),
    (40, ("CXR40_IM-2050-2001",), ("", "", "Nodule > 3 mm & scar.", ""), ["Nodule/lung"]),
    (400, ("CXR400_IM-2052-1001",), ("", "", COPY, "Normal."), []),
)
LATERAL = ("CXR1_IM-0001-4001", "CXR2_IM-0652-1001", "CXR6_IM-2192-2001")
R2GEN = {"train": (1, 2), "val": (6,), "test": (40, 400)}
SHAPE = (40, 32)
XML = """<?xml version="1.0" encoding="utf-8"?>
<eCitation>
   <meta type="rr"/>
   <uId id="CXR{number}"/>
   <licenseURL>http://creativecommons.org/licenses/by-nc-nd/4.0/</licenseURL>
   <MedlineCitation Owner="Indiana University"><Article><Abstract>
{sections}
   </Abstract></Article></MedlineCitation>
   <MeSH>
{terms}
   </MeSH>
{images}
</eCitation>"""
XML_IMAGE = """   <parentImage id="{name}">
      <figureId>F{place}</figureId>
      <caption>Xray Chest PA and Lateral</caption>
      <panel type="single"><url>/hadoop/storage/radiology/extract/{name}.jpg</url></panel>
   </parentImage>"""


def list_truth(layout="nlm"):
    """Returns {id of an image: number of its report} of the images that can be used."""
    reports = {number: (images, sections) for number, images, sections, _ in REPORTS}
    usable = {n: images for n, (images, sections) in reports.items() if sections[2] or sections[3]}
    if layout == "r2gen":
        listed = [number for numbers in R2GEN.values() for number in numbers]
        return {
            f"{_name_study(number)}-{index}": number
            for number in listed
            for index in range(len(usable[number][:2]))
        }
    return {_shorten(image): number for number, images in usable.items() for image in images}


def write_nlm(folder, archive=False, dicom=False):
    """Writes the NLM's reports, as a folder or as the archive, and images as PNG or DICOM."""
    files = {f"ecgen-radiology/{report[0]}.xml": _make_xml(*report) for report in REPORTS}
    if archive:
        with tarfile.open(folder / "NLMCXR_reports.tgz", "w:gz") as packed:
            for name, text in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(text)
                packed.addfile(member, io.BytesIO(text.encode()))
    else:
        (folder / "ecgen-radiology").mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    for number, images, _, _ in REPORTS:
        for image in images:
            if dicom:
                # The first and every second film are stored inverted.
                is_inverted = number % 2 == 1
                path = folder / f"NLMCXR_dcm/{number}/{_shorten(image).removeprefix('CXR')}.dcm"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(_make_dicom(number, is_inverted))
            else:
                path = folder / f"NLMCXR_png/{image}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(draw(number)).convert("RGB").save(path)


def write_views(folder):
    """Writes Kaggle's table of films."""
    rows = [("uid", "filename", "projection")]
    for number, images, _, _ in REPORTS:
        for image in map(_shorten, images):
            view = "Lateral" if image in LATERAL else "Frontal"
            rows.append((number, f"{image.removeprefix('CXR')}.dcm.png", view))
    _write_csv(folder / "indiana_projections.csv", rows)


def write_kaggle(folder):
    """Writes Kaggle's pair of tables and its images, which have two suffixes."""
    write_views(folder)
    texts = ("indication", "comparison", "findings", "impression")
    rows = [("uid", "MeSH", "Problems", "image", *texts)]
    for number, _, (comparison, indication, findings, impression), terms in REPORTS:
        problems = ";".join(term.partition("/")[0] for term in terms)
        texts = (indication, comparison, findings, impression)
        rows.append((number, ";".join(terms), problems, "Xray Chest PA and Lateral", *texts))
    _write_csv(folder / "indiana_reports.csv", rows)
    images = folder / "images/images_normalized"
    images.mkdir(parents=True)
    for number, names, _, _ in REPORTS:
        for name in map(_shorten, names):
            path = images / f"{name.removeprefix('CXR')}.dcm.png"
            Image.fromarray(draw(number)).convert("RGB").save(path)


def write_r2gen(folder, images=True):
    """Writes R2Gen's annotation.json, and at most two images of each report."""
    reports = {report[0]: report for report in REPORTS}
    annotation = {}
    for split, numbers in R2GEN.items():
        annotation[split] = []
        for number in numbers:
            study = _name_study(number)
            paths = [f"{study}/{index}.png" for index in range(len(reports[number][1][:2]))]
            report = reports[number][2][2].lower()
            entry = {"id": study, "report": report, "image_path": paths, "split": split}
            annotation[split].append(entry)
            for path in paths if images else ():
                (folder / "images" / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(draw(number)).save(folder / "images" / path)
    (folder / "annotation.json").write_text(json.dumps(annotation))


def draw(number):
    """Returns the film of a report: one grey value, with a bright corner."""
    pixels = np.full(SHAPE, 40 + number % 100, np.uint8)
    pixels[:10, :10] = 255
    return pixels


def _make_dicom(number, is_inverted):
    stored = np.round(draw(number) / 255 * 4095).astype(np.uint16)
    if is_inverted:
        elements = {"PhotometricInterpretation": "MONOCHROME1"}
        return make_dicom(4095 - stored, BitsStored=12, **elements)
    return make_dicom(stored, BitsStored=12)


def _make_xml(number, images, sections, terms):
    texts = "\n".join(
        f'      <AbstractText Label="{name}">{escape(text)}</AbstractText>'
        for name, text in zip(SECTIONS, sections, strict=True)
    )
    return XML.format(
        number=number,
        sections=texts,
        terms="\n".join(f"      <major>{term}</major>" for term in terms),
        images="\n".join(
            XML_IMAGE.format(name=name, place=place) for place, name in enumerate(images, start=1)
        ),
    )


def _name_study(number):
    """Returns the id of a report in R2Gen, the first part of that of its images."""
    images = next(images for other, images, _, _ in REPORTS if other == number)
    return "-".join(_shorten(images[0]).split("-")[:2])


def _shorten(image):
    return image.replace("CXR1_1_", "CXR1_")


def _write_csv(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
