"""Numbers, symbols and names as a reader sees them."""

import math

import pytest

from noisekit.core.vocabulary import QUANTITIES
from noisekit.report.typography import (
    fixed,
    lower_first,
    number,
    sentence_case,
    symbol,
    typeset,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.3956, "2.4"),
        (0.05, "0.05"),
        (0, "0"),
        (-0.00321, "−0.00321"),
        (1234567.8, "1,234,568"),
        (3.0e-7, "3\u202f×\u202f10⁻⁷"),
        (-1.25e9, "−1.25\u202f×\u202f10⁹"),
        (99.96, "100"),
        (math.nan, "–"),
        (-math.inf, "−∞"),
    ],
)
def test_numbers_have_three_digits_and_true_signs(value: float, text: str) -> None:
    """Catches: hyphens, "e-07", zeros without meaning, "nan"."""
    assert number(value) == text


def test_zeros_stay_where_numbers_stand_side_by_side() -> None:
    """Catches: "0.45 to 0.563" for two numbers of the same precision."""
    assert number(0.45, pad=True) == "0.450"
    assert fixed(0.4, 2) == "+0.40"
    assert fixed(-1234.5, 1) == "−1,234.5"


@pytest.mark.parametrize(
    ("label", "inside"),
    [
        ("Test error", "test error"),
        ("Hessian trace", "Hessian trace"),
        ("PAC-Bayes flatness", "PAC-Bayes flatness"),
        ("CABS batch size", "CABS batch size"),
    ],
)
def test_labels_inside_a_sentence(label: str, inside: str) -> None:
    """Catches: "pAC-Bayes"; capitals in the middle of a sentence."""
    assert lower_first(label) == inside


@pytest.mark.parametrize(
    ("text", "tidy"),
    [
        ("it is -0.3 [-1, 2]", "it is −0.3 [−1, 2]"),
        ("1.2e-05 and 0.0e+00", "1.2\u202f×\u202f10⁻⁵ and 0"),
        (
            "run small-seed-1, 3-10 times, c747e-12",
            "run small-seed-1, 3-10 times, c747e-12",
        ),
        ("--workers -1", "--workers −1"),
    ],
)
def test_only_numbers_are_set_anew(text: str, tidy: str) -> None:
    """Catches: names, ranges and digests that lose their hyphens."""
    assert typeset(text) == tidy


@pytest.mark.parametrize(
    ("mathtext", "html"),
    [
        (r"\lambda_{\max}", "<i>λ</i><sub>max</sub>"),
        (r"\|g_B\|^2", "‖<i>g</i><sub><i>B</i></sub>‖<sup>2</sup>"),
        (r"\mathrm{tr}\,\Sigma", "tr\u2009Σ"),
        (r"\bar\lambda_{\max}", "<i>λ\u0304</i><sub>max</sub>"),
        (r"\|w-w_0\|", "‖<i>w</i>−<i>w</i><sub>0</sub>‖"),
        (r"\frac{a}{b}", ""),
        ("a_", ""),
        ("<b>", "&lt;<i>b</i>&gt;"),
    ],
)
def test_symbols_become_html(mathtext: str, html: str) -> None:
    """What is not understood is left out rather than shown raw.

    Catches: backslashes on the page; indices that swallow what follows them; markup
    that is not escaped.
    """
    assert symbol(mathtext) == html


def test_every_symbol_of_the_vocabulary_can_be_set() -> None:
    """Catches: a quantity added with mathtext that the report does not know."""
    unset = [q.name for q in QUANTITIES.values() if q.symbol and not symbol(q.symbol)]
    assert unset == []


def test_a_symbol_at_the_start_keeps_its_case() -> None:
    """Catches: φ that becomes Φ."""
    assert sentence_case("φ [%]") == "φ [%]"
    assert sentence_case("same rate") == "Same rate"
    assert sentence_case("") == ""
