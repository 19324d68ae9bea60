"""Every measure against values worked out by hand from its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastvlm_edge.evaluation.metrics import (
    agreeing_tokens,
    anls,
    exact_match,
    kl_divergence,
    levenshtein,
    log_softmax,
    normalize_vqa,
    relaxed_accuracy,
    textvqa_accuracy,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    ("prediction", "answers", "right"),
    [
        ("042", ["042"], 1),
        (" Red. ", ["blue", "red"], 1),
        ("two  words", ["Two words"], 1),
        ("42", ["042"], 0),
        ("3.", ["3"], 1),
        ("3.5", ["35"], 0),
        ("", ["a"], 0),
        ("a", [], 0),
    ],
)
def test_exact_match_forgives_case_blanks_and_a_last_period(prediction: str, answers: list[str], right: int) -> None:
    assert exact_match(prediction, answers) == right


@pytest.mark.parametrize(
    ("first", "second", "distance"), [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("ab", "ba", 2), ("a", "a", 0)]
)
def test_levenshtein(first: str, second: str, distance: int) -> None:
    assert levenshtein(first, second) == distance


@pytest.mark.parametrize(
    ("prediction", "answers", "similarity"),
    [
        ("hallo", ["hello"], 0.8),  # 1 of 5
        ("abxy", ["abcd"], 0.5),  # 2 of 4: the threshold itself counts
        ("axyz", ["abcd"], 0.0),  # 3 of 4: below it
        ("Hallo", ["nothing", "HELLO", "halloo"], 1 - 1 / 6),  # the best answer
        ("a  b", ["a b"], 1.0),  # blanks do not count
        ("ab  c", ["ab d"], 0.8),  # 1 edit, but of the 5 characters as they came
        ("", ["abc"], 0.0),
        ("", [""], 1.0),
        ("a", [], 0.0),
        ("x" * 5000, ["y"], 0.0),
    ],
)
def test_anls(prediction: str, answers: list[str], similarity: float) -> None:
    assert anls(prediction, answers) == pytest.approx(similarity)


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("10.4", "10", 1),
        ("10.6", "10", 0),
        ("-95", "-100", 1),
        ("5%", "0.05", 1),
        ("62%", "62", 0),  # a percent sign is a number of its own, as in the source
        ("14.", "14", 1),
        ("0", "0", 1),
        ("0.0", "0", 0),  # nothing is within 5 % of 0
        ("yes", "Yes", 1),
        ("nan", "5", 0),
        ("inf", "inf", 1),
    ],
)
def test_relaxed_accuracy(prediction: str, answer: str, right: int) -> None:
    assert relaxed_accuracy(prediction, [answer]) == right


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_is_the_mean_over_nine_of_ten_people(matches: int, accuracy: float) -> None:
    """With 3 matches of 10: three people leave 2 among the others (2/3 each), seven leave 3 (1 each): 9/10."""
    assert vqa_accuracy("Yes.", ["yes"] * matches + ["no"] * (10 - matches)) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The 2 dogs.", "2 dogs"),
        ("two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("yes, it is", "yes it is"),
        ("red/green", "red green"),
        ("3.5", "3.5"),
        ("U.S.", "us"),
        ("t-shirt", "t shirt"),
        ("Dont", "don't"),
        ("couldntve", "couldntve"),  # both apostrophes are gone: not in the table
        ("couldn'tve", "couldn't've"),
        ("shed", "shed"),  # a word of its own
        ("a\nthe\tb", "b"),
    ],
)
def test_vqa_normalisation(text: str, normalized: str) -> None:
    assert normalize_vqa(text) == normalized


def test_textvqa_normalisation_splits_the_genitive_and_drops_commas() -> None:
    assert textvqa_accuracy("Levi's", ["levi 's"] * 10) == 1
    assert textvqa_accuracy("a,b", ["ab"] * 10) == 1
    assert vqa_accuracy("x,b", ["xb"] * 10) == 0


def test_no_answers_are_no_accuracy() -> None:
    assert vqa_accuracy("x", []) == textvqa_accuracy("x", []) == relaxed_accuracy("x", []) == 0


def test_kl_divergence_of_two_coins() -> None:
    """KL((1/2, 1/2) || (3/4, 1/4)) = ln(2/3)/2 + ln(2)/2 = 0.143841; no divergence from itself."""
    fair, biased = np.zeros((2, 2), np.float32), np.array([[math.log(3), 0], [7, 7]], np.float32)
    assert kl_divergence(fair, biased) == pytest.approx([0.143841, 0], abs=1e-6)
    assert kl_divergence(biased, biased) == pytest.approx([0, 0])


def test_log_softmax_survives_large_logits() -> None:
    assert np.exp(log_softmax(np.array([[1e4, 1e4, -1e4]], np.float32))) == pytest.approx(np.array([[0.5, 0.5, 0]]))


def test_agreeing_tokens() -> None:
    first = np.array([[1, 2], [2, 1], [0, 1]], np.float32)
    assert agreeing_tokens(first, first[:, ::-1]) == 0
    assert agreeing_tokens(first, np.array([[0, 5], [0, 5], [0, 5]], np.float32)) == 2
