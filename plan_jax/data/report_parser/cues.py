"""Tables of negation and doubt of the report parser: cues, and the words that limit their scope.

After NegEx (Chapman et al. 2001) and ConText (Harkema et al. 2009). Patterns are regular
expressions over lower-case text; a space stands for spaces or a hyphen.
"""

# The patterns of each kind of cue:
#   negation_before, doubt_before   act forward, up to the next stop
#   negation_after, doubt_after     act backward
#   weak_doubt                      acts forward; a negation before it absorbs it ("no opacity to
#                                   suggest pneumonia")
#   not_about_image                 what follows is no statement about the image
#   no_cue                          its words are not another cue
_VISIBLE = (
    r"(?:seen|identified|present|visuali[sz]ed|evident|appreciated|demonstrated|noted|detected"
    r"|apparent|found|visible)"
)
_EXCLUDED = r"(?:excluded|ruled out)"
CUES: dict[str, tuple[str, ...]] = {
    "negation_before": (
        r"no",
        r"not",
        r"without",
        r"w/o",
        r"non",
        r"neither",
        r"nor",
        r"denies",
        r"absent",
        r"absence of",
        r"negative for",
        r"free of",
        r"free from",
        r"clear of",
        r"devoid of",
        r"lack of",
        r"lacks",
        r"resolution of",
        r"clearing of",
        r"resolved",
        r"(?:interval |prior )?removal of",
        r"never had",
        r"rather than",
        r"instead of",
        r"not (?:\w+ )?(?:to suggest|suggestive of)",
        r"never",
        r"fails? to (?:show|reveal|demonstrate)",
        r"cannot see",
        r"unlikely(?: to (?:be|represent))?(?!\s*[.,;])",
        r"no longer",
        r"rules? out",
        r"excludes?",
    ),
    "negation_after": (
        rf"(?:not|never) (?:been |definitely |clearly |\w+ly )?{_VISIBLE}",
        r"no longer \w+",
        r"(?:has|have) (?:\w+ly )?(?:resolved|cleared|disappeared)",
        r"resolved(?=\s*[.,;]?$)",
        r"(?:is|are|was|were) absent",
        r"(?:is|are|appears?|seems?|deemed|very|felt) unlikely",
        r"unlikely(?=\s*[.,;]|$)",
        rf"(?:is|are|was|were|has been|have been|been) {_EXCLUDED}",
        r"(?:has|have) been removed",
        r"(?:is|are) negative",
        r"(?:not|nowhere) to be \w+",
        r"removed",
        r"(?:(?:is|are|was|were|appears?) )?within (?:normal )?limits(?: of normal)?",
        r"(?:is|are|appears?) (?:normal|unremarkable)",
    ),
    "doubt_before": (
        r"possible",
        r"possibly",
        r"probable",
        r"probably",
        r"questionable",
        r"question of",
        r"\?",
        r"(?:may|might|could) be",
        r"perhaps",
        r"suspected",
        r"suspect",
        r"suspicion of",
        r"equivocal",
        r"presumed",
        r"presumably",
        r"likely",
        r"potential",
        r"potentially",
        r"(?:can ?not|can't|could not|unable to|not) (?:\w+ )?(?:exclude|rule out)(?: an?)?",
        r"(?:difficult|hard) to (?:exclude|rule out)",
        r"vs\.?",
        r"versus",
        r"possibility of",
        r"differential",
        r"query",
    ),
    "weak_doubt": (
        r"(?:may|might|could|would) (?:also )?(?:represent|reflect|indicate|suggest|relate to"
        r"|be related to|be due to|be secondary to|suggesting)",
        r"suggest(?:s|ed|ing|ive of)?",
        r"suspicious for",
        r"concerning for",
        r"concern for",
        r"concern of",
        r"worrisome for",
        r"(?:appears?|seems?) to (?:be|represent)",
        r"thought to (?:be|represent)",
        r"(?:most )?likely (?:represent\w*|reflect\w*|due to)",
        r"indicative of",
        r"consider",
        r"(?:is|are) (?:probably|likely)",
    ),
    "doubt_after": (
        rf"(?:can ?not|can't|could not|is not|are not|not)(?: be)?(?: \w+ly)?(?: be)? {_EXCLUDED}",
        r"(?:difficult|hard) to (?:\w+ly )?(?:exclude|rule out)",
        r"(?:is|are|was|were|be) (?:also )?(?:suspected|questioned|questionable|possible|probable"
        r"|likely|equivocal|considered|uncertain|not certain)",
        r"suspected(?=\s*[.,;]?$)",
        r"(?:would be|is|remains?) (?:in the differential|a (?:concern|possibility"
        r"|consideration))",
        r"vs\.?",
        r"versus",
        r"\?(?=\s*$)",
        r"questioned(?=\s*[.,;]?$)",
    ),
    "not_about_image": (
        r"(?:history|hx) of",
        r"h/o",
        r"(?:to |please )?evaluat(?:e|ion) (?:for|of)",
        r"(?:to )?(?:assess|assessment) for",
        r"r/o",
        r"to (?:rule out|exclude|confirm|document)",
        r"if (?:there|clinical\w*|concern\w*)",
        r"screening for",
        r"status post (?:remote )?",
        r"search for",
        r"sensitive (?:in|for|to)",
        r"(?:sensitivity|insensitive) (?:for|to)",
        r"as opposed to",
        r"correlate (?:\w+ )?for",
        r"follow up (?:of|for)",
    ),
    "no_cue": (
        r"no (?:significant |interval |definite |substantial |appreciable |overall |short ?term )*"
        r"(?:interval )?(?:change|increase|decrease|progression|worsening|improvement)"
        r"(?: (?:in|of|from|since))?",
        r"not only",
        r"not (?:significantly |appreciably |substantially |much )?changed",
        r"no (?:\w+ )?difference",
        r"not (?:well|optimally|fully|completely|entirely|adequately"
        r"|clearly) (?:seen|evaluated|visuali[sz]ed|assessed|included|imaged)",
        r"no comparison\w*",
        r"no (?:prior|previous) \w+",
        r"without (?:significant |interval )*(?:change|increase"
        r"|decrease|comparison)",
        r"(?:not|no longer) as",
        r"gram negative",
        r"no doubt",
        r"(?:nearly|almost|partially|partly|mostly|not|incompletely|largely) (?:completely )?"
        r"resolved",
        r"not necessarily",
        r"near resolution of",
        r"partial resolution of",
        r"not (?:yet )?(?:resolved|cleared)",
        r"without difficulty",
        r"incomplete resolution of",
        r"likely (?:old|chronic|stable|unchanged)",
        r"no new(?=.{0,80}(?:unchanged|stable))",
        r"(?:is|are|has|have) not (?:resolved|cleared|disappeared)",
        r"not (?:an? )?new",
    ),
}
# Words that end the scope of every cue.
STOPS = (
    r"but",
    r"however",
    r"although",
    r"though",
    r"except(?: for)?",
    r"aside from",
    r"apart from",
    r"other than",
    r"besides",
    r"nevertheless",
    r"whereas",
    r"while",
    r"because",
    r"secondary to",
    r"due to",
    r"otherwise",
    r"(?:, |and |, and )(?:the|there|this|these|it|heart|lungs|cardiac|cardiomediastinal|trachea"
    r"|mediastin\w+|osseous|bony|visuali[sz]ed|stable|unchanged|persistent|again|mild|moderate)",
    r", (?:with|which|now|unchanged|stable)",
    r";",
    r"with (?:stable|unchanged|persistent|mild)",
    r"(?:is|are) (?:unchanged|stable|again)",
    r"\d\.(?= )",
    r"status post",
    r"(?:seen|identified|noted|demonstrated|appreciated|present),",
)
# Words that begin a statement and end the scope of earlier cues; a place before them still belongs
# to the statement.
OPENERS = (r"there (?:is|are|was|were|has|have)",)
# Words that begin a clause with a place of its own.
CLAUSE_STARTS = (r"without", r"and no", r", no", r"but no", r"with no")
