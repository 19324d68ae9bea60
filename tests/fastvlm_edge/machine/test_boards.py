"""One vocabulary for `--target`: every command knows every name, and serves it or says why not and what to use instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fastvlm_edge.cli import main
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.machine.boards.rates import BOARDS
from fastvlm_edge.machine.boards.systems import SYSTEMS
from fastvlm_edge.machine.boards.targets import (
    BUILD_NAMES,
    BUNDLE_NAMES,
    PLAN_NAMES,
    TARGETS,
    build_target,
    bundle_target,
    plan_board,
    target_of_device,
)

SERVED: dict[str, tuple[Callable[[str], Any], tuple[str, ...]]] = {
    "build": (build_target, BUILD_NAMES),
    "plan": (plan_board, PLAN_NAMES),
    "bundle": (bundle_target, BUNDLE_NAMES),
}
OLD_NAMES = {
    "build": "rtx orin-nano orin-nx orin thor sm75 sm80 sm86 sm87 sm89 sm90 sm110 sm120 sm121",
    "plan": "orin-nano orin-nx orin thor",
    "bundle": "orin-jp6 orin-jp7 thor aarch64 x86_64",
}
"""Names that each command accepted when it had a table of its own."""


def refusal(find: Callable[[str], Any], name: str) -> FastVLMError | None:
    """The error for a name; None if it is served."""
    try:
        find(name)
    except FastVLMError as error:
        return error
    return None


@pytest.mark.parametrize("command", SERVED)
@pytest.mark.parametrize("name", sorted({*TARGETS, *SYSTEMS, *BUILD_NAMES, *PLAN_NAMES, *BUNDLE_NAMES}))
def test_every_name_is_served_or_refused_with_a_reason_and_names_that_work(command: str, name: str) -> None:
    find, usable = SERVED[command]
    error = refusal(find, name)
    if error is None:
        return
    assert name not in usable
    assert repr(name) in error.what and "unknown" not in error.what
    offered = {word.strip(",") for word in (error.mend or "").split()} & {*TARGETS, *BUNDLE_NAMES}
    assert offered, error.mend
    assert all(refusal(find, other) is None for other in offered)


@pytest.mark.parametrize("command", SERVED)
def test_what_a_command_offers_and_what_it_once_accepted_works(command: str) -> None:
    find, usable = SERVED[command]
    for name in (*usable, *OLD_NAMES[command].split()):
        find(name)


@pytest.mark.parametrize("command", SERVED)
@pytest.mark.parametrize(
    ("name", "what", "mend"),
    [
        ("xavier", "target 'xavier' is unknown", "use one of: "),
        ("orin-nano-jp5", "does not support JetPack 5 on Jetson Orin Nano 8 GB", "use orin-nano-jp6 or orin-nano-jp7"),
        ("thor-jp6", "does not support JetPack 6 on Jetson AGX Thor 128 GB", "use thor-jp7"),
        ("sm86-jp6", "sm86 (Ampere: RTX 30, A10, A40) is not a Jetson", "use sm86"),
    ],
)
def test_an_unknown_name_is_refused_by_every_command(command: str, name: str, what: str, mend: str) -> None:
    with pytest.raises(FastVLMError) as caught:
        SERVED[command][0](name)
    assert what in caught.value.what and (caught.value.mend or "").startswith(mend)


def test_a_jetpack_changes_nothing_but_the_bundle() -> None:
    for name in PLAN_NAMES:
        for jetpack in TARGETS[name].jetpacks:
            assert build_target(f"{name}-jp{jetpack}") is TARGETS[name]
            assert plan_board(f"{name}-jp{jetpack}") is BOARDS[name]
    assert bundle_target("orin-nano-jp6") is bundle_target("orin-nx-jp6") is bundle_target("orin-jp6") is SYSTEMS["orin-jp6"]
    assert bundle_target("thor") is bundle_target("thor-jp7") is bundle_target("sm110") is SYSTEMS["thor"]


def test_a_bundle_for_an_orin_asks_which_jetpack_it_has() -> None:
    with pytest.raises(FastVLMError, match=r"'orin-nano' does not say which JetPack the board has.*use orin-nano-jp6 or orin-nano-jp7"):
        bundle_target("orin-nano")


def test_the_python_of_a_jetson_is_fixed_and_that_of_a_computer_is_free() -> None:
    assert [(SYSTEMS[name].python, SYSTEMS[name].cuda) for name in ("orin-jp6", "orin-jp7", "thor")] == [
        ((3, 10), 12),
        ((3, 12), 13),
        ((3, 12), 13),
    ]
    with pytest.raises(FastVLMError, match=r"orin-jp6 has Python 3\.10.*leave --python out"):
        bundle_target("orin-jp6", (3, 12))
    assert bundle_target("aarch64", (3, 12)).python == (3, 12)
    with pytest.raises(FastVLMError, match=r"needs Python 3\.10 or newer, and --python is 3\.9"):
        bundle_target("aarch64", (3, 9))


def test_the_gpu_of_this_machine_has_a_target_even_if_nothing_lists_it() -> None:
    assert target_of_device((8, 9), ["tensorrt"]) is TARGETS["sm89"]
    unlisted = target_of_device((9, 9), ["tensorrt_rtx"])
    assert (unlisted.name, unlisted.listed, unlisted.libraries) == ("sm99", False, ("tensorrt_rtx",))


@pytest.mark.parametrize(
    ("gpu", "needs", "mend"),
    [
        ((7, 5), "Turing: RTX 20, T4 (sm75) needs tensorrt", "pip install tensorrt"),
        ((9, 0), "Hopper", "pip install tensorrt"),
        ((8, 7), "Jetson Orin", "nvidia-jetpack"),
    ],
)
def test_a_gpu_whose_library_is_not_installed_names_it(gpu: tuple[int, int], needs: str, mend: str) -> None:
    with pytest.raises(FastVLMError) as caught:
        target_of_device(gpu, ["tensorrt_rtx"])
    assert needs in caught.value.what and mend in str(caught.value.mend)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "0.5b", "--target", "sm86"], "plan has no clocks, bandwidth and power modes for target 'sm86'"),
        (["bundle", "MODEL", "-o", "app", "--target", "rtx"], "target 'rtx' is a GPU"),
    ],
)
def test_the_command_line_prints_the_reason(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert says in capsys.readouterr().err


def test_build_lists_the_targets_that_it_can_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--list-targets"]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert tuple(row.split()[0] for row in rows) == BUILD_NAMES
