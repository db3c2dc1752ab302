"""The claims of one sentence of a report: which findings, where, denied or uncertain.

A cue acts forward to the next stop (`no`, `possible`) or backward (`cannot be excluded`). The
nearest cue decides, except that a negation absorbs a doubt within it (`no opacity to suggest`). A
place belongs to the finding next to it, or to all findings of a list.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from plan_jax.data.report_parser import cues as cues
from plan_jax.data.report_parser import terms as terms
from plan_jax.data.report_parser.places import (
    Place,
    compile_patterns,
    expand_regions,
    find_places,
    widen_regions,
)
from plan_jax.data.tokenizer import CACHE_SIZE

MAX_LENGTH = 600  # characters parsed at a time: the rules compare every finding with every cue
FORWARD_CUES = ("negation_before", "doubt_before", "weak_doubt", "not_about_image")

Claim = tuple[str, str, int]  # region, finding, existence
LabelledPatterns = list[tuple[str, re.Pattern[str]]]


class Span(NamedTuple):
    """A part of a sentence and its label: a finding, a kind of cue, a subject."""

    start: int
    end: int
    label: str


def _compile_table(rows: Iterable[tuple[str, Iterable[str]]]) -> LabelledPatterns:
    return [(label, compile_patterns(pattern)) for label, patterns in rows for pattern in patterns]


# Matches with an empty label are found, so that they displace others, and then dropped.
_MENTION_PATTERNS = _compile_table([*terms.TERMS.items(), ("", terms.NOT_FINDINGS)])
_CUE_PATTERNS = _compile_table(cues.CUES.items())
_STOP_PATTERN = compile_patterns(cues.STOPS)
_OPENER_PATTERN = compile_patterns(cues.OPENERS)
_CLAUSE_PATTERN = compile_patterns(cues.CLAUSE_STARTS)
_SUBJECT_PATTERNS = [
    (str(i), compile_patterns(pattern)) for i, (pattern, _) in enumerate(terms.NORMAL_SUBJECTS)
]
_NORMAL_PATTERNS = _compile_table([("normal", terms.NORMAL_WORDS), ("", terms.NOT_NORMAL)])
_ALL_CLEAR_PATTERNS = [(compile_patterns(pattern), absent) for pattern, absent in terms.ALL_CLEAR]
_VERB = compile_patterns(r"is|are|was|were|appears?|remains?|seems?|has|have|demonstrates?|shows?")
# Up to four adjectives between a place and its finding: "left basilar patchy streaky opacity".
_ADJECTIVES = re.compile(
    r"(?:[ -]+(?!(?:in|at|on|of|and|or|with|is|are|from|there|over|to)\b)[\w']+){0,4}"
    r"[ -]*"
)
_PREPOSITION = compile_patterns(
    r"in|at|on|over|within|of|involving|projecting|overlying|around|about|near|to|along|throughout"
    r"|seen|noted|present|through|from|via"
)
_HEART = compile_patterns(
    r"heart|cardiac|cardio ?mediastinal|cardiomegaly|ventric(?:le|ular)|atri(?:um|al)"
)
# "or" between two findings, unless it is "and/or" or a comma follows.
_ALTERNATIVE = re.compile(r"(?<!/)\bor\b(?!.*,)")
_OPACITY = compile_patterns(r"opacit\w+|opacifi\w+|densit\w+")
# Between a word like "normal" and its subject, and between two subjects.
_BEFORE_SUBJECT = re.compile(
    r"(?: (?:size|of|the|both|and|in|appearing|configuration|pulmonary|right|left))* ?"
)
_BETWEEN_SUBJECTS = re.compile(r"(?: size|,)*(?: and|,)(?: the)? ")


def _find_longest(text: str, patterns: LabelledPatterns) -> list[Span]:
    """Returns the matches in order; of two that overlap the longer, of two equal ones both."""
    spans = [
        Span(*match.span(), label)
        for label, pattern in patterns
        for match in pattern.finditer(text)
    ]
    spans.sort(key=lambda span: (span.start - span.end, span.start))
    longest: list[Span] = []
    for span in spans:
        if all(
            span.end <= longer.start
            or longer.end <= span.start
            or span[:2] == longer[:2] != span  # the same words with another label
            for longer in longest
        ):
            longest.append(span)
    return sorted(span for span in longest if span.label)


def _normalise(sentence: str) -> str:
    """Returns a sentence in lower case with plain hyphens, apostrophes and single spaces."""
    text = re.sub("[\u2010-\u2015\u2212]", "-", sentence.lower()).replace("\u2019", "'")
    return " ".join(text.replace("?", " ? ").split())


class Sentence:
    """A sentence with its findings (`mentions`), cues, stops and places."""

    def __init__(self, sentence: str):
        """Finds everything that the rules compare."""
        self.text = _normalise(sentence)
        self.mentions = _find_longest(self.text, _MENTION_PATTERNS)
        self.cues = [
            cue for cue in _find_longest(self.text, _CUE_PATTERNS) if cue.label != "no_cue"
        ]
        # A stop inside a cue is part of it.
        self.stops = [
            (start, end)
            for start, end in (match.span() for match in _STOP_PATTERN.finditer(self.text))
            if not any(cue.start < end and start < cue.end for cue in self.cues)
        ]
        clauses = [match.span() for match in _CLAUSE_PATTERN.finditer(self.text)]
        self.clause_starts = sorted([*self.stops, *clauses])
        self.openers = [match.span() for match in _OPENER_PATTERN.finditer(self.text)]
        self.places = find_places(self.text)

    def existence(self, index: int) -> int | None:
        """Returns whether mention `index` is stated (1), denied (0), uncertain (-1), or no claim.

        The rules, in this order:
          1. After an expression like `history of` it is no claim about the image (None).
          2. The nearest cue before it is a negation: denied.
          3. A negation comes before a doubt and absorbs it (`no opacity to suggest`): denied.
          4. A cue after it decides: denied, or uncertain.
          5. A doubt comes before it: uncertain. Otherwise it is stated.
        """
        mention = self.mentions[index]
        ends = [end for start, end in [*self.stops, *self.openers] if start < mention.start]
        scope_start = max(ends, default=0)
        before = [
            cue
            for cue in self.cues
            if cue.label in FORWARD_CUES and scope_start <= cue.start and cue.end <= mention.end
        ]
        if any(
            cue.label == "not_about_image" and "," not in self.text[cue.end : mention.start]
            for cue in before
        ):
            return None
        negations = [cue for cue in before if cue.label == "negation_before"]
        if before and before[-1].label == "negation_before":
            return 0
        if negations and (
            before[-1].label == "weak_doubt" or self._are_adjacent(negations[-1], before[-1])
        ):
            return 0
        after = self._cue_after(index)
        if after == "negation_after":
            return 0
        return -1 if before or after == "doubt_after" else 1

    def _are_adjacent(self, negation: Span, doubt: Span) -> bool:
        """Returns whether at most two words separate the cues: `no definite`, `no clearly`."""
        between = self.text[negation.end : doubt.start]
        return "," not in between and len(between.split()) <= 2

    def _cue_after(self, index: int) -> str:
        """Returns the label of the nearest cue that acts back on mention `index`, "" if none."""
        mention = self.mentions[index]
        next_stops = [start for start, _ in [*self.stops, *self.openers] if start >= mention.end]
        limit = min(next_stops, default=len(self.text))
        for cue in self.cues:
            if not mention.start <= cue.start < limit or cue.end <= mention.end:
                continue
            if cue.label == "negation_before":
                return ""  # it begins a statement about what follows
            if cue.label in ("negation_after", "doubt_after"):
                if self._has_verb_between(mention.end, cue):
                    return ""
                # In a list every finding shares the cue, unless the list has a verb of its own.
                is_in_list = any(later.end <= cue.start for later in self.mentions[index + 1 :])
                if is_in_list and self._has_verb_between(self._clause_start(mention), cue):
                    return ""
                return cue.label
        return ""

    def _clause_start(self, mention: Span) -> int:
        return max((end for _, end in self.clause_starts if end <= mention.start), default=0)

    def _has_verb_between(self, start: int, cue: Span) -> bool:
        """Returns whether a verb precedes the cue's own, so that the cue is about a later word."""
        verbs = _VERB.finditer(self.text, start, cue.start)
        return any(self.text[verb.end() : cue.start].strip() for verb in verbs)

    def regions_of(self, index: int) -> tuple[str, ...]:
        """Returns the regions that the sentence names for mention `index`; () if none.

        The rules, in this order, within the clause of the mention:
          1. A place inside the mention, or right before it.
          2. The place after it, if no other finding stands between and they are connected.
          3. The place before it, if no other finding stands between.
          4. The place after the last finding of a list.
          5. Any place before it.
        """
        mention = self.mentions[index]
        low = max((start for start, _ in self.clause_starts if start < mention.start), default=0)
        high = min(
            (start for start, _ in self.clause_starts if start >= mention.end),
            default=len(self.text),
        )
        earlier = [span for span in self.mentions[:index] if span.start >= low]
        later = [span for span in self.mentions[index + 1 :] if span.end <= high]
        places = [place for place in self.places if low <= place.start and place.end <= high]
        inside = [p for p in places if p.start < mention.end and mention.start < p.end]
        before = [place for place in places if place.end <= mention.start]
        after = [place for place in places if place.start >= mention.end]
        if inside:
            return inside[-1].regions
        if before and _ADJECTIVES.fullmatch(self.text[before[-1].end : mention.start]):
            return before[-1].regions
        is_next = after and (not later or after[0].end <= later[0].start)
        if is_next and self._is_connected(mention, after[0], bool(later)):
            return after[0].regions
        if before and (not earlier or before[-1].start >= earlier[-1].end):
            return before[-1].regions
        if after and later:
            members = [span for span in later if span.end <= after[0].start]
            if members and not _VERB.search(self.text, mention.end, members[-1].start):
                is_connected = self._is_connected(members[-1], after[0], True)
                return after[0].regions if is_connected else ()
        if before:
            return before[-1].regions
        return ()

    def _is_connected(self, mention: Span, place: Place, has_later: bool) -> bool:
        """Returns whether a place after a mention belongs to it and does not open a new phrase."""
        between = self.text[mention.end : place.start]
        later = [span for span in self.mentions if span.start >= place.end]
        # "effusion, left basilar opacity": the place belongs to the opacity.
        precedes_next = later and _ADJECTIVES.fullmatch(self.text[place.end : later[0].start])
        if precedes_next and has_later and not _PREPOSITION.search(between):
            return False
        return bool(_PREPOSITION.search(between)) or len(between.split()) <= 2


def _locate_finding(finding: str, regions: tuple[str, ...], existence: int) -> tuple[str, ...]:
    """Returns the regions of a finding, from those that the sentence names or by default."""
    if finding in terms.HEART_FINDINGS:
        return ("heart",)
    if finding in terms.CHEST_FINDINGS:
        return widen_regions(regions, "chest")
    if regions:
        return widen_regions(regions, "lung") if finding in terms.LUNG_FINDINGS else regions
    # A denial without a place holds everywhere; a finding without one lies somewhere.
    is_everywhere = existence == 0 or finding in terms.DIFFUSE_FINDINGS
    return ("both lungs",) if is_everywhere else ("chest",)


def _normal_claims(sentence: Sentence) -> list[tuple[int, Claim]]:
    """Returns what a sentence denies by calling a part of the chest normal, with its position."""
    text = sentence.text
    claims: list[tuple[int, Claim]] = []
    subjects = _find_longest(text, _SUBJECT_PATTERNS)
    for word in _find_longest(text, _NORMAL_PATTERNS):
        for subject in _subjects_of(sentence, subjects, word):
            overlapping = [
                place
                for place in sentence.places
                if place.start < subject.end and subject.start < place.end
            ]
            regions = overlapping[-1].regions if overlapping else ()
            for finding in terms.NORMAL_SUBJECTS[int(subject.label)][1]:
                for region in _locate_finding(finding, regions, 0):
                    claims.append((subject.start, (region, finding, 0)))
    for pattern, absent in _ALL_CLEAR_PATTERNS:
        for match in pattern.finditer(text):
            claims += [(match.start(), ("both lungs", finding, 0)) for finding in absent]
    return claims


def _subjects_of(sentence: Sentence, subjects: list[Span], word: Span) -> list[Span]:
    """Returns the subjects that a word calls normal: right after it, or before its verb."""
    text = sentence.text
    # "normal heart size and pulmonary vascularity"
    sequence: list[Span] = []
    for subject in (span for span in subjects if span.start >= word.end):
        connection = _BETWEEN_SUBJECTS if sequence else _BEFORE_SUBJECT
        position = sequence[-1].end if sequence else word.end
        if not connection.fullmatch(text, position, subject.start):
            break
        sequence.append(subject)
    if sequence:
        return sequence
    verb_ends = [0, *(match.end() for match in _VERB.finditer(text, 0, word.start))]
    before = [span for span in subjects if span.end <= word.start]
    # Without a verb of its own, "heart is large, lungs clear", only the nearest subject counts.
    if before and before[-1].start >= verb_ends[-1]:
        num_words = len(text[before[-1].end : word.start].split())
        return before[-1:] if num_words <= 3 else []
    has_verb = len(verb_ends) > 1
    mention_follows = any(verb_ends[-1] <= m.start < word.start for m in sentence.mentions)
    if not has_verb or mention_follows:
        # The word is about the finding between, unless a stop separates them.
        stops = [start for start, _ in sentence.stops if verb_ends[-1] <= start <= word.start]
        if not (has_verb and stops):
            return []
    return [span for span in before if span.start >= verb_ends[-2]]


def _split_long(sentence: str) -> list[str]:
    """Returns a sentence in parts of at most about `MAX_LENGTH` characters, cut at spaces."""
    words = " ".join(sentence.split())
    return re.findall(rf"\S.{{0,{MAX_LENGTH}}}(?!\S)|\S{{1,{MAX_LENGTH}}}", words)


@lru_cache(CACHE_SIZE)
def parse_sentence(sentence: str) -> tuple[Claim, ...]:
    """Returns the claims (region, finding, existence) of a sentence, in the order of its words.

    >>> parse_sentence("No nodule or effusion; possible oedema.")
    (('both lungs', 'nodule', 0), ('both lungs', 'pleural effusion', 0),
     ('both lungs', 'pulmonary oedema', -1))
    """
    claims = (claim for part in _split_long(sentence) for claim in _find_claims(Sentence(part)))
    return tuple(dict.fromkeys(claims))


def _find_claims(sentence: Sentence) -> list[Claim]:
    text, mentions = sentence.text, sentence.mentions
    claims = _normal_claims(sentence)
    values = [sentence.existence(i) for i in range(len(mentions))]
    # Of "scar or atelectasis" neither is certain.
    for i in range(len(values) - 1):
        between = text[mentions[i].end : mentions[i + 1].start]
        is_alternative = _ALTERNATIVE.search(between) and len(between) <= 40
        if abs(values[i] or 0) == values[i + 1] == 1 and is_alternative:
            values[i], values[i + 1] = -1, -1
    for i, (mention, existence) in enumerate(zip(mentions, values, strict=True)):
        if existence is None:
            continue
        findings = [mention.label]
        # An airspace opacity is both a consolidation and an opacity.
        if _OPACITY.search(text, mention.start, mention.end):
            findings.append("opacity")
        for finding in dict.fromkeys(findings):
            for region in _locate_finding(finding, sentence.regions_of(i), existence):
                claims.append((mention.start, (region, finding, existence)))
    return [claim for _, claim in sorted(claims, key=lambda item: item[0])]


@lru_cache(CACHE_SIZE)
def find_regions(sentence: str) -> tuple[str, ...]:
    """Returns the regions with boxes (`ANATOMY` of the phantom) that a sentence is about, in order.

    >>> find_regions("Opacity at the left base, cardiac silhouette is enlarged.")
    ('left lower zone', 'heart')
    >>> find_regions("No pleural effusion.")
    ('left lung', 'right lung')
    """
    parts = map(Sentence, _split_long(sentence))
    return expand_regions(region for part in parts for region in _list_regions(part))


def _list_regions(sentence: Sentence) -> list[str]:
    """Returns places in the lung, the heart, and the regions of findings without such a place."""
    # The mediastinum, the only place of the chest here, has no box: it counts as both lungs.
    regions = [
        (place.start, "both lungs" if region == "chest" else region)
        for place in sentence.places
        if place.is_lung
        for region in place.regions
    ]
    regions += [(match.start(), "heart") for match in _HEART.finditer(sentence.text)]
    regions += [(start, region) for start, (region, _, _) in _normal_claims(sentence)]
    explicit = {place.regions for place in sentence.places if place.is_lung}
    for i, mention in enumerate(sentence.mentions):
        place_regions = sentence.regions_of(i)
        if sentence.existence(i) is not None and place_regions not in explicit:
            # As if denied: a finding of the lung without a place may be anywhere in both.
            located = _locate_finding(mention.label, place_regions, 0)
            regions += [(mention.start, region) for region in located]
    return [region for _, region in sorted(regions, key=lambda item: item[0])]
