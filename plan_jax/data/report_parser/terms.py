"""Tables of findings of the report parser: synonyms, expressions of normality, section names.

Patterns are regular expressions over lower-case text; a space stands for spaces or a hyphen.
`sentences.py` compiles and applies them. To add a synonym, add it here. Negation and doubt are in
`cues.py`.
"""

# The forty tags of ASG (arXiv 2403.09294), as its paper spells them.
ASG_TAGS = (
    "pleural effusion",
    "opacity",
    "pneumothorax",
    "edema",
    "atelectasis",
    "tube",
    "consolidation",
    "enlarged cardiomediastinum",
    "tip",
    "pneumonia",
    "line",
    "cardiomegaly",
    "fracture",
    "calcification",
    "device",
    "engorgement",
    "nodule",
    "wire",
    "pacemaker",
    "pleural thicken",
    "marking",
    "scar",
    "hyperinflate",
    "blunt",
    "collapse",
    "emphysema",
    "aerate",
    "mass",
    "infiltration",
    "obscure",
    "deformity",
    "hernia",
    "drainage",
    "distention",
    "shift",
    "stent",
    "lesion",
    "hardware",
    "dilation",
    "aspiration",
)

# Between a subject and its adjective: a verb, and adverbs.
_IS = r"(?: (?:is|are|was|were|be|being|appears?|remains?|seems?|has|have|been|to|now|not|again))*"
_HOW = r"(?: (?!and |or |but |with |normal)[a-z]+){0,3}?"  # "moderately", "slightly more"
_HEART = r"(?:heart(?: size)?|cardiac (?:silhouette|shadow|size|contours?))"
_LARGE = r"(?:enlarged|prominent|increased|large|big|enlargement)"
_WIDE = r"(?:widen(?:ed|ing)|enlarge(?:d|ment))"
_CARDIOMEDIASTINAL = r"cardio ?mediastinal (?:silhouettes?|contours?|shadow)"
_MEDIASTINUM = r"(?:mediastinum|mediastinal (?:contours?|silhouettes?|shadow))"
_ANGLE = r"(?:(?:costo ?phrenic|cardiophrenic|cp) (?:angles?|sulc[ui]s?|recess(?:es)?)|sulc[ui]s?)"

# What reports call each canonical finding. Where two patterns match, the longer match counts.
TERMS: dict[str, tuple[str, ...]] = {
    "consolidation": (
        r"consolidat(?:ions?|ive (?:change|process|opacity|opacities)|ed)",
        r"(?:air ?space|alveolar) (?:opacit(?:y|ies)|opacifications?|disease|process"
        r"|consolidations?)",
        r"pneumonic (?:change|consolidation|opacity)s?",
    ),
    "nodule": (
        r"(?:pulmonary |lung )?(?:micro)?nodules?",
        r"nodular (?:opacit(?:y|ies)|densit(?:y|ies))",
        r"rounded lesions?",
        r"nodularity",
        r"(?:rounded|round) (?:opacity|density)",
    ),
    "pleural effusion": (
        r"(?:pleural )?effusions?",
        r"pleural fluid",
        r"hydro ?(?:pneumo)?thorax",
        r"hemothorax",
        r"haemothorax",
        r"fluid in the [a-z ]{0,12}(?:fissures?|pleural space)",
    ),
    "pneumothorax": (
        r"(?:hydro|haemo|hemo)?pneumothora(?:x|ces|xes)",
        r"pleural air(?: collections?)?",
    ),
    "cardiomegaly": (
        r"cardiomegaly",
        r"(?:cardiac|heart) enlargement",
        r"enlargement of the heart",
        r"enlargement of (?:the )?cardiac silhouette",
        r"cardiac silhouette enlargement",
        rf"{_HEART}{_HOW}{_IS}{_HOW} {_LARGE}",
        rf"enlarged{_HOW} {_HEART}",
        r"borderline (?:heart size|cardiac size|enlarged heart)",
        rf"{_HEART}{_IS} borderline",
        rf"(?:prominent|large) {_HEART}",
    ),
    "linear atelectasis": (
        r"(?:linear|plate|plate ?like|discoid|band ?like) (?:[a-z]+ )?atelecta(?:sis|ses"
        r"|tic changes?)",
        r"bands? of (?:collapse|atelectasis)",
    ),
    "atelectasis": (r"atelecta(?:sis|ses|tic(?: changes?)?)",),
    "pulmonary oedema": (
        r"(?:pulmonary |interstitial |alveolar |vascular )?o?edema",
        r"(?:pulmonary |central )?(?:vascular|venous) congestion",
        r"pulmonary congestion",
        r"(?:vascular|fluid) overload",
        r"vascular congestive changes?",
    ),
    "pacemaker": (
        r"pace ?makers?(?: leads?| wires?)?",
        r"pacing (?:device|wire|lead)s?",
        r"pacer",
        r"cardiac device",
        r"aicd",
        r"icd",
    ),
    "opacity": (
        r"opacit(?:y|ies)",
        r"opacifications?",
        r"opacified",
        r"densit(?:y|ies)",
        r"opaque areas?",
        r"haz(?:e|iness)",
    ),
    "tube": (
        r"(?:endotracheal|nasogastric|orogastric|enteric|feeding|chest|tracheostomy|et|ng) tubes?",
        r"tubes?",
        r"tracheostomy",
        r"dobbhoff(?: tube)?",
    ),
    "enlarged cardiomediastinum": (
        rf"{_WIDE} of (?:the )?mediastinum",
        rf"mediastinal {_WIDE}",
        rf"{_WIDE} mediastinum",
        rf"{_MEDIASTINUM}{_IS}{_HOW} (?:widened|enlarged|prominent|wide)",
        rf"{_CARDIOMEDIASTINAL}{_IS}{_HOW} {_LARGE}",
        rf"(?:enlarged|prominent|widened) {_CARDIOMEDIASTINAL}",
        r"prominent mediastinum",
        r"enlarged cardio ?mediastinum",
    ),
    "tip": (r"tips?",),
    "pneumonia": (r"(?:broncho)?pneumonias?", r"pneumonitis"),
    "line": (
        r"lines?",
        r"catheters?",
        r"picc(?: line)?",
        r"port a cath",
        r"portacath",
        r"mediports?",
        r"shunt(?: catheters?| tubing)?",
        r"tubing",
        r"(?:central venous|subclavian|jugular|infusion|chest) ports?",
        r"port",
    ),
    "fracture": (r"fractures?", r"fractured"),
    "calcification": (
        r"calcifi(?:cations?|ed)(?: (?:granulomas?|nodes?|lymph nodes?))?",
        r"calcific",
        r"atheroscleros(?:is|es)",
        r"atherosclerotic(?: [a-z]+)?",
        r"calcinosis",
    ),
    "device": (
        r"(?:support |medical |monitoring )?devices?",
        r"(?:nerve |spinal cord )?stimulators?",
    ),
    "engorgement": (
        r"engorge(?:ment|d)",
        r"cephali[sz]ation",
        r"vascular redistribution",
        r"(?:pulmonary |central )*vascul(?:ar|ature|arity) (?:is "
        r"|are )?(?:\w+ly )?prominen(?:ce|t)",
        r"prominen(?:ce|t)(?: of)?(?: the)? (?:pulmonary |central )*vascul(?:ature|arity)",
    ),
    "wire": (r"wires?", r"cerclage"),
    "pleural thicken": (
        r"(?:pleural|pleuro parenchymal|apical)(?: [a-z]+)? (?:thicken(?:ing|ed)?|caps?)",
        r"thicken(?:ed|ing) (?:of the )?pleura",
        r"pleural (?:plaques?|scarring)",
        r"fissural thickening",
    ),
    "marking": (
        r"(?:interstitial|broncho ?vascular|lung|vascular|pulmonary|bronchial|peribronchial)"
        r"(?: lung)? markings",
        r"markings?",
        r"prominen(?:ce of the|t) interstitium",
        r"(?:interstitial|reticul(?:ar|onodular))(?: lung)? (?:prominence|thickening|pattern)",
        r"(?:broncho ?(?:vascular|pulmonary)|vascular|mild|with|interstitial) crowding",
        r"crowding of [a-z ]{0,30}(?:markings|vascul[a-z]+|vessels|structures)",
    ),
    "scar": (r"scar(?:s|ring|red)?", r"cicatri(?:x|ces)", r"fibro(?:sis|tic(?: changes?)?)"),
    "hyperinflate": (
        r"hyper ?(?:inflat|expan|aerat|disten)[a-z]*",
        r"over ?(?:inflat|expan)[a-z]*",
        r"air trapping",
        r"flatten(?:ed|ing)(?: of the)?(?: [a-z]+)? (?:hemi)?diaphragms?",
        r"(?:hemi)?diaphragms?{is}{how} flattened",
    ),
    "blunt": (r"blunt(?:ed|ing)?",),
    "collapse": (r"collapsed?",),
    "emphysema": (
        r"emphysema(?:tous)?(?: changes?| disease)?",
        r"copd",
        r"(?:chronic )?obstructive lung disease",
        r"chronic obstructive (?:pulmonary|lung) disease",
        r"bull(?:ous|ae?)",
    ),
    "aerate": (r"aerat(?:ed?|ion)",),
    "mass": (
        r"masses",
        r"mass",
        r"mass like (?:opacity|density|lesion)",
        r"tumou?rs?",
        r"neoplasm",
    ),
    "infiltration": (r"infiltrat(?:es?|ions?|ive)",),
    "obscure": (r"obscur(?:ed?|es|ing|ation)",),
    "deformity": (r"deformit(?:y|ies)", r"deformed", r"wedging", r"compression deformit(?:y|ies)"),
    "hernia": (r"hernias?", r"herniation"),
    "drainage": (r"drain(?:s|age)?", r"pigtail(?: catheters?)?"),
    "distention": (r"disten(?:ded|sion|tion)",),
    "shift": (
        r"(?:mediastinal |tracheal )?shift(?:ed)?",
        r"tracheal deviation",
        r"trachea{is} deviated",
    ),
    "stent": (r"stents?",),
    "lesion": (r"lesions?",),
    "hardware": (
        r"hardware",
        r"(?:orthopa?edic|surgical|fixation|fusion) (?:plates?|screws?|rods?)",
        r"(?:spinal|surgical) fusion",
    ),
    "dilation": (r"dilat(?:ed|ion|ation)", r"ecta(?:sia|tic)", r"aneurysm(?:al)?"),
    "aspiration": (r"aspirations?",),
}
TERMS = {
    name: tuple(p.replace("{is}", _IS).replace("{how}", _HOW) for p in patterns)
    for name, patterns in TERMS.items()
}
# Words that look like a finding but are not one.
NOT_FINDINGS = (
    r"(?:in|on|along) line",
    r"midline",
    r"baseline",
    r"lead apron",
    r"line of",
    r"subcutaneous emphysema",
    r"pericardial effusions?",
    r"joint effusions?",
    r"bone densit(?:y|ies)",
    r"density of the bones?",
    r"muscle mass",
    r"lung fields?",
    r"pulmonary arterial",
    r"mass effect",
    r"soft tissue edema",
    r"drain(?:ing|age) of",
    r"nipple shadow",
    r"scarred? down",
    r"mineral density",
    r"clear of tubes?",
    r"lines? and markings? of",
    r"bone mineral",
    r"stented",
    r"(?:kerley )?b lines?",
)

# Further names of findings that `label_findings` accepts, and the findings that each covers.
COVERED_FINDINGS: dict[str, tuple[str, ...]] = {
    "edema": ("pulmonary oedema",),
    "oedema": ("pulmonary oedema",),
    "pulmonary edema": ("pulmonary oedema",),
    "effusion": ("pleural effusion",),
    "atelectasis": ("atelectasis", "linear atelectasis"),
    "lung opacity": (
        "opacity",
        "consolidation",
        "pneumonia",
        "infiltration",
        "atelectasis",
        "linear atelectasis",
        "pulmonary oedema",
        "nodule",
        "mass",
    ),
    "lung lesion": ("lesion", "nodule", "mass"),
    "pleural thickening": ("pleural thicken",),
    "infiltrate": ("infiltration",),
    "hyperinflation": ("hyperinflate",),
    "support devices": (
        "tube",
        "line",
        "pacemaker",
        "device",
        "wire",
        "hardware",
        "stent",
        "drainage",
    ),
}

# Where findings lie: in the heart, in a whole lung, on the wall or in the middle of the chest; all
# others lie in a zone of a lung. Diffuse findings lie in both lungs if the report names no place.
HEART_FINDINGS = {"cardiomegaly"}
LUNG_FINDINGS = {"pleural effusion", "pneumothorax"}
CHEST_FINDINGS = {
    "pacemaker",
    "tube",
    "tip",
    "line",
    "device",
    "fracture",
    "wire",
    "stent",
    "hardware",
    "hernia",
    "enlarged cardiomediastinum",
    "deformity",
    "drainage",
    "shift",
    "dilation",
}
DIFFUSE_FINDINGS = {
    "pulmonary oedema",
    "hyperinflate",
    "emphysema",
    "marking",
    "engorgement",
    "aerate",
}

# What may be called normal, and the findings that this denies. For the eight kinds of the phantom
# these are the first two kinds that a sentence of `report_text.NORMAL` contradicts.
NORMAL_SUBJECTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"heart(?: size)?|cardiac (?:silhouettes?|shadow|size|contours?)|cardiac", ("cardiomegaly",)),
    (_CARDIOMEDIASTINAL, ("cardiomegaly", "enlarged cardiomediastinum")),
    (_MEDIASTINUM + r"|mediastinal", ("enlarged cardiomediastinum",)),
    (r"(?:pulmonary )?vascul(?:ature|arity)|pulmonary vessels", ("pulmonary oedema",)),
    (r"lungs?(?: fields?)?|zones?|lobes?|bases|apices", ("consolidation", "nodule")),
    (_ANGLE, ("pleural effusion",)),
    (r"pleural spaces?|pleura", ("pleural effusion", "pneumothorax")),
    (
        r"bones?|osseous structures?|bony (?:thorax|structures?)|ribs|skeletal structures",
        ("fracture",),
    ),
)
NORMAL_WORDS = (
    r"normal(?!ly)",
    r"clear(?! of)",
    r"unremarkable",
    r"sharp",
    r"intact",
    r"within limits",
    r"not (?:\w+ly )?(?:enlarged|widened|blunted)",
    r"well defined",
    r"negative",
)
NOT_NORMAL = (
    r"upper limits? of normal",
    r"top normal",
    r"upper normal",
    r"not (?:\w+ )?(?:normal|clear|sharp)",
    r"normally",
    r"limits? of (?:the )?normal(?= variant)",
    r"clear(?:ly|ed|ing|ance)",
    r"borderline normal",
    r"high normal",
    r"near normal",
)
# Sentences that call the lungs as a whole normal, and the findings that they deny.
ALL_CLEAR: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        r"no (?:evidence of )?(?:active|acute) (?:lung )?disease of the lungs",
        ("consolidation", "nodule"),
    ),
    (
        r"no (?:evidence (?:of|for) )?(?:an? )?(?:(?:acute|active|radiographic"
        r"|significant) (?:or )?)+"
        r"(?:cardio ?)?pulmonary (?:\w+ )?(?:disease|process|abnormalit|finding)\w*",
        ("consolidation", "pulmonary oedema"),
    ),
)

# Sections of a raw report that are not about this image, sections that are, and synonyms of names.
IGNORED_SECTIONS = (
    "indication",
    "technique",
    "comparison",
    "examination",
    "recommendation",
    "notification",
    "procedure",
    "type",
    "date",
)
PARSED_SECTIONS = ("findings", "impression")
SECTION_SYNONYMS = {
    "conclusion": "impression",
    "conclusions": "impression",
    "opinion": "impression",
    "summary": "impression",
    "history": "indication",
    "clinical history": "indication",
    "clinical information": "indication",
    "clinical indication": "indication",
    "reason for exam": "indication",
    "reason for examination": "indication",
    "reason for this examination": "indication",
    "indications": "indication",
    "exam": "examination",
    "study": "examination",
    "comparisons": "comparison",
    "finding": "findings",
    "report": "findings",
    "recommendations": "recommendation",
    "medical condition": "indication",
    "patient history": "indication",
    "views": "technique",
    "exam type": "examination",
    "compared to": "comparison",
}
