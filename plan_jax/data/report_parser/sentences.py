"""What one sentence of a report claims: which findings, where, whether denied or in doubt.

A cue reaches forward to the next stop (`no`, `possible`) or backward (`cannot be excluded`), and
the nearest decides, except that a denial swallows a doubt within it (`no opacity to suggest`). A
place belongs to the finding that it stands before or behind, or to all that a list ties to it.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from plan_jax.data.report_parser import cues as cues
from plan_jax.data.report_parser import terms as terms
from plan_jax.data.report_parser.places import Place, compiled, expanded, places, whole
from plan_jax.data.tokenizer import CACHE_SIZE

LONGEST = 600  # characters read at a time: the rules compare every finding with every cue


class Span(NamedTuple):
    """A stretch of a sentence and what it is: a finding, a cue, a subject."""

    start: int
    end: int
    what: str


def _table(rows: Iterable[tuple[str, Iterable[str]]]) -> list[tuple[str, re.Pattern[str]]]:
    return [(name, compiled(pattern)) for name, patterns in rows for pattern in patterns]


_MENTIONS = _table([*terms.TERMS.items(), ("", terms.NO_FINDING)])
_CUES = _table(cues.CUES.items())
_STOPS, _OPENERS, _PARTS = map(compiled, (cues.STOPS, cues.OPENERS, cues.PARTS))
_SUBJECTS = [(str(i), compiled(p)) for i, (p, _) in enumerate(terms.NORMAL_SUBJECTS)]
_NORMAL = _table([("normal", terms.NORMAL_WORDS), ("", terms.NOT_NORMAL)])
_ALL_CLEAR = [(compiled(pattern), denied) for pattern, denied in terms.ALL_CLEAR]
_VERB = compiled(r"is|are|was|were|appears?|remains?|seems?|has|have|demonstrates?|shows?")
_BEFORE = re.compile(
    r"(?:[ -]+(?!(?:in|at|on|of|and|or|with|is|are|from|there|over|to)\b)[\w']+){0,4}"
    r"[ -]*"
)
_AFTER = compiled(
    r"in|at|on|over|within|of|involving|projecting|overlying|around|about|near|to|along|throughout"
    r"|seen|noted|present|through|from|via"
)
_HEART = compiled(
    r"heart|cardiac|cardio ?mediastinal|cardiomegaly|ventric(?:le|ular)|atri(?:um|al)"
)
_OR = re.compile(r"(?<!/)\bor\b(?!.*,)")
_OPACITY = compiled(r"opacit\w+|opacifi\w+|densit\w+")  # an airspace opacity is one too
_OF = re.compile(
    r"(?: (?:size|of|the|both|and|in|appearing|configuration|pulmonary|right|left))* ?"
)
_FELLOW = re.compile(r"(?: size|,)*(?: and|,)(?: the)? ")


def _longest(text: str, table: list[tuple[str, re.Pattern[str]]]) -> list[Span]:
    # of two that overlap the longer stays; of equals both do
    found = [Span(*m.span(), name) for name, pattern in table for m in pattern.finditer(text)]
    found.sort(key=lambda span: (span.start - span.end, span.start))
    kept: list[Span] = []
    for span in found:
        if all(
            span.end <= k.start or k.end <= span.start or span[:2] == k[:2] != span for k in kept
        ):
            kept.append(span)
    return sorted(span for span in kept if span.what)


def _plain(sentence: str) -> str:
    text = re.sub("[\u2010-\u2015\u2212]", "-", sentence.lower()).replace("\u2019", "'")
    return " ".join(text.replace("?", " ? ").split())


class Sentence:
    """One sentence with the findings, cues, stops and places found in it."""

    def __init__(self, sentence: str):
        self.text = _plain(sentence)
        self.mentions = _longest(self.text, _MENTIONS)
        self.cues = [c for c in _longest(self.text, _CUES) if c.what != "nothing"]
        self.stops = [
            (start, end)
            for start, end in (m.span() for m in _STOPS.finditer(self.text))
            if not any(cue.start < end and start < cue.end for cue in self.cues)
        ]
        self.parts = sorted([*self.stops, *(m.span() for m in _PARTS.finditer(self.text))])
        self.openers = [m.span() for m in _OPENERS.finditer(self.text)]
        self.places = places(self.text)

    def existence(self, i: int) -> int | None:
        """Tell whether mention i is stated (1), denied (0), uncertain (-1), or no claim (None)."""
        mention = self.mentions[i]
        ends = [e for s, e in [*self.stops, *self.openers] if s < mention.start]
        reach = max(ends, default=0)
        before = [c for c in self.cues if reach <= c.start and c.end <= mention.end]
        forward = [c for c in before if c.what in ("deny", "doubt", "hint", "aside")]
        if any(c.what == "aside" and "," not in self.text[c.end : mention.start] for c in forward):
            return None
        denials = [c for c in forward if c.what == "deny"]
        if forward and forward[-1].what == "deny":
            return 0
        if denials and (forward[-1].what == "hint" or self._near(denials[-1], forward[-1])):
            return 0
        after = self._after(i)
        if after == "denied":
            return 0
        return -1 if forward or after == "doubted" else 1

    def _near(self, denial: Span, doubt: Span) -> bool:
        """Whether hardly a word stands between: `no definite`, `no clearly possible`."""
        between = self.text[denial.end : doubt.start]
        return "," not in between and len(between.split()) <= 2

    def _after(self, i: int) -> str:
        """The nearest cue that reaches back to mention i."""
        mention = self.mentions[i]
        ahead = [s for s, _ in [*self.stops, *self.openers] if s >= mention.end]
        limit = min(ahead, default=len(self.text))
        for cue in self.cues:
            if not mention.start <= cue.start < limit or cue.end <= mention.end:
                continue
            if cue.what == "deny":
                return ""
            if cue.what in ("denied", "doubted"):
                later = any(m.end <= cue.start for m in self.mentions[i + 1 :])
                told = self._told(mention.end, cue)
                return "" if told or (later and self._told(self._begin(mention), cue)) else cue.what
        return ""

    def _begin(self, mention: Span) -> int:
        return max((e for _, e in self.parts if e <= mention.start), default=0)

    def _told(self, start: int, cue: Span) -> bool:
        """Whether another verb stands before the cue's own: then it is about a later word."""
        verbs = _VERB.finditer(self.text, start, cue.start)
        return any(self.text[verb.end() : cue.start].strip() for verb in verbs)

    def place(self, i: int) -> tuple[str, ...]:
        """Find the regions that the sentence gives mention i; () if it gives none."""
        mention = self.mentions[i]
        low = max((s for s, _ in self.parts if s < mention.start), default=0)
        high = min((s for s, _ in self.parts if s >= mention.end), default=len(self.text))
        earlier = [m for m in self.mentions[:i] if m.start >= low]
        later = [m for m in self.mentions[i + 1 :] if m.end <= high]
        here = [p for p in self.places if low <= p.start and p.end <= high]
        inside = [p for p in here if p.start < mention.end and mention.start < p.end]
        left = [p for p in here if p.end <= mention.start]
        right = [p for p in here if p.start >= mention.end]
        if inside:
            return inside[-1].regions
        if left and _BEFORE.fullmatch(self.text[left[-1].end : mention.start]):
            return left[-1].regions
        fronted = left and (not earlier or left[-1].start >= earlier[-1].end)
        following = right and (not later or right[0].end <= later[0].start)
        if following and self._tied(mention, right[0], bool(later)):
            return right[0].regions
        if fronted:
            return left[-1].regions
        if right and later:
            last = [m for m in later if m.end <= right[0].start]
            if last and not _VERB.search(self.text, mention.end, last[-1].start):
                return right[0].regions if self._tied(last[-1], right[0], True) else ()
        if left:
            return left[-1].regions
        return ()

    def _tied(self, mention: Span, place: Place, more: bool) -> bool:
        """Whether the place behind a mention belongs to it and does not open the next phrase."""
        between = self.text[mention.end : place.start]
        later = [m for m in self.mentions if m.start >= place.end]
        adjacent = later and _BEFORE.fullmatch(self.text[place.end : later[0].start])
        if adjacent and more and not _AFTER.search(between):
            return False
        return bool(_AFTER.search(between)) or len(between.split()) <= 2


def _where(finding: str, given: tuple[str, ...], existence: int) -> tuple[str, ...]:
    """The regions of a finding, given the places that the sentence names; or its default."""
    if finding in terms.IN_HEART:
        return ("heart",)
    if finding in terms.IN_CHEST:
        return whole(given, "chest")
    if given:
        return whole(given, "lung") if finding in terms.IN_A_LUNG else given
    everywhere = existence == 0 or finding in terms.DIFFUSE
    return ("both lungs",) if everywhere else ("chest",)


def _normal(sentence: Sentence) -> list[tuple[int, str, str, int]]:
    """What is denied by calling a part of the chest normal or clear."""
    text, out = sentence.text, []
    subjects = _longest(text, _SUBJECTS)
    for word in _longest(text, _NORMAL):
        for subject in _called(sentence, subjects, word):
            near = [p for p in sentence.places if p.start < subject.end and subject.start < p.end]
            given = near[-1].regions if near else ()
            for finding in terms.NORMAL_SUBJECTS[int(subject.what)][1]:
                out += [(subject.start, r, finding, 0) for r in _where(finding, given, 0)]
    for pattern, denied in _ALL_CLEAR:
        for match in pattern.finditer(text):
            out += [(match.start(), "both lungs", finding, 0) for finding in denied]
    return out


def _called(sentence: Sentence, subjects: list[Span], word: Span) -> list[Span]:
    """The subjects that `word` calls normal: those right behind it, or those before its verb."""
    text = sentence.text
    run: list[Span] = []
    for subject in (s for s in subjects if s.start >= word.end):
        joint = _FELLOW if run else _OF
        if not joint.fullmatch(text, run[-1].end if run else word.end, subject.start):
            break
        run.append(subject)
    if run:
        return run
    ends = [0, *(m.end() for m in _VERB.finditer(text, 0, word.start))]
    before = [s for s in subjects if s.end <= word.start]
    if before and before[-1].start >= ends[-1]:  # "heart is large, lungs clear"
        return before[-1:] if len(text[before[-1].end : word.start].split()) <= 3 else []
    if len(ends) < 2 or any(ends[-1] <= m.start < word.start for m in sentence.mentions):
        but = [s for s, _ in sentence.stops if len(ends) > 1 and ends[-1] <= s <= word.start]
        if not but:
            return []
    return [s for s in before if s.start >= ends[-2]]


def _pieces(sentence: str) -> list[str]:
    return re.findall(rf"\S.{{0,{LONGEST}}}(?!\S)|\S{{1,{LONGEST}}}", " ".join(sentence.split()))


@lru_cache(CACHE_SIZE)
def read(sentence: str) -> tuple[tuple[str, str, int], ...]:
    """Read one sentence: (region, finding, existence) in the order of its words.

    >>> read("No nodule or effusion; possible oedema.")
    (('both lungs', 'nodule', 0), ('both lungs', 'pleural effusion', 0),
     ('both lungs', 'pulmonary oedema', -1))
    """
    return tuple(dict.fromkeys(c for piece in _pieces(sentence) for c in _claims(Sentence(piece))))


def _claims(sentence: Sentence) -> list[tuple[str, str, int]]:
    text, claims = sentence.text, _normal(sentence)
    told = [sentence.existence(i) for i in range(len(sentence.mentions))]
    for i in range(len(told) - 1):  # of "scar or atelectasis" neither is certain
        between = text[sentence.mentions[i].end : sentence.mentions[i + 1].start]
        if abs(told[i] or 0) == told[i + 1] == 1 and _OR.search(between) and len(between) <= 40:
            told[i], told[i + 1] = -1, -1
    for i, (mention, existence) in enumerate(zip(sentence.mentions, told, strict=True)):
        if existence is None:
            continue
        named = [mention.what]
        if _OPACITY.search(text, mention.start, mention.end):
            named.append("opacity")
        for finding in dict.fromkeys(named):
            where = _where(finding, sentence.place(i), existence)
            claims += [(mention.start, region, finding, existence) for region in where]
    return [claim[1:] for claim in sorted(claims, key=lambda claim: claim[0])]


@lru_cache(CACHE_SIZE)
def regions(sentence: str) -> tuple[str, ...]:
    """Name the regions with boxes (`ANATOMY` of the phantom) that a sentence speaks of, in order.

    >>> regions("Opacity at the left base, cardiac silhouette is enlarged.")
    ('left lower zone', 'heart')
    >>> regions("No pleural effusion.")
    ('left lung', 'right lung')
    """
    return expanded(r for piece in _pieces(sentence) for r in _spoken_of(Sentence(piece)))


def _spoken_of(sentence: Sentence) -> list[str]:
    """Places that name a part of the lung, the heart, and where the findings without one are."""
    named = [(p.start, r) for p in sentence.places if p.lung for r in p.regions]
    named = [(start, "both lungs" if r == "chest" else r) for start, r in named]  # mediastinum
    named += [(m.start(), "heart") for m in _HEART.finditer(sentence.text)]
    named += [(start, region) for start, region, _, _ in _normal(sentence)]
    said = {p.regions for p in sentence.places if p.lung}
    for i, mention in enumerate(sentence.mentions):
        given = sentence.place(i)
        if sentence.existence(i) is not None and given not in said:
            # existence 0: a finding of the lung without a place may be anywhere in both
            named += [(mention.start, r) for r in _where(mention.what, given, 0)]
    return [region for _, region in sorted(named, key=lambda pair: pair[0])]
