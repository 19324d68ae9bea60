"""Choose one of several predictions, and say why."""

from __future__ import annotations

from collections.abc import Sequence

from fastvlm_edge.planning.predict import Prediction

PREFERRED = ("fp16", "bf16", "int8", "int4")
"""Precisions, the most accurate first."""
QUICK = 20.0
"""Tokens/s that are faster than anybody reads: above this, accuracy is worth more than speed."""


def recommend(predictions: Sequence[Prediction]) -> tuple[Prediction | None, str]:
    """The most accurate precision that fits and is quick, or else the fastest that fits, and why; None and what to change if none fits."""
    by_precision = {each.precision: each for each in predictions}
    fitting = [by_precision[name] for name in PREFERRED if name in by_precision and by_precision[name].runs]
    if not fitting:
        least = min(predictions, key=lambda each: each.run_bytes)
        remedy = "a smaller --context, " if least.run_bytes - least.cache_bytes <= least.available_bytes else ""
        return None, (
            f"nothing fits: {least.precision} needs {least.run_bytes / 1e9:.1f} GB, {least.available_bytes / 1e9:.1f} GB are available; "
            f"choose {remedy}a smaller model, or a board with more memory"
        )
    quick = [each for each in fitting if each.tokens_per_second >= QUICK]
    if quick:
        chosen = quick[0]
        passed = [by_precision[name] for name in PREFERRED[: PREFERRED.index(chosen.precision)] if name in by_precision]
        why = " and ".join(map(_reason, passed)) or "most accurate option that fits"
        faster = max(fitting, key=lambda each: each.tokens_per_second)
        if faster.tokens_per_second > 1.2 * chosen.tokens_per_second:
            why += f"; {faster.precision} would decode at {faster.tokens_per_second:.0f} tokens/s"
    else:
        chosen = max(fitting, key=lambda each: each.tokens_per_second)
        why = "fastest option that fits"
    if not chosen.builds:
        why += f"; building {chosen.precision} needs {chosen.build_bytes / 1e9:.1f} GB, so add swap first (fastvlm-edge doctor says how)"
    return chosen, why


def _reason(each: Prediction) -> str:
    """Why it was not chosen."""
    return f"{each.precision} would decode at only {each.tokens_per_second:.0f} tokens/s" if each.runs else f"{each.precision} does not fit"
