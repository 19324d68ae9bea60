"""Scores of an answer, and the distance of two models. Each function names its source; scores are 0 to 1 unless it says otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def normalize_answer(text: str) -> str:
    """The text that exact match compares: lower case, single spaces, stripped, without a final period."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1 if the prediction is one of the answers, all normalised."""
    return float(normalize_answer(prediction) in {normalize_answer(answer) for answer in answers})


def anls(prediction: str, answers: Iterable[str], *, threshold: float = 0.5) -> float:
    """ANLS (average normalised Levenshtein similarity) of one question: the similarity to the nearest answer, and 0 below the threshold.

    Biten et al., arXiv 1907.00490, equation 1, as the evaluation script of DocVQA (https://rrc.cvc.uab.es/?ch=17) computes it: the
    distance is that of texts in lower case with single spaces, the length that of the unchanged texts.
    """
    best = 0.0
    predicted = " ".join(prediction.lower().split())
    for answer in answers:
        expected, longest = " ".join(answer.lower().split()), max(len(answer), len(prediction))
        if abs(len(expected) - len(predicted)) <= (1 - threshold) * longest:  # else no distance can reach the threshold
            best = max(best, 1 - levenshtein(predicted, expected) / longest if longest else 1.0)
    return best if best >= threshold else 0.0


def levenshtein(first: str, second: str) -> int:
    """The smallest number of insertions, deletions and substitutions that turn one text into the other."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def relaxed_accuracy(prediction: str, answers: Iterable[str], *, tolerance: float = 0.05) -> float:
    """1 if a number is within 5 % of the answer, or a text equals the answer regardless of case.

    ChartQA, arXiv 2203.10244, end of section 5.1; details (percent signs, an answer of 0 is compared as text) as in
    google-research/pix2struct, pix2struct/metrics.py, relaxed_correctness. Spaces around the prediction and a final period are ignored.
    """
    predicted = prediction.strip().removesuffix(".")
    number = _number(predicted)

    def right(answer: str) -> bool:
        expected = _number(answer.strip())
        if number is not None and expected:
            return abs(number - expected) / abs(expected) <= tolerance
        return predicted.lower() == answer.strip().lower()

    return float(any(map(right, answers)))


def _number(text: str) -> float | None:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def vqa_accuracy(prediction: str, answers: Sequence[str], *, normalize: Callable[[str], str] | None = None) -> float:
    """VQA accuracy against the answers of ten people: the mean, over the ten, of min(1, matches among the other nine / 3).

    https://visualqa.org/evaluation; GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py. That script does not
    normalise where all ten agree; here prediction and answers are always normalised, as submissions are before they are sent.
    """
    normalize = normalize or normalize_vqa
    predicted, expected = normalize(prediction), [normalize(answer) for answer in answers]
    matches = expected.count(predicted)
    if not expected:
        return 0.0
    agreeing, others = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * agreeing + (len(expected) - matches) * others) / len(expected)


def textvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy with the normalisation of TextVQA (facebookresearch/mmf, mmf/utils/m4c_evaluators.py, which LLaVA uses too)."""
    return vqa_accuracy(prediction, answers, normalize=lambda text: normalize_vqa(re.sub("[,?]", "", text.lower()).replace("'s", " 's")))


def normalize_vqa(text: str) -> str:
    """The answer processing of vqaEval.py: punctuation, periods that are not decimal points, number words, articles, contractions."""
    text = " ".join(text.split())
    grouped = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        lone = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if lone or grouped else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = (_NUMBERS.get(word, word) for word in cleaned.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBER_WORDS.split())}
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll
    how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
    we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
    won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _one_apostrophe_less(word: str) -> Iterator[str]:
    return (word[:at] + word[at + 1 :] for at, letter in enumerate(word) if letter == "'")


_CONTRACTIONS = {short: word for word in _CONTRACTED.split() for short in _one_apostrophe_less(word)} | {"somebody'd": "somebodyd"}
"""vqaEval.py restores a missing apostrophe in a contraction; the last entry is an oddity of its table."""


def log_softmax(logits: NDArray[np.float32]) -> Floats:
    """Logits [n, vocab] -> natural logarithms of the probabilities."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def kl_divergence(reference: NDArray[np.float32], model: NDArray[np.float32]) -> Floats:
    """KL(reference || model) in nats at each position, from logits [n, vocab]. 0 means equal distributions."""
    expected, found = log_softmax(reference), log_softmax(model)
    return np.asarray((np.exp(expected) * (expected - found)).sum(axis=-1))


def agreeing_tokens(reference: NDArray[np.float32], model: NDArray[np.float32]) -> int:
    """Number of positions at which both would choose the same token, from logits [n, vocab]."""
    return int((reference.argmax(axis=-1) == model.argmax(axis=-1)).sum())
