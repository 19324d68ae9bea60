"""The demo's tokenizer, token rows, targets, kernels and checkpoint: what training and export rest on."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import torch.nn.functional as F  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from examples.demo_training.checkpoint import export_checkpoint, load_checkpoint, native_tensors, save_state  # noqa: E402
from examples.demo_training.data import (  # noqa: E402
    Batch,
    cell_targets,
    collate,
    count_targets,
    draw_batches,
    drawn_size,
    place_targets,
    relation_targets,
    resize_scene,
    seen_size,
    slot_targets,
)
from examples.demo_training.drawing.picture import COLOURS, DIGITS, LETTERS, Mark, Question  # noqa: E402
from examples.demo_training.evaluate import answer_scenes, score  # noqa: E402
from examples.demo_training.language import AFTER_IMAGE, BEFORE_IMAGE, SPECIAL_TOKENS, Prompter, build_tokenizer  # noqa: E402
from examples.demo_training.model import CHARACTERS, GLYPHS, TINTS, DemoConfig, DemoModel, count_parameters, fold  # noqa: E402
from examples.demo_training.scenes import make_scene  # noqa: E402
from examples.demo_training.train import (  # noqa: E402
    Recipe,
    Trainer,
    learning_rate,
    open_trainer,
    parse_sizes,
    step,
    train_further,
)
from examples.demo_training.training_kernels import DepthwiseConv, gelu, load_kernels  # noqa: E402
from fastvlm_edge.inputs.preprocess import preprocess, to_pixels  # noqa: E402

SMALL = DemoConfig(depths=(1, 1, 1, 1, 1), dims=(8, 16, 32, 32, 32), hidden=32, layers=2, heads=2, kv_heads=1, intermediate=48)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer(384, pictures=400)


@pytest.fixture(scope="module")
def model() -> DemoModel:
    torch.manual_seed(0)
    model = DemoModel(SMALL)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as if it had been trained
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(module.weight, 1, 0.2)
            torch.nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


@pytest.mark.parametrize("text", ["0042", "STOP", "7TV8", "top left", "How many circles are there?", "Zähler ☃ 漢字\t\r\n  x", ""])
def test_tokenizer_gives_back_any_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_tokenizer_spells_digits_and_capitals(tokenizer: Tokenizer) -> None:
    for text in (DIGITS, LETTERS, "W9MA", "1111", "STOPSTOP"):
        assert tokenizer.encode(text).tokens == list(text)


def test_tokenizer_is_small_and_repeatable(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() <= 384
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert build_tokenizer(384, pictures=400).to_str() == tokenizer.to_str()


def test_prompt_is_the_text_of_the_chat_template(tokenizer: Tokenizer) -> None:
    prompter = Prompter(tokenizer, 9)
    assert prompter.beginning[-9:] == [-1 - k for k in range(9)]
    assert tokenizer.decode(prompter.beginning[:-9], skip_special_tokens=False) == BEFORE_IMAGE
    assert tokenizer.decode(prompter.prompt("Why?"), skip_special_tokens=False) == AFTER_IMAGE.format(prompt="Why?")


def test_packed_questions_answer_as_if_alone(tokenizer: Tokenizer, model: DemoModel) -> None:
    prompter = Prompter(tokenizer, 9)
    questions = [Question("How many stars are there?", "3", "count"), Question("What colour is the star?", "blue", "colour")]
    scenes = [make_scene("train", 0, 0, kind="count") for _ in range(3)]
    for scene, asked in zip(scenes, (questions, questions[:1], questions[1:]), strict=True):
        scene.questions = asked
    features = torch.randn(1, 9, SMALL.hidden)
    with torch.no_grad():
        together, *alone = (model.logits(collate([scene], prompter).packed[0][1], features) for scene in scenes)
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_targets_name_what_is_in_the_cell() -> None:
    glyphs, tints = cell_targets([Mark("star", "blue", 40, 24, 30, 30), Mark("7", "", 100, 100, 4, 4)], 12, 12)
    assert GLYPHS[glyphs[1, 2]] == "star" and GLYPHS[glyphs[6, 6]] == "7" and glyphs[11, 0] == 0
    assert tints[1, 2] and not tints[6, 6] and (glyphs > 0).sum() <= 5
    assert [CHARACTERS[i] for i in slot_targets("0A9")] == ["0", "A", "9", "", "", ""]
    scene = make_scene("train", 0, 0, kind="count")
    assert count_targets(scene)[-1] == len(scene.marks)
    assert (count_targets(make_scene("train", 0, 0, kind="reading")) == -1).all()


def test_relations_tell_colour_place_and_shape_of_what_is_there_once() -> None:
    scene = make_scene("train", 0, 0, kind="count")
    scene.marks = [Mark("star", "blue", 40, 150, 30, 30), Mark("cross", "red", 150, 40, 30, 30), Mark("cross", "green", 96, 96, 30, 30)]
    colour, side, level, shape = np.split(relation_targets(scene), [5, 10, 15])
    assert colour.tolist() == [-1, -1, -1, COLOURS.index("blue"), -1]
    assert side.tolist() == [-1, -1, -1, 0, -1] and level.tolist() == [-1, -1, -1, 1, -1]
    assert shape.tolist() == [4, 4, 3, -1, -1, -1]
    assert (relation_targets(make_scene("train", 0, 0, kind="reading")) == -1).all()
    shapes, tints = place_targets(scene)
    assert shapes.tolist() == [[0, 0, 5], [0, 5, 0], [4, 0, 0]]
    assert [[TINTS[tint] for tint in row] for row in tints] == [["", "", "red"], ["", "green", ""], ["blue", "", ""]]


def test_processes_share_a_batch_without_overlap(tokenizer: Tokenizer) -> None:
    def first(rank: int, ranks: int) -> np.ndarray:
        batches = draw_batches(tokenizer, seed=0, start=8, batch=4, rank=rank, ranks=ranks, image_sizes=(64,))
        return next(batches).pixels.numpy()

    whole = first(0, 1)
    assert np.array_equal(whole[0::2], first(0, 2)) and np.array_equal(whole[1::2], first(1, 2))


def test_a_batch_has_one_size_that_its_first_picture_decides(tokenizer: Tokenizer) -> None:
    def batches(start: int, rank: int) -> Iterator[Batch]:
        return draw_batches(tokenizer, seed=3, start=start, batch=4, rank=rank, ranks=2, image_sizes=(64, 128), warm_up=0)

    whole = list(itertools.islice(batches(0, 0), 6))
    sizes = [batch.pixels.shape[-1] for batch in whole]
    assert set(sizes) == {64, 128}
    for batch, size in zip(whole, sizes, strict=True):
        assert batch.pixels.shape[1:] == (3, size, size) and batch.glyphs.shape[1:] == (size // 16, size // 16)
        assert batch.place_shapes.shape[1:] == (size // 64, size // 64)
        assert {packed.input_ids.min().item() for _, packed in batch.packed} == {-((size // 64) ** 2)}, "one id for each visual token"
    assert [batch.pixels.shape[-1] for batch in itertools.islice(batches(0, 1), 6)] == sizes, "the other process sees the same sizes"
    assert torch.equal(next(batches(12, 0)).pixels, whole[3].pixels), "resumed at picture 12"


def test_larger_sizes_are_seen_more_often_and_pictures_are_drawn_at_several() -> None:
    seen = [seen_size(0, first, (128, 192, 256)) for first in range(4000)]
    assert [seen.count(size) / 4000 for size in (128, 192, 256)] == pytest.approx([2 / 9, 3 / 9, 4 / 9], abs=0.03)
    assert {drawn_size(0, picture, 256) for picture in range(100)} == {192, 256, 384}


def test_a_resized_scene_is_what_the_runtime_sees_with_its_targets() -> None:
    scene = make_scene("train", 0, 0, kind="position", size=384)
    resized = resize_scene(scene, 128)
    assert np.array_equal(np.asarray(resized.image), to_pixels(preprocess(scene.image, 128, "pad")))
    assert resized.questions == scene.questions and (relation_targets(resized) == relation_targets(scene)).all()
    for before, after in zip(scene.marks, resized.marks, strict=True):
        assert (after.x, after.y, after.width, after.height) == pytest.approx(
            (before.x / 3, before.y / 3, before.width / 3, before.height / 3)
        )
    assert resize_scene(scene, 384) is scene


def test_image_sizes_are_multiples_of_the_stride() -> None:
    assert parse_sizes("256,128,192") == (128, 192, 256)
    with pytest.raises(argparse.ArgumentTypeError, match=r"200.*multiples of 64"):
        parse_sizes("128,200")


def test_folding_keeps_the_features(model: DemoModel) -> None:
    pixels = torch.rand(2, 3, 192, 192)
    folded = DemoModel(SMALL)
    folded.load_state_dict(model.state_dict())
    fold(folded.eval().vision.vision_tower)
    with torch.no_grad():
        before, after = model.vision(pixels).features, folded.vision(pixels).features
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def test_export_loads_back_and_answers_alike(model: DemoModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    export_checkpoint(model, tokenizer, tmp_path)
    names = set(native_tensors(model))
    assert "model.vision_tower.timm_model.stages.3.pos_emb.reparam_conv.weight" in names
    assert "model.multi_modal_projector.linear_2.bias" in names and "model.language_model.layers.1.self_attn.q_proj.bias" in names
    assert not any("head" in name for name in names)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "fast_vlm" and config["image_seq_length"] == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    loaded, again = load_checkpoint(tmp_path)
    assert again.to_str() == tokenizer.to_str() and loaded.config == SMALL
    scene = make_scene("heldout", 0, 0)
    pixels = torch.from_numpy(np.asarray(scene.image).copy()).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        ours, theirs = model.vision(pixels).features, loaded.vision(pixels).features
    assert float((ours - theirs).norm() / ours.norm()) < 0.03, "bfloat16 rounding only"
    assert len(answer_scenes(loaded, Prompter(again, 9), [scene])) == 1


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_training_goes_on_from_a_checkpoint_and_after_a_kill(
    model: DemoModel, tokenizer: Tokenizer, one_thread: None, tmp_path: Path
) -> None:
    export_checkpoint(model, tokenizer, tmp_path / "before")
    recipe = train_further(Recipe(pictures=40, image_sizes=(64, 128), batch=4))

    def steps(trainer: Trainer, count: int) -> None:
        batches = draw_batches(
            tokenizer,
            seed=recipe.seed,
            start=trainer.seen,
            batch=4,
            rank=0,
            ranks=1,
            image_sizes=recipe.image_sizes,
            warm_up=recipe.warm_up,
        )
        for batch in itertools.islice(batches, count):
            step(trainer, recipe, batch)

    whole = open_trainer(tmp_path, recipe, tmp_path / "before")
    begun = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    assert torch.equal(
        begun["language_model.embed_tokens.weight"], load_checkpoint(tmp_path / "before")[0].language_model.embed_tokens.weight
    )
    steps(whole, 2)
    save_state(tmp_path / "state.pt", whole.state())
    steps(whole, 2)
    changed = {name for name, tensor in whole.model.state_dict().items() if not torch.equal(tensor, begun[name])}
    assert "vision.vision_tower.stem.0.reparam_conv.bias" in changed and not any("running_" in name for name in changed)

    resumed = open_trainer(tmp_path, recipe)
    assert resumed.seen == 8 and resumed.folded
    steps(resumed, 2)
    for name, tensor in whole.averaged.state_dict().items():
        assert torch.equal(tensor, resumed.averaged.state_dict()[name]), name
    export_checkpoint(resumed.averaged, resumed.tokenizer, tmp_path / "after")
    assert load_checkpoint(tmp_path / "after")[0].config == SMALL


def test_demo_checkpoint_stays_below_twelve_megabytes() -> None:
    assert 2 * count_parameters() < 11e6


def test_score_counts_by_kind() -> None:
    scene = make_scene("heldout", 0, 1, kind="reading")
    scores = score([(scene, scene.text), (scene, "")])
    assert scores["reading"] == {"questions": 2, "right": 1, "exact_match": 0.5} and scores["all"]["right"] == 1


def test_learning_rate_rises_then_falls() -> None:
    recipe = Recipe(pictures=100_000)
    rates = [learning_rate(recipe, seen) for seen in (0, 3_000, 6_000, 50_000, 100_000, 200_000)]
    assert rates[0] < rates[1] < rates[2] == recipe.peak_rate > rates[3] > rates[4] == pytest.approx(recipe.last_rate) == rates[5]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "multiplier", "kernel", "stride", "size"),
    [(24, 1, 3, 2, 32), (24, 2, 7, 2, 20), (24, 1, 7, 1, 13), (8, 3, 3, 1, 5), (384, 1, 7, 1, 3)],
)
@pytest.mark.parametrize("bias", [False, True])
def test_depthwise_kernels_agree_with_torch(channels: int, multiplier: int, kernel: int, stride: int, size: int, bias: bool) -> None:
    if load_kernels() is None:
        pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    conv = DepthwiseConv(channels, channels * multiplier, kernel, stride, kernel // 2, groups=channels, bias=bias)
    x = torch.randn(2, channels, size, size).bfloat16().requires_grad_()
    wide = x.detach().float().requires_grad_()
    expected = F.conv2d(wide, conv.weight, conv.bias, stride, kernel // 2, 1, channels)
    gradient = torch.randn_like(expected).bfloat16()
    expected.backward(gradient.float())
    weight_gradient, conv.weight.grad = conv.weight.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x)
    out.backward(gradient)
    for ours, theirs in ((out, expected), (x.grad, wide.grad), (conv.weight.grad, weight_gradient)):
        assert ours is not None and theirs is not None
        assert float((ours.detach().float() - theirs.detach()).norm() / theirs.detach().norm()) < 5e-3


@pytest.mark.slow
def test_gelu_kernel_agrees_with_torch() -> None:
    if load_kernels() is None:
        pytest.skip("no C++ compiler")
    x = torch.linspace(-12, 12, 4001).bfloat16().requires_grad_()
    wide = x.detach().float().requires_grad_()
    F.gelu(wide).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        out = gelu(x)
    out.sum().backward()
    assert torch.allclose(out.float(), F.gelu(wide), atol=2e-3, rtol=1e-2)
    assert torch.allclose(x.grad.float(), wide.grad, atol=5e-3, rtol=1e-2)
