"""Lists of layers: the same structure from every library and source (tests/engines/listings/README.md)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fastvlm_edge.engines.layers import Layer, Tensor, count_kinds, parse_inspector, parse_listing
from tests.support.list_layers import FIXTURE, list_layers

LISTINGS = Path(__file__).with_name("listings")


def in_the_structure_of_tensorrt_10(listing: str) -> str:
    """A list of TensorRT for RTX with its constants among the inputs, and types in `Format/Datatype`."""
    listing = re.sub(r"\], Constants: \[", "", listing)
    listing = re.sub(r"\}( \{)", r"},\1", listing)
    return re.sub(r"Strides: \[[-\d,]*\], StrideOrder: \[[-\d,]*\], Datatype: (\w+), Format: [^}]*", r"Format/Datatype: \1 ", listing)


def of_tensorrt_10(source: str) -> list[Layer]:
    path = LISTINGS / f"tensorrt_10.{source}"
    parse = parse_inspector if source == "json" else parse_listing
    return parse(path.read_text(encoding="utf-8"), {"pixels"})


@pytest.mark.parametrize("source", ["json", "txt"])
def test_constants_among_the_inputs_are_found(source: str) -> None:
    layers = {layer.name: layer for layer in of_tensorrt_10(source)}
    assert len(layers) == 7
    product = layers["/up/MatMul_myl1_3"]
    assert product.inputs == (Tensor("Half", (1, 256, 64)), Tensor("Half", (64, 256)))
    assert product.constants == (Tensor("Float", (1,)), Tensor("Float", (1,)), Tensor("Half", (1, 1, 256)))
    assert product.nodes == ("/up/MatMul", "/up/Add")
    reader = layers["__myl_CastMulFc_myl1_4"]
    assert reader.inputs == (Tensor("Half", (1, 256, 256)),) and Tensor("Int8", (256, 64)) in reader.constants
    convolution = layers["/stem/Conv + /stem/Relu"]
    assert convolution.kind == "CaskConvolution" and convolution.nodes == ("/stem/Conv", "/stem/Relu")
    assert convolution.inputs == (Tensor("Half", (1, 3, 64, 64)),) and convolution.constants == (Tensor("Half", (3072,)),)
    assert next(iter(layers.values())).inputs == (Tensor("Float", (1, 3, 64, 64)),), "the engine's own input varies"


@pytest.mark.parametrize("source", ["json", "txt"])
def test_a_kernel_that_only_widens_weights_is_noticed_with_tensorrt_10(source: str) -> None:
    assert [layer.name for layer in of_tensorrt_10(source) if layer.widens_weights] == ["__myl_CastMul_myl1_2"]


def test_inspector_and_log_of_tensorrt_10_say_the_same() -> None:
    assert of_tensorrt_10("json") == of_tensorrt_10("txt")


def test_layers_of_a_second_profile_are_not_lost() -> None:
    text = (LISTINGS / "tensorrt_10.txt").read_text(encoding="utf-8")
    again = re.sub(r"Name: ([^,]*),", r"Name: \1 [profile 1],", text)
    layers = parse_listing(text + again, {"pixels"})
    assert len(layers) == 14 and count_kinds(layers)[0] == ("kgen", "Half", 6)
    assert [layer.constants for layer in layers[:7]] == [layer.constants for layer in layers[7:]]


def test_engines_with_layer_names_only_have_no_layers() -> None:
    assert parse_inspector(json.dumps({"Layers": ["/up/MatMul_myl1_3"], "Bindings": ["pixels"]}), {"pixels"}) == []


def test_the_list_of_tensorrt_for_rtx() -> None:
    layers = parse_listing(FIXTURE.read_text(encoding="utf-8"))
    assert [layer.kind for layer in layers] == ["shape_call", "kgen", "runtime_fusion", "gemm"]
    assert [layer.widens_weights for layer in layers] == [False, True, False, False]
    assert [tensor.dtype for tensor in layers[2].constants] == ["Half", "Int8"] and layers[2].inputs == (Tensor("Half", (-1, 256)),)


def test_the_installed_builder_lists_what_the_fixture_has() -> None:
    pytest.importorskip("tensorrt_rtx")
    found, kept = (parse_listing(text) for text in (list_layers(), FIXTURE.read_text(encoding="utf-8")))
    assert [(layer.kind, layer.inputs, layer.constants, layer.outputs) for layer in found] == [
        (layer.kind, layer.inputs, layer.constants, layer.outputs) for layer in kept
    ]


def test_constants_are_told_from_inputs_as_the_builder_tells_them() -> None:
    """The rule for TensorRT 10, on a list of TensorRT for RTX, which says itself which inputs are constants."""
    text = FIXTURE.read_text(encoding="utf-8")
    moved = in_the_structure_of_tensorrt_10(text)
    assert "Constants" not in moved and "Format/Datatype: Int8" in moved
    assert parse_listing(moved, {"x"}) == parse_listing(text, {"x"})
    assert [layer.widens_weights for layer in parse_listing(moved, {"x"})] == [False, True, False, False]
