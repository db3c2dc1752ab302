"""Writes the WordPiece vocabulary of the package: `python -m plan_jax.data.vocabulary`.

It contains every word of the phantom's grammar, common words of radiology reports, and enough
pieces (letters, digits, frequent syllables, punctuation) to spell any English word.
"""

import re
import string
from pathlib import Path

from plan_jax.data.phantom import report_text

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PUNCTUATION = ".,:;-/()[]'\"%+=<>?!&*#_@$°"
COMMON_WORDS = """
a abnormal abnormalities abnormality about above acute adequate adjacent after again age air
airway airways all along also although an and angle angles aorta aortic apex apical appearance
appearances appears are area areas artery as associated at atelectasis avf basal base bases be
been before below best between bilateral bilaterally blunted blunting body bone bones bony
borderline both breast bronchi bronchial bronchograms but by calcification calcified can cardiac
cardiomediastinal cardiomegaly cardiopulmonary catheter central change changes chest chronic
circumscribed clavicle clear clinical compared comparison compatible congestion consistent
consolidation consolidations contour contours correlate costophrenic cough could covid ct
current cystic day days decreased definite degenerative demonstrate demonstrated demonstrates
dense density diaphragm diaphragmatic diffuse discrete disease distal due dyspnea dyspnoea early
edema effusion effusions elevated elevation emphysema endotracheal enlarged enlargement
epigastric evaluation evidence exam examination extending extensive extent fever few fibrosis
film findings fissure fluid focal focus follow for fracture fractures free from frontal gas
given glass granuloma ground has have hazy heart hemidiaphragm hemithorax hernia hiatal high
hila hilar hilum history hyperinflated hyperinflation identified if image images imaging
impression in inches including increase increased increasing indeterminate indication infection
infectious inferior infiltrate infiltrates inflammatory inspiration intact interstitial interval
intubation is it its jugular known large lateral left lesion lesions less level levels likely
limits line linear lines lobar lobe lobes low lower lucency lung lungs lymph lymphadenopathy
male man marked markings mass masses may medial mediastinal mediastinum mid middle mild mildly
minimal moderate more most multifocal multiple nasogastric near new no node nodes nodular nodule
nodules normal not noted now numerous obscured obscuring of old on one only opacification
opacities opacity or osseous other otherwise out overlying pa pain parenchyma parenchymal part
patchy pathology patient peribronchial perihilar peripheral peripherally persistent place
placement pleura pleural pneumonia pneumonic pneumothorax portable position positive possible
post posterior posteroanterior predominant predominantly present previous prior probable
probably process projection prominence prominent pulmonary radiograph radiographs radiography
radiology ray recent region regions related remains represent residual resolution resolved
respiratory result reticular retrocardiac review rib ribs right rotated rotation round scar
scarring scattered scoliosis second see seen semi series severe shadow shadowing show showed
showing shown shows side sided sign significant silhouette similar since single site size slight
slightly small soft spine stable sternotomy stomach structures studies study subcutaneous
subpleural subsegmental subtle suggest suggesting suggestive superior supine surgical suspicious
symptoms technique than that the there these thickening third this thoracic thorax three tip
tissue tissues to tomography trachea tracheal tube tubes two unchanged under unilateral
unremarkable upper vascular vasculature vein venous ventricle ventricular vessels view viewed
views viral was well were when which widened widening with within without woman worse worsened
worsening x year years zone zones
"""
SYLLABLES = """
able ac ad al an ance and ant ar are ary as at ate ated ates ation be ble ca ce cal ch ci co con
com cy de di dis do duc e ea ec ed el em en ence ent er eral ers es est et ex fa fe fi fo ful ge
gen gi gra ha he hi hy ial ic ical id ies il im in ing ings ion ions ir is ism ist ite ity ive
ize ized la lar le li lo ly ma me ment mi mo na ne ness ni no nt o ob oc od of ol om on op or
ory os osis ot ou our ous out over pa para pe per ph pi po pre pro ra re ri ro ry sa se sh si so
st sub su ta te th ther ti tic tion to tra tri tro tu tur u ul um un up ur us ut va ve vi vo
"""


def build_vocabulary() -> list[str]:
    """Returns all pieces, each at the position of its id.

    The order is: special tokens, punctuation, letters and digits, syllables, words. A piece that
    continues a word begins with `##`.
    """
    characters = string.ascii_lowercase + string.digits
    syllables = SYLLABLES.split()
    words = sorted(list_grammar_words() | set(COMMON_WORDS.split()))
    pieces = [*SPECIAL_TOKENS, *PUNCTUATION]
    # Single characters, at the start of a word and inside it, spell any word of ASCII letters.
    pieces += [*characters, *("##" + character for character in characters)]
    pieces += [*syllables, *("##" + syllable for syllable in syllables), *words]
    return list(dict.fromkeys(pieces))


def list_grammar_words() -> set[str]:
    """Returns every word that a phantom's report, phrase or prompt can contain, in lower case."""
    return set(re.findall(r"[a-z]+", " ".join(report_text.grammar_strings()).lower()))


def write_vocabulary(path: Path) -> int:
    """Writes the vocabulary with one piece per line, and returns the number of pieces."""
    pieces = build_vocabulary()
    path.write_text("\n".join(pieces) + "\n", "utf-8")
    return len(pieces)


if __name__ == "__main__":
    target = Path(__file__).with_name("vocabulary.txt")
    print(f"wrote {write_vocabulary(target)} pieces to {target.name}")
