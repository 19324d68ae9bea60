"""The report of a calibrated conversion: page and JSON have everything, and the page is safe to open."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm_edge.calib.report.document import (
    JSON_NAME,
    CalibrationData,
    DecoderReport,
    GroupReport,
    LayerReport,
    MatrixReport,
    QuantizationReport,
    VisionReport,
)
from fastvlm_edge.calib.report.write import HTML_NAME, write_report

GROUPED = "TensorRT pads the groups of INT8 convolutions"
COSTS = "INT8 would cost more accuracy than the bound allows"
INPUTS = "INT8 inputs would cost more accuracy than the bound allows"
ATTENTION = "no weights: a product of two activations, in float"
VOID = {"meta", "br", "hr", "img", "input", "link"}
BOUND = 2e-3


def vision_report() -> VisionReport:
    """FastViTHD at 1024 pixels: five stages of 2, 12, 24, 4 and 2 blocks, 96 dense and 93 other layers."""
    rng = np.random.default_rng(0)
    groups = []

    def group(name: str, stage: str, positions: int, dense: dict[str, tuple[int, int]], fixed: dict[str, tuple[int, int]]) -> None:
        loss = float(10 ** rng.normal(-4.6, 0.7))
        decision = "wide" if loss > 4e-4 else "int8 weights" if loss > 2e-4 else "int8"
        reason = {"int8": "within the bound", "int8 weights": INPUTS, "wide": COSTS}[decision]
        layers = []
        for part, (size, macs) in fixed.items():
            layers.append(LayerReport(f"{name}.{part}", "grouped", macs * positions, 2 * size, None, None, "wide", GROUPED))
        for part, (inputs, outputs) in dense.items():
            seen = float(10 ** rng.normal(1.0, 0.4))
            size, clip = inputs * outputs, seen * float(rng.uniform(0.2, 1.0))
            width = 2 if decision == "wide" else 1
            layers.append(
                LayerReport(f"{name}.{part}", "pointwise", size * positions, width * size, seen, clip, decision, reason)  # type: ignore[arg-type]
            )
        macs, weights = (sum(getattr(layer, what) for layer in layers) for what in ("macs", "weight_bytes"))
        groups.append(GroupReport(name, stage, "ConvFFN", macs, weights, loss, 2 * loss, decision, reason, layers))  # type: ignore[arg-type]

    group("vision.stem", "stem", 65536, {"2": (96, 96)}, {"0": (2592, 10368), "1": (864, 864)})
    for index, (blocks, dim) in enumerate(zip((2, 12, 24, 4, 2), (96, 192, 384, 768, 1536), strict=True)):
        name, stage, positions = f"vision.stages.{index}", f"stage{index + 1}", (256 >> index) ** 2
        if index:
            group(f"{name}.downsample", stage, positions, {"proj.1": (dim, dim)}, {"proj.0": (49 * dim, 49 * dim)})
        for number in range(blocks):
            block = f"{name}.blocks.{number}"
            if index > 2:
                group(f"{block}.attention", stage, positions, {"qkv": (dim, 3 * dim), "proj": (dim, dim)}, {})
            mixer = {"token_mixer": (9 * dim, 9 * dim)} if index < 3 else {}
            fixed = {**mixer, "conv": (49 * dim, 49 * dim)}
            group(f"{block}.mlp", stage, positions, {"fc1": (dim, 4 * dim), "fc2": (4 * dim, dim)}, fixed)
    layers = [LayerReport("vision.final_conv.conv", "grouped", 3072 * 9 * 256, 4 * 3072 * 9, None, None, "wide", GROUPED)]
    groups.append(GroupReport("vision.final_conv", "final_conv", "convolution", 7077888, 110592, 0.0, 0.0, "wide", GROUPED, layers))
    group("projector", "projector", 256, {"linear_1": (3072, 896), "linear_2": (896, 896)}, {})
    return VisionReport("mse", BOUND, 0.00231, 0.99871, 0.00264, groups)


def decoder_report(bits: int = 8) -> DecoderReport:
    """Qwen2 0.5B: 24 layers of four matrices, and the head."""
    rng = np.random.default_rng(1)
    sizes = {"qkv": 896 * 1152, "o_proj": 896 * 896, "gate_up": 896 * 9728, "down": 4864 * 896}
    matrices = []
    for layer, (part, size) in itertools.product(range(24), sizes.items()):
        rounded = float(16 / 2**bits * 0.08 * 10 ** rng.normal(0, 0.15))
        error, block = rounded * float(rng.uniform(0.5, 0.9)), 64 if bits == 4 else 0
        matrices.append(MatrixReport(f"llm.layers.{layer}.{part}", bits, block, size * bits // 8, rounded, error))
    matrices[5] = dataclasses.replace(matrices[5], error=1.2 * matrices[5].error_rounded)
    matrices.append(MatrixReport("llm.head", 8, 0, 896 * 151936, 0.0061, 0.0043))
    return DecoderReport("GPTQ", matrices)


def document() -> QuantizationReport:
    """What an INT8 conversion of the 0.5B leaves."""
    fallbacks = [
        {"node": f"/vision/stages.{stage}/blocks.{block}/{part}/Conv", "op": "Conv", "reason": GROUPED, "macs": 31_000_000}
        for stage, blocks in enumerate((2, 12, 24, 4, 2))
        for block in range(blocks)
        for part in ("token_mixer", "mlp/conv")
    ]
    fallbacks += [{"node": f"/vision/stages.3/blocks.{n}/qk", "op": "MatMul", "reason": ATTENTION, "macs": 805306368} for n in range(4)]
    vision = vision_report()
    macs: dict[str, int] = {"FP16": 805306368}
    for group in vision.groups:
        for layer in group.layers:
            floats = "FP32" if group.stage in ("stage5", "final_conv", "projector") else "FP16"
            kind = {"int8": "INT8", "int8 weights": f"INT8 weights -> {floats}", "wide": floats}[layer.decision]
            macs[kind] = macs.get(kind, 0) + layer.macs
    return QuantizationReport(
        model="FastVLM-0.5B",
        precision="int8",
        toolkit_version="0.1.0",
        date="2026-11-21",
        calibration=CalibrationData("data/textvqa train.json", 512, ["img-7: not a picture", "img-9: 3 x 4 pixels"], 1234.5),
        accuracy_drop=0.5,
        vision=vision,
        decoder=decoder_report(),
        placement={
            "vision": macs,
            "decoder": {"INT8 weights -> FP16": 494_000_000, "FP16": 900_000},
        },
        fallbacks=fallbacks,
        bytes={
            "vision.onnx": 410_000,
            "vision.weights": 154_000_000,
            "decoder.onnx": 320_000,
            "decoder.weights": 632_000_000,
            "tokenizer.json": 7_031_000,
        },
        evaluation={
            "points_lost": 0.4,
            "exact_match_before": 0.613,
            "exact_match_after": 0.609,
            "token_agreement": 0.981,
            "image_features": {"cosine": {"before": 0.99998, "after": 0.99871}},
        },
    )


class Page(HTMLParser):
    """Tags that are closed in order, every text, and every attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def written(directory: Path, report: QuantizationReport) -> str:
    write_report(directory, report)
    return (directory / HTML_NAME).read_text(encoding="utf-8")


def read_json(directory: Path) -> Any:
    return json.loads((directory / JSON_NAME).read_text(encoding="utf-8"))


def test_the_json_has_the_whole_document(tmp_path: Path) -> None:
    write_report(tmp_path, document())
    assert read_json(tmp_path) == dataclasses.asdict(document())


def test_the_page_is_well_formed_and_so_is_each_picture(tmp_path: Path) -> None:
    text = written(tmp_path, document())
    page = Page(text)
    assert page.tags.count("h1") == 1
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 4 + 3  # shares of work and bytes of two parts; sensitivity, ranges, decoder
    for picture in pictures:
        svg = ET.fromstring(picture)
        assert svg.get("role") == "img"
        assert svg.get("aria-label")
        for element in svg.iter():
            for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height"):
                value = element.get(name)
                assert value is None or math.isfinite(float(value.removesuffix("%"))), (element.tag, name, value)


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    text = written(tmp_path, document())
    page = Page(text)
    assert not {name for name, _ in page.attributes} & {"src", "srcset", "data", "action"}
    assert not re.search(r"url\(|@import|fetch\(", text)
    assert not set(page.tags) & {"link", "img", "iframe", "object", "embed"}


def test_the_page_is_small(tmp_path: Path) -> None:
    assert len(written(tmp_path, document()).encode()) < 400_000


def test_every_group_layer_matrix_and_reason_is_on_the_page(tmp_path: Path) -> None:
    report = document()
    text = Page(written(tmp_path, report)).text
    assert report.vision is not None and report.decoder is not None
    layers = [layer for group in report.vision.groups for layer in group.layers]
    assert len(layers) > 180 and len(report.decoder.matrices) == 97
    expected = {part.name for parts in (report.vision.groups, layers, report.decoder.matrices) for part in parts}
    expected |= {part.reason for parts in (report.vision.groups, layers) for part in parts}
    expected |= {str(fallback[key]) for fallback in report.fallbacks for key in ("node", "reason")}
    expected |= {*report.bytes, *report.calibration.skipped}
    assert not [each for each in expected if each not in text]


def test_the_summary_says_what_was_quantised_and_lost(tmp_path: Path) -> None:
    text = " ".join(Page(written(tmp_path, document())).text.split())
    for sentence in (
        "Calibration used 512 examples from data/textvqa train.json and took 21 minutes",
        "2 more could not be used",
        "The accepted loss of accuracy was 0.5 percentage points",
        "By the arithmetic of a GPU, the measured loss is 0.4 percentage points.",
        "Exact match was 61.3 % before quantisation and is 60.9 % after it",
        "83 (74.9 % of the work) compute in INT8",
        "97 matrices of the decoder were quantised with GPTQ",
        f"of the work: {GROUPED}",
        "--precision int8 --calib 'data/textvqa train.json' --accuracy-drop 0.5",
    ):
        assert sentence in text, sentence


def test_a_pair_of_figures_may_be_written_in_two_ways(tmp_path: Path) -> None:
    for figures in ({"anls_before": 0.5, "anls_after": 0.25}, {"anls": {"before": 0.5, "after": 0.25}}):
        text = " ".join(Page(written(tmp_path, dataclasses.replace(document(), evaluation=figures))).text.split())
        assert "Anls was 50.0 % before quantisation and is 25.0 % after it." in text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;{body}"
    text = written(tmp_path, hostile_copy(document(), hostile))
    page = Page(text)
    assert page.tags.count("script") == 1 and "img" not in page.tags and page.tags.count("main") == 1
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert hostile in page.text
    for picture in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ET.fromstring(picture)


def hostile_copy(value: Any, hostile: str) -> Any:
    """Every text of a document, but for those with a fixed vocabulary, and every key replaced."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        return type(value)(**{key: part if key == "decision" else hostile_copy(part, hostile) for key, part in parts.items()})
    if isinstance(value, dict):
        fixed = ("before", "after", "node", "op", "reason", "macs")
        return {key if key in fixed else f"{hostile}{key}": hostile_copy(each, hostile) for key, each in value.items()}
    if isinstance(value, list):
        return [hostile_copy(each, hostile) for each in value]
    return hostile if isinstance(value, str) else value


def test_int4_without_a_calibrated_encoder(tmp_path: Path) -> None:
    report = dataclasses.replace(
        document(), precision="int4", vision=None, accuracy_drop=None, decoder=decoder_report(4), fallbacks=[], evaluation={}
    )
    page = Page(written(tmp_path, report))
    assert read_json(tmp_path)["vision"] is None
    assert "The encoder was not calibrated" in page.text
    assert "Sensitivity" not in page.text and "--accuracy-drop" not in page.text


def test_a_document_of_almost_nothing(tmp_path: Path) -> None:
    report = QuantizationReport(
        "m", "int8", "0", "today", CalibrationData("x", 0, [], 0.0), None, VisionReport("max", None, 0, 1, 0, []), None
    )
    assert "The decoder was not calibrated" in Page(written(tmp_path, report)).text


def test_figures_that_are_not_finite_do_not_break_it(tmp_path: Path) -> None:
    report = document()
    assert report.vision is not None and report.decoder is not None
    groups = [
        dataclasses.replace(group, cosine_loss=loss) for group, loss in zip(report.vision.groups, (math.nan, math.inf, -1e-9), strict=False)
    ]
    matrices = [dataclasses.replace(report.decoder.matrices[0], error=math.nan, error_rounded=0.0)]
    vision = dataclasses.replace(report.vision, groups=groups, measured_cosine=1.0, predicted=math.nan)
    text = written(tmp_path, dataclasses.replace(report, vision=vision, decoder=DecoderReport("GPTQ", matrices)))
    assert not re.search(r"\b(nan|inf)\b", Page(text).text)
    assert "NaN" not in (tmp_path / JSON_NAME).read_text()
    assert read_json(tmp_path)["vision"]["predicted"] is None
