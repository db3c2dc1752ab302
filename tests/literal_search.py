"""Beam search with lists, in float64: what the searches and the report decoder are tested by."""

END = 0


def repeats(prefix, token, order):
    """Returns whether a token completes an n-gram that is in the prefix already."""
    if not order:
        return False
    ngrams = {tuple(prefix[i : i + order]) for i in range(len(prefix) - order + 1)}
    return (*prefix, token)[-order:] in ngrams and len(prefix) >= order


def padded(tokens, length, pad):
    """Returns tokens, padded to a length."""
    return [*tokens, *[pad] * (length - len(tokens))]


def literal_beam(log_probs, row, vocabulary_size, beam_size, length, penalty, order):
    """Returns the best sequence and its score.

    Finished sequences leave the beam, and count by their score over their length ** `penalty`.
    """
    live, finished = [((), 0.0)], []
    while live and len(live[0][0]) < length:
        tables = [log_probs(row, prefix) for prefix, _ in live]
        candidates = [
            ((*prefix, v), score + values[v])
            for (prefix, score), values in zip(live, tables, strict=True)
            for v in range(vocabulary_size)
            if not repeats(prefix, v, order)
        ]
        candidates = sorted(candidates, key=lambda x: -x[1])[:beam_size]
        ends = [tokens[-1] == END or len(tokens) == length for tokens, _ in candidates]
        finished += [x for x, end in zip(candidates, ends, strict=True) if end]
        live = [x for x, end in zip(candidates, ends, strict=True) if not end]
    return max(((s, x / len(s) ** penalty) for s, x in finished), key=lambda x: x[1])
