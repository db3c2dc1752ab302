"""PadChest: 160,861 films of 16 bits with 190 labels, and reports in reduced Spanish."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from typing import ClassVar

from plan_jax.data import quoting
from plan_jax.data.builders import padchest_gr
from plan_jax.data.builders.padchest_gr import VIEWS
from plan_jax.data.public.builder import PublicBuilder
from plan_jax.data.public.config import PublicConfig
from plan_jax.data.public.facts import BY_HASH, Facts
from plan_jax.data.public.items import Item
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.data.public.splits import assign_by_hash
from plan_jax.data.tfds import tfds
from plan_jax.types import UserError

TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
# All labels of the table, but for those that are no findings; in alphabetical order.
FINDINGS = (
    *("COPD signs", "Chilaiditi sign", "NSG tube", "abnormal foreign body", "abscess"),
    *("adenopathy", "air bronchogram", "air fluid level", "air trapping", "alveolar pattern"),
    *("aortic aneurysm", "aortic atheromatosis", "aortic button enlargement", "aortic elongation"),
    *("aortic endoprosthesis", "apical pleural thickening", "artificial aortic heart valve"),
    *("artificial heart valve", "artificial mitral heart valve", "asbestosis signs"),
    *("ascendent aortic elongation", "atelectasis", "atelectasis basal", "atypical pneumonia"),
    *("axial hyperostosis", "azygoesophageal recess shift", "azygos lobe", "blastic bone lesion"),
    *("bone cement", "bone metastasis", "breast mass", "bronchiectasis"),
    *("bronchovascular markings", "bullas", "calcified adenopathy", "calcified densities"),
    *("calcified fibroadenoma", "calcified granuloma", "calcified mediastinal adenopathy"),
    *("calcified pleural plaques", "calcified pleural thickening", "callus rib fracture"),
    *("cardiomegaly", "catheter", "cavitation", "central vascular redistribution"),
    *("central venous catheter", "central venous catheter via jugular vein"),
    *("central venous catheter via subclavian vein", "central venous catheter via umbilical vein"),
    *("cervical rib", "chest drain tube", "chronic changes", "clavicle fracture", "consolidation"),
    *("costochondral junction hypertrophy", "costophrenic angle blunting", "cyst", "dai"),
    *("descendent aortic elongation", "dextrocardia", "diaphragmatic eventration"),
    *("double J stent", "dual chamber device", "electrical device", "emphysema", "empyema"),
    *("end on vessel", "endoprosthesis", "endotracheal tube", "esophagic dilatation"),
    *("external foreign body", "fibrotic band", "fissure thickening", "flattened diaphragm"),
    *("fracture", "gastrostomy tube", "goiter", "granuloma", "ground glass pattern"),
    *("gynecomastia", "heart insufficiency", "heart valve calcified", "hemidiaphragm elevation"),
    *("hiatal hernia", "hilar congestion", "hilar enlargement", "humeral fracture"),
    *("humeral prosthesis", "hydropneumothorax", "hyperinflated lung", "hypoexpansion"),
    *("hypoexpansion basal", "increased density", "infiltrates", "interstitial pattern"),
    *("kerley lines", "kyphosis", "laminar atelectasis", "lepidic adenocarcinoma", "lipomatosis"),
    *("lobar atelectasis", "loculated fissural effusion", "loculated pleural effusion"),
    *("lung metastasis", "lung vascular paucity", "lymphangitis carcinomatosa"),
    *("lytic bone lesion", "major fissure thickening", "mammary prosthesis", "mass", "mastectomy"),
    *("mediastinal enlargement", "mediastinal mass", "mediastinal shift"),
    *("mediastinic lipomatosis", "metal", "miliary opacities", "minor fissure thickening"),
    *("multiple nodules", "nephrostomy tube", "nipple shadow", "nodule"),
    *("non axial articular degenerative changes", "normal", "obesity", "osteopenia"),
    *("osteoporosis", "osteosynthesis material", "pacemaker", "pectum carinatum"),
    *("pectum excavatum", "pericardial effusion", "pleural effusion", "pleural mass"),
    *("pleural plaques", "pleural thickening", "pneumomediastinum", "pneumonia", "pneumoperitoneo"),
    *("pneumothorax", "post radiotherapy changes", "prosthesis", "pseudonodule"),
    *("pulmonary artery enlargement", "pulmonary artery hypertension", "pulmonary edema"),
    *("pulmonary fibrosis", "pulmonary hypertension", "pulmonary mass"),
    *("pulmonary venous hypertension", "reservoir central venous catheter", "respiratory distress"),
    *("reticular interstitial pattern", "reticulonodular interstitial pattern", "rib fracture"),
    *("right sided aortic arch", "round atelectasis", "sclerotic bone lesion", "scoliosis"),
    *("segmental atelectasis", "single chamber device", "soft tissue mass"),
    *("sternoclavicular junction hypertrophy", "sternotomy", "subacromial space narrowing"),
    *("subcutaneous emphysema", "superior mediastinal enlargement", "supra aortic elongation"),
    *("surgery", "surgery breast", "surgery heart", "surgery humeral", "surgery lung"),
    *("surgery neck", "suture material", "thoracic cage deformation", "total atelectasis"),
    *("tracheal shift", "tracheostomy tube", "tuberculosis", "tuberculosis sequelae"),
    *("vascular hilar enlargement", "vascular redistribution", "ventriculoperitoneal drain tube"),
    *("vertebral anterior compression", "vertebral compression", "vertebral degenerative changes"),
    *("vertebral fracture", "volume loss"),
)
EXCLUDED = "exclude"
# Labels that say nothing of what is seen; a film with no others has no known labels.
NOT_FINDINGS = ("", "nan", "unchanged", "suboptimal study")
ITEM_OF_LIST = re.compile(r"'([^']*)'|\"([^\"]*)\"")
METHODS = ("all", "physician")

FACTS = Facts(
    name="padchest",
    title="PadChest",
    content="160,861 films of 67,625 patients, 109,931 studies, 190 labels, reports in Spanish",
    page="bimcv.cipf.es/bimcv-projects/padchest",
    licence="research use, after a request; redistribution is forbidden",
    citation="Bustos et al., Medical Image Analysis 2020",
    files=f"{TABLE} (or .gz) and the unpacked archives, one folder each: 0/ to 50/, 54/",
    provides=("labels", "reports"),
    patients="the column PatientID",
    splits={
        BY_HASH: "there is no official division, so a hash of the patient decides. Patients of val "
        "and test of PadChest-GR are left out of train if its master table is there"
    },
    defects=(
        "reports are in lower case and reduced to the stems of their words; 17 are missing",
        "39,053 films are labelled by physicians, the others by a network that read the report",
        "many labels have blanks around them; 777 lists are empty but for a blank, 103 are `nan`",
        "3,603 films have the label `unchanged` alone, which tells no finding: none is known",
        "1,312 films have the label `exclude`, and eleven the projection EXCLUDE; both are dropped",
        "about twenty files are missing or cut off",
        "274 films are of children",
        "the films of PadChest-GR are among these",
    ),
    counts={"images": 160_861, "patients": 67_625, "studies": 109_931},
    findings=FINDINGS,
)


@dataclasses.dataclass(eq=False)
class PadchestConfig(PublicConfig):
    """Where PadChest was downloaded to, and what becomes of it."""

    facts: ClassVar[Facts] = FACTS
    places: ClassVar[tuple[str, ...]] = ("padchest_gr",)

    # Folder of PadChest-GR, whose patients of val and test are left out of train ("": the source).
    padchest_gr: str = ""
    # Whether train has these patients.
    keep_evaluated: bool = False
    # `physician` uses the 39,053 films that physicians labelled, as CheXzero and KAD do.
    labelled_by: str = "all"

    def __post_init__(self) -> None:
        """Raises UserError if a value is out of range."""
        super().__post_init__()
        if self.labelled_by not in METHODS:
            raise UserError(
                f"labelled_by {self.labelled_by!r} of dataset {FACTS.name} is unknown; use one of "
                f"{', '.join(METHODS)}"
            )


def read_items(source: SourceFolder, config: PadchestConfig) -> Iterator[Item]:
    """Yields the films of the table."""
    table = source.require(TABLE)
    evaluated: Set[str] = frozenset()
    if not config.keep_evaluated:
        evaluated = padchest_gr.find_evaluated_patients(source, config.padchest_gr)
    folders: dict[str, str] = {}
    unknown = Counter[str]()
    columns = ("ImageID", "ImageDir", "StudyID", "PatientID", "Projection", "Labels")
    optional = ("Report", "MethodLabel", "BitsStored_DICOM")
    for row in source.read_csv(table, columns, optional=optional):
        name, projection = row["ImageID"], row["Projection"]
        labels = parse_list(row["Labels"])
        if projection == "EXCLUDE" or EXCLUDED in labels:
            source.drop("PadChest excludes it", name)
            continue
        patient_id = row["PatientID"]
        split = assign_by_hash(patient_id, config.val_fraction, config.test_fraction)
        if split == "train" and patient_id in evaluated:
            source.drop("its patient is in val or test of PadChest-GR", name)
            continue
        unknown.update(label for label in labels if label not in (*FINDINGS, *NOT_FINDINGS))
        if config.labelled_by == "physician" and row["MethodLabel"] != "Physician":
            source.drop("not labelled by a physician", name)
            continue
        bits = row["BitsStored_DICOM"]
        yield Item(
            image_id=name,
            image=f"{_find_folder(source, row['ImageDir'], name, folders)}/{name}",
            patient_id=patient_id,
            study_id=row["StudyID"],
            split=split,
            view=VIEWS.get(projection, "UNKNOWN"),
            labels=_read_labels(labels),
            sections={"report": row["Report"]},
            bit_depth=int(bits) if bits.isdecimal() and 8 <= int(bits) <= 16 else 0,
        )
    for label, number in unknown.items():
        source.note(
            f"label {quoting.quote_name(label, number)} of {quoting.count(number, 'film')} is none "
            "of PadChest's findings, and is not used"
        )


def parse_list(text: str) -> tuple[str, ...]:
    """Returns the items of a list that Python has printed, without blanks around them.

    >>> parse_list("['pacemaker', ' cardiomegaly']"), parse_list("nan")
    (('pacemaker', 'cardiomegaly'), ())
    """
    return tuple((one or other).strip() for one, other in ITEM_OF_LIST.findall(text))


def _read_labels(labels: tuple[str, ...]) -> Mapping[str, int]:
    """Returns the labels of a film; none is known if no label is a finding."""
    if all(label in NOT_FINDINGS for label in labels):
        return {}
    return {finding: int(finding in labels) for finding in FINDINGS}


def _find_folder(source: SourceFolder, number: str, name: str, folders: dict[str, str]) -> str:
    """Returns the folder of an image: that of its archive, or one of all images.

    Raises:
      UserError: the archive is there and not unpacked.
    """
    if number not in folders:
        folder = source.find_folder(number)
        if not folder:
            if archive := source.find(f"{number}.zip"):
                raise UserError(
                    f"{archive} in {source.root} is not unpacked; unpack it into a folder "
                    f"{number}, and all others likewise"
                )
            folder = source.find(name).rpartition("/")[0]
        folders[number] = folder or number
    return folders[number]


class Padchest(PublicBuilder):
    """Builds PadChest."""

    VERSION = tfds.core.Version("1.0.0")
    facts = FACTS
    builder_config: PadchestConfig

    def read_items(self, source: SourceFolder) -> Iterator[Item]:
        """Yields the films of the table."""
        return read_items(source, self.builder_config)
