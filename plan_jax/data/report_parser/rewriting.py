"""False variants of a report: the same text but for one claim, which contradicts the report.

A model that reads prefers the report to its variant; one that only counts findings cannot tell
them apart. The kinds:

- `laterality`: left and right are exchanged in the whole report.
- `negation`: one sentence that states findings denies one (`stated`), or one that denies findings
  states them (`denied`).
- `severity`: one word of size or severity is exchanged for one from the other end of its scale.
- `region`: the zones of one sentence are exchanged, upper for lower.

Rules over words propose variants, and the parser decides: a variant counts only if the claims of
its sentence, or of the text for laterality, differ as its kind says. So a sentence that the rules
do not understand is left out rather than made into another true one. So are statements about a
change, which one image cannot tell. What no report says, as that both lungs have a nodule while
only one is described, the parser cannot know.

Ours. The idea of a caption that is wrong in one word is that of FOIL (Shekhar et al., arXiv
1705.01359).
"""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

from plan_jax.data import report_parser
from plan_jax.data.report_parser.places import expand_regions
from plan_jax.data.report_parser.sentences import MAX_LENGTH, Claim, Sentence, parse_sentence
from plan_jax.data.sections import sides
from plan_jax.data.tokenizer import split_sentences
from plan_jax.types import ReportVariant

CACHED_REPORTS = 2**14  # a report takes about 20 ms, and a run reads it once an epoch
Claims = tuple[Claim, ...]


def find_variants(
    text: str, kind: str, findings: tuple[str, ...] = (), report: str = ""
) -> tuple[ReportVariant, ...]:
    """Returns all variants of a report of one kind; () if it has no claim of that kind.

    >>> [v.text for v in find_variants("No nodule. Small effusion on the left.", "negation")]
    ['Nodule. Small effusion on the left.', 'No nodule. No small effusion on the left.']
    >>> find_variants("Small effusion on the left.", "severity")[0].text
    'Large effusion on the left.'
    >>> find_variants("Small effusions on both sides.", "laterality")
    ()

    Args:
      text: a report, in English.
      kind: one of `VARIANT_KINDS`.
      findings: names of a dataset's findings. If the parser knows any of them, variants about other
        findings are left out: a phantom's report also speaks of fractures, which no phantom has.
      report: the whole report, where the text is a part of it: what it states is not false.

    Raises:
      KeyError: the kind is unknown.
    """
    covered, variants = _cover(findings), _find_all(text, kind, report or text)
    return tuple(variant for variant in variants if covered >= {*variant.findings})


@lru_cache(CACHED_REPORTS)
def _find_all(text: str, kind: str, report: str) -> tuple[ReportVariant, ...]:
    return tuple(dict.fromkeys(_FINDERS[kind](text, _claims_of(report))))


@lru_cache(8)
def _cover(names: tuple[str, ...]) -> frozenset[str]:
    """Returns the parser's findings that names cover; all of them if it knows no name."""
    known = [name for name in names if report_parser.is_known_finding(name)]
    covered = {finding for name in known for finding in report_parser.covered_findings(name)}
    return frozenset(covered or report_parser.FINDINGS)


# The kinds ---------------------------------------------------------------------------------------
# Each finder has a text and the claims of the whole report.


def _exchange_sides(text: str, known: Claims) -> Iterator[ReportVariant]:
    mirrored = sides.swap_sides(text)
    # Nobody has a left middle lobe: such a text is false without any image.
    if mirrored == text or _ONE_SIDED.search(text):
        return
    misplaced = _misplaced_findings(_claims_of(mirrored), known)
    if misplaced:
        yield ReportVariant(mirrored, "laterality", misplaced)


def _negate(text: str, known: Claims) -> Iterator[ReportVariant]:
    for place in _locate_sentences(text):
        sentence = place.sentence
        # One image cannot tell a change, and rules break what begins with a number.
        if _CHANGE.search(sentence) or sentence[:1].isdigit():
            continue
        before = parse_sentence(sentence)
        plain = _lower_first(sentence)
        for part, old, new, apply in (("stated", 1, 0, _deny), ("denied", 0, 1, _affirm)):
            can_change = any(existence == old for _, _, existence in before)
            for changed_sentence in apply(plain) if can_change else ():
                changed = _changed_existence(before, parse_sentence(changed_sentence))
                if not changed or any(change != (old, new) for change in changed.values()):
                    continue
                if _denies_another(changed_sentence):
                    continue
                # "No nodule" made "nodule" is true if the report has a nodule somewhere else.
                mentioned = {finding for _, finding, existence in known if existence != 0}
                if new and mentioned & changed.keys():
                    continue
                variant = place.replace(_match_case(changed_sentence, sentence))
                yield ReportVariant(variant, part, tuple(changed))
                break  # the rules are in order: the first one that is accepted reads best


def _exchange_grades(text: str, known: Claims) -> Iterator[ReportVariant]:
    for place in _locate_sentences(text):
        sentence = place.sentence
        claims = parse_sentence(sentence)
        if any(existence != 1 for _, _, existence in claims):
            continue
        parsed = Sentence(sentence)
        # The words of a parsed sentence are those of the original, in lower case.
        grades = zip(_GRADE.finditer(sentence), _GRADE.finditer(parsed.text), strict=False)
        for match, graded in grades:
            findings = _graded_findings(parsed, graded)
            changed_sentence = _exchange_word(sentence, match, _GRADES[match[0].lower()])
            if findings and parse_sentence(changed_sentence) == claims:
                yield ReportVariant(place.replace(changed_sentence), "severity", findings)


def _exchange_zones(text: str, known: Claims) -> Iterator[ReportVariant]:
    for place in _locate_sentences(text):
        sentence = place.sentence
        zones = list(_ZONE.finditer(sentence))
        if len(zones) != 1 or _NOT_A_ZONE.search(sentence):
            continue
        (zone,) = zones
        changed_sentence = _exchange_word(sentence, zone, _ZONES[zone[0].lower()])
        before, after = parse_sentence(sentence), parse_sentence(changed_sentence)
        same_findings = [claim[1:] for claim in before] == [claim[1:] for claim in after]
        same_denials = {c for c in before if c[2] != 1} == {c for c in after if c[2] != 1}
        misplaced = _misplaced_findings(after, known)
        if same_findings and same_denials and misplaced:
            yield ReportVariant(place.replace(changed_sentence), "region", misplaced)


_FINDERS: dict[str, Callable[[str, Claims], Iterator[ReportVariant]]] = {
    "laterality": _exchange_sides,
    "negation": _negate,
    "severity": _exchange_grades,
    "region": _exchange_zones,
}


# Rules over words --------------------------------------------------------------------------------

_WORDS = re.IGNORECASE | re.ASCII
_ONE_SIDED = re.compile(r"\b(?:middle lobe|lingula\w*|rml)\b", _WORDS)
_CHANGE = re.compile(
    r"\b(?:(?:un)?chang\w*|stable|stabil\w+|increas\w*|decreas\w*|improv\w*|worse\w*|resol\w+"
    r"|progress\w*|regress\w*|persist\w*|remain\w*|again|interval|prior|previous\w*|compar\w*"
    r"|new|newly|recent\w*|(?:no )?longer|larger|smaller|greater|less|more|clear(?:ed|ing)"
    r"|develop\w*|since|only|volumes?)\b",
    _WORDS,
)
_SEEN = (
    "noted|seen|present|identified|demonstrated|visible|visuali[sz]ed|evident|detected|found"
    "|appreciated"
)
_ARTICLE = r"(?:(?:an?|some|the)\s+)?"
# A verb, or a negation that another one would contradict.
_NOT_A_PHRASE = (
    r"is|are|was|were|be|has|have|had|appears?|remains?|seems?|shows?|demonstrates?|may|might|can"
    r"|could|no|not|without|never|nor|neither|than"
)
_RULES_DENY = (
    (rf"\b(there\s+(?:is|are))\s+(?!no\b|not\b|also\b){_ARTICLE}", r"\1 no "),
    (rf"\b((?:is|are|was|were)\s+)(?=(?:{_SEEN})\b)", r"\1not "),
    (r"\b((?:is|are|appears?)\s+)(?=(?:\w+ly\s+)?(?:enlarged|widened|prominent)\b)", r"\1not "),
    (rf"^(?!.*\b(?:{_NOT_A_PHRASE})\b){_ARTICLE}", "no "),
)
_EVIDENCE = r"(?:(?:definite|convincing|radiographic)\s+)?(?:(?:evidence|signs?)\s+of\s+)?"
_RULES_AFFIRM = (
    (rf"\b(there\s+(?:is|are))\s+no\s+{_EVIDENCE}", r"\1 "),
    (rf"^\s*no\s+{_EVIDENCE}", ""),
    (r"\b((?:is|are|was|were)\s+)not\s+", r"\1"),
    (rf"(?<!is )(?<!are )(?<!was )(?<!were )\bwithout\s+{_EVIDENCE}", "with "),
)


def _apply(rules: tuple[tuple[str, str], ...]) -> Callable[[str], Iterator[str]]:
    """Returns a function that yields a sentence after each rule that changes it."""
    compiled = [(re.compile(pattern, _WORDS), new) for pattern, new in rules]

    def apply(sentence: str) -> Iterator[str]:
        for pattern, new in compiled:
            variant = pattern.sub(new, sentence, count=1)
            if variant == sentence:
                continue
            if not re.search(r"\bnor\b", variant):
                yield variant
            # Of "nodule or effusion" neither is stated, as the parser reads it.
            yield re.sub(r"\bn?or\b", "and", variant)

    return apply


_deny, _affirm = _apply(_RULES_DENY), _apply(_RULES_AFFIRM)

# "No thin patient with effusion" denies the patient.
_ANOTHER = re.compile(r"\b(?:with|for|from|due|patient|heart|cardiac|lungs?)\b")


def _denies_another(sentence: str) -> bool:
    """Returns whether a sentence begins with a denial of something that is not its finding."""
    if not sentence.startswith("no "):
        return False
    parsed = Sentence(sentence)
    end = parsed.mentions[0].start if parsed.mentions else len(parsed.text)
    return _ANOTHER.search(parsed.text, 0, end) is not None


# A word of size or severity -> one from the other end of its scale.
_GRADES = {
    "small": "large",
    "tiny": "large",
    "trace": "large",
    "minimal": "extensive",
    "minor": "extensive",
    "mild": "severe",
    "mildly": "markedly",
    "slight": "marked",
    "slightly": "markedly",
    "subtle": "dense",
    "borderline": "marked",
    "thin": "thick",
    "large": "small",
    "massive": "small",
    "dominant": "tiny",
    "extensive": "minor",
    "dense": "subtle",
    "severe": "mild",
    "severely": "mildly",
    "marked": "mild",
    "markedly": "mildly",
    "thick": "thin",
    "broad": "thin",
}
# "Small to moderate" is a range, which one word does not change.
_GRADE = re.compile(
    rf"(?<!to )(?<!-)\b(?:{'|'.join(_GRADES)})\b(?!\s*(?:to|or|and)\b|\s*[-/])", _WORDS
)
# Between a grade and its finding: "small amount of pleural fluid", "large left pleural effusion".
_BETWEEN_GRADE = re.compile(
    r"(?:\s+(?:amounts?|areas?|degrees?|focus|foci)\s+of)?(?:\s+(?!(?:with|and|or|in|on|at|of|to"
    r"|from|for|than|patient|bore|bowel|lungs?|heart|vessels?|increas\w*|decreas\w*)\b)[\w-]+){0,2}"
    r"\s*",
    _WORDS,
)
_ZONES = {
    "upper": "lower",
    "lower": "upper",
    "mid": "upper",
    "middle": "upper",
    "base": "apex",
    "bases": "apices",
    "basal": "apical",
    "basilar": "apical",
    "bibasilar": "biapical",
    "bibasal": "biapical",
    "apex": "base",
    "apices": "bases",
    "apical": "basal",
    "biapical": "bibasal",
}
_ZONE = re.compile(rf"\b(?:{'|'.join(_ZONES)})\b", _WORDS)
_NOT_A_ZONE = re.compile(
    r"\b(?:limits?|svc|spine|spinal|thoracic|lumbar|cervical|abdom\w*|quadrants?|ribs?|neck"
    r"|mediastin\w*|esophag\w*|extremit\w*)\b",
    _WORDS,
)


def _graded_findings(sentence: Sentence, match: re.Match[str]) -> tuple[str, ...]:
    """Returns the findings that a word of a parsed sentence grades: within it, or just before."""
    return tuple(
        mention.label
        for mention in sentence.mentions
        if mention.start <= match.start() < mention.end
        or (
            match.end() <= mention.start
            and _BETWEEN_GRADE.fullmatch(sentence.text, match.end(), mention.start)
        )
    )


def _exchange_word(sentence: str, match: re.Match[str], word: str) -> str:
    """Returns a sentence with one word exchanged, and the article before it made to fit."""
    before = sentence[: match.start()]
    article = re.search(r"\ban?(?=\s+$)", before, _WORDS)
    if article:
        fitting = _match_case("an" if word[0] in "aeiou" else "a", article[0])
        before = before[: article.start()] + fitting + before[article.end() :]
    return before + _match_case(word, match[0]) + sentence[match.end() :]


def _match_case(text: str, model: str) -> str:
    """Returns a text in capitals, or with a first capital, if the model has them."""
    if len(model) > 1 and model.isupper():
        return text.upper()
    return text[:1].upper() + text[1:] if model[:1].isupper() else text


def _lower_first(sentence: str) -> str:
    """Returns a sentence without its first capital; an abbreviation, as LLL, stays."""
    return sentence[:1].lower() + sentence[1:] if sentence[1:2].islower() else sentence


# Claims ------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """A sentence of a report, and where it lies."""

    text: str
    start: int
    end: int

    @property
    def sentence(self) -> str:
        """Returns the sentence as written in the report."""
        return self.text[self.start : self.end]

    def replace(self, sentence: str) -> str:
        """Returns the report with another sentence here."""
        return self.text[: self.start] + sentence + self.text[self.end :]


def _locate_sentences(text: str) -> Iterator[_Place]:
    """Yields the sentences of a report that make claims, without a header as `FINDINGS:`.

    Left out are sentences of more than `MAX_LENGTH` characters, which are lists without full stops,
    and those whose claims depend on what precedes them.
    """
    claims: dict[int, list[Claim]] = {}
    for statement in report_parser.parse_report(text):
        claims.setdefault(statement.sentence_index, []).append(statement[2:])
    position = 0
    for index, sentence in enumerate(split_sentences(text)):
        pattern = r"\s+".join(map(re.escape, sentence.split()))
        match = re.compile(pattern).search(text, position)
        assert match is not None, "a sentence is a part of its text"
        position = match.end()
        if index not in claims or len(sentence) > MAX_LENGTH:
            continue
        header = report_parser.HEADER.match(text, match.start(), position)
        start = match.start() if header is None else header.end()
        start = position - len(text[start:position].lstrip())
        place = _Place(text, start, position)
        if list(parse_sentence(place.sentence)) == claims[index]:
            yield place


def _claims_of(text: str) -> Claims:
    return report_parser.extract_triplets(text)


def _misplaced_findings(after: Claims, claims: Claims) -> tuple[str, ...]:
    """Returns the findings that are stated now where the report's claims do not have them."""
    stated = [(region, finding) for region, finding, existence in claims if existence != 0]
    misplaced = (
        finding
        for region, finding, existence in after
        if existence == 1
        and not any(finding == known and _overlap(region, place) for place, known in stated)
    )
    return tuple(dict.fromkeys(misplaced))


def _overlap(first: str, second: str) -> bool:
    """Returns whether two regions have a part in common, as `left lung` and `left upper zone`.

    `chest`, where a report names no place, may be anywhere.
    """
    if "chest" in (first, second):
        return True
    return any(
        a == b or (a.endswith("lung") or b.endswith("lung")) and a.split()[0] == b.split()[0]
        for a in expand_regions([first])
        for b in expand_regions([second])
    )


def _changed_existence(before: Claims, after: Claims) -> dict[str, tuple[int, int]]:
    """Returns the findings of a sentence whose existence changed; none if other findings appear.

    A denial holds everywhere and a statement somewhere, so regions are not compared.
    """
    old, new = _existence_of(before), _existence_of(after)
    if old is None or new is None or old.keys() != new.keys():
        return {}
    return {name: (old[name], new[name]) for name in old if old[name] != new[name]}


def _existence_of(claims: Claims) -> dict[str, int] | None:
    """Returns the existence of each finding of a sentence; None if it says two things of one."""
    values: dict[str, int] = {}
    for _, finding, existence in claims:
        if values.setdefault(finding, existence) != existence:
            return None
    return values
