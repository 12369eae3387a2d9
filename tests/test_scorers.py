"""Public scorers of single images: each equals the reference formula or the forward pass of its library, at toy size."""

import json
import math

import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    GotOcr2ImageProcessor,
    GotOcr2Processor,
    PreTrainedTokenizerFast,
)

from cdm_lightning.config import asset_path
from cdm_lightning.data.shapes import all_words
from cdm_lightning.errors import UserError
from cdm_lightning.evaluate import build_metrics, evaluate
from cdm_lightning.metrics.aesthetic import Aesthetic
from cdm_lightning.metrics.extractors import OpenClipFeatures
from cdm_lightning.metrics.hps import HPSFeatures, WholeImage
from cdm_lightning.metrics.ocr import GotOcrReader, TextAccuracy, similarity, wanted_text
from cdm_lightning.metrics.pickscore import PickScore, PickScoreFeatures
from cdm_lightning.metrics.rewards import CLIPReward
from cdm_lightning.metrics.suite import Collected, MetricSuite
from cdm_lightning.metrics.weights_file import locate_weights
from cdm_lightning.pretraining.tiny_sd3 import build_clip_tokenizer

PROMPTS = ["a large red circle", "a small blue square at the top", "two green triangles"]
TINY_CLIP = f"local-dir:{asset_path('tiny_clip')}"


def pictures(height: int = 40, width: int = 40) -> Tensor:
    """Images whose numbers are those of an 8-bit file."""
    found = torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(0))
    return (found * 255).round() / 255


def scores(suite: MetricSuite, images: Tensor, name: str, prompts=PROMPTS) -> Tensor:
    collected = Collected()
    suite.measure(collected, images, list(prompts), list(range(len(images))))
    assert collected.features == {}  # 30,000 images would take a gigabyte
    return collected.scores[name][0]


# ---- PickScore


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A toy CLIP of transformers with made-up weights, and the folder of its processor."""
    torch.manual_seed(0)
    folder, other = (tmp_path_factory.mktemp(name) for name in ("pickscore", "processor"))
    tokenizer = build_clip_tokenizer(all_words())
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**small, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 12}
    vision = {**small, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8, logit_scale_init_value=math.log(50))
    CLIPModel(config).save_pretrained(folder)
    crop = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=crop, tokenizer=tokenizer).save_pretrained(other)
    if not (other / "preprocessor_config.json").is_file():
        crop.save_pretrained(other)
    return folder, other


def test_pickscore_is_the_logit_of_transformers(clip):
    model, processor = CLIPModel.from_pretrained(clip[0]).eval(), CLIPProcessor.from_pretrained(clip[1])
    images = pictures(40, 56)
    inputs = processor(
        text=PROMPTS, images=[to_pil_image(image) for image in images], padding=True, return_tensors="pt"
    )
    assert inputs["pixel_values"].shape == (3, 3, 32, 32)
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.diagonal()
    suite, _ = build_metrics(
        ["pickscore"], [f"feature.pickscore.pretrained={clip[0]}", f"feature.pickscore.processor={clip[1]}"]
    )
    found = scores(suite, images, "pickscore")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.01
    one_by_one = [scores(suite, images[i : i + 1], "pickscore", [PROMPTS[i]]) for i in range(3)]
    torch.testing.assert_close(torch.cat(one_by_one), expected, atol=1e-4, rtol=1e-4)  # padding plays no part


def test_evaluate_gives_it_intervals_and_keeps_no_features(clip, tmp_path):
    options = [f"feature.pickscore.pretrained={clip[0]}", f"feature.pickscore.processor={clip[1]}"]
    models = [[str(asset_path("tiny_sd3")), "steps=1,2"]]
    found = evaluate(models, "shapes_heldout", tmp_path, ["pickscore"], options, count=4, resamples=20)
    assert set(found.ladder.rows[0]) == {"sampler", "pickscore", "network_calls", "seconds_per_image"}
    gap = found.comparison.differences["tiny_sd3 2 steps"]["pickscore"]
    assert gap.value == pytest.approx(found.ladder.rows[1]["pickscore"] - found.ladder.rows[0]["pickscore"], abs=1e-6)
    with safe_open(next((tmp_path / "measured").iterdir()), "pt") as file:
        assert {name for name in file.keys() if "pickscore" in name} == {"scores/pickscore"}  # noqa: SIM118
    assert found.ladder.settings["files"]  # hashes of the weights: other weights are measured anew


def test_a_long_prompt_is_cut_and_not_refused(clip):
    features = PickScoreFeatures(*map(str, clip))
    assert features.encode_texts([" ".join(["red"] * 50), "red"]).shape == (2, 8)


def test_what_is_missing_of_pickscore_is_said_in_one_line(clip, tmp_path):
    with pytest.raises(UserError, match=r"the CLIP folder .*nowhere does not exist; .*feature\.pickscore\.pretrained"):
        PickScoreFeatures(str(tmp_path / "nowhere"), str(clip[1]))
    with pytest.raises(UserError, match=r"has no tokenizer_config\.json|has no preprocessor_config\.json"):
        PickScoreFeatures(str(clip[0]), str(clip[0]))
    (tmp_path / "config.json").write_text((clip[0] / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")  # a pickle, which is not read
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        PickScoreFeatures(str(tmp_path), str(clip[1]))
    suite = MetricSuite({"p": PickScore("means")}, {"means": Means()})
    with pytest.raises(UserError, match="must be a PickScoreFeatures"):
        scores(suite, pictures(), "p")


class Means(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))

    def encode_texts(self, prompts) -> Tensor:
        return torch.ones(len(prompts), 3)


# ---- HPSv2.1


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    """The name of a toy architecture of open_clip, and a file of weights in the form of the authors' file."""
    folder = tmp_path_factory.mktemp("hps")
    vision = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    (folder / "toy-hps.json").write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder / "toy-hps.json")
    torch.manual_seed(0)
    weights = open_clip.create_model("toy-hps").state_dict()
    torch.save({"state_dict": weights, "epoch": 3}, folder / "HPS_toy.pt")
    return "toy-hps", folder / "HPS_toy.pt"


def test_hps_is_100_times_the_similarity_of_the_authors_code(hps):
    name, file = hps
    model, _, transform = open_clip.create_model_and_transforms(name)
    model.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
    images = pictures(64, 64)
    prepared = torch.stack([transform(to_pil_image(image)) for image in images])
    with torch.no_grad():
        own, texts, _ = model.eval()(prepared, open_clip.get_tokenizer(name)(PROMPTS))
    suite, _ = build_metrics(["hps"], [f"feature.hps.weights={file}", f"feature.hps.model={name}"])
    found = scores(suite, images, "hps")
    torch.testing.assert_close(found / 100, (own @ texts.T).diagonal(), atol=2e-3, rtol=0)  # PIL rounds when it resizes
    assert (own @ texts.T).diagonal().std() > 5e-3
    torch.testing.assert_close(100 * CLIPReward(name, str(file))(images, PROMPTS), found)  # as a reward of training


def test_hps_sees_the_whole_of_an_image_that_is_not_square():
    images = torch.ones(1, 3, 32, 64)
    found = WholeImage(16)(images)
    assert found.shape == (1, 3, 16, 16)
    torch.testing.assert_close(found[:, :, 4:12], torch.ones(1, 3, 8, 16))
    assert found[:, :, :4].abs().max() == found[:, :, 12:].abs().max() == 0
    assert torch.equal(WholeImage(64)(torch.ones(1, 3, 64, 64)), torch.ones(1, 3, 64, 64))


def test_weights_that_are_code_are_not_run_and_what_is_wrong_is_said(hps, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    for file, expected in (
        ("nowhere.pt", r"are not a file; set feature\.hps\.weights to a file, or to OWNER/NAME/FILE"),
        ("evil.pt", r"cannot be read as weights .*set feature\.hps\.weights"),
        ("list.pt", "holds no tensors by name"),
        ("other.pt", "cannot load the CLIP model toy-hps"),
    ):
        with pytest.raises(UserError, match=expected) as refused:
            HPSFeatures(str(tmp_path / file), hps[0])
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()


# ---- aesthetic score


@pytest.fixture
def predictor(tmp_path):
    """The aesthetic predictor as its authors define it, with made-up weights, in files of both kinds."""
    torch.manual_seed(0)
    width = OpenClipFeatures(TINY_CLIP)(torch.rand(1, 3, 32, 32)).shape[1]
    layers = nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    ).eval()
    tensors = {f"layers.{name}": value for name, value in layers.state_dict().items()}
    torch.save(tensors, tmp_path / "linearMSE.pth")
    save_file(tensors, tmp_path / "linearMSE.safetensors")
    return layers, tmp_path


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_the_aesthetic_score_is_that_of_the_authors_layers(ending, predictor):
    layers, folder = predictor
    options = [f"metric.aesthetic.weights={folder / f'linearMSE.{ending}'}"]
    options += [f"feature.clip_l.model={TINY_CLIP}", "feature.clip_l.pretrained=null"]
    suite, _ = build_metrics(["aesthetic"], options)
    images = pictures()
    embeddings = suite.extractors["clip_l"](images)
    with torch.no_grad():
        expected = layers(embeddings / embeddings.norm(dim=1, keepdim=True))[:, 0]
    torch.testing.assert_close(scores(suite, images, "aesthetic"), expected)


def test_another_predictor_and_another_clip_are_refused(predictor, tmp_path):
    _, folder = predictor
    torch.save({"layers.0.weight": torch.zeros(2, 3)}, tmp_path / "v1.pth")
    with pytest.raises(UserError, match="is another aesthetic predictor than V2"):
        Aesthetic(str(tmp_path / "v1.pth"))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "none.pth")
    with pytest.raises(UserError, match="has no aesthetic predictor"):
        Aesthetic(str(tmp_path / "none.pth"))
    suite = MetricSuite({"a": Aesthetic(str(folder / "linearMSE.pth"), "means")}, {"means": Means()})
    with pytest.raises(
        UserError, match=r"have 3 dimensions, but the aesthetic predictor needs \d+; set feature\.means"
    ):
        scores(suite, pictures(), "a")
    with pytest.raises(UserError, match=r"metric\.a needs the feature extractor feature\.means, which is missing"):
        MetricSuite({"a": Aesthetic(str(folder / "linearMSE.pth"), "means")}, {})


# ---- OCR accuracy


class FixedReader:
    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def read(self, images: Tensor) -> list[str]:
        return list(self.texts)


def test_ocr_accuracy_is_one_minus_the_normalised_edit_distance():
    prompts = ['a sign that says "Open Now"', "a shirt with “HELLO” and “world”", 'a cup, "tea"']
    suite = MetricSuite({"ocr": TextAccuracy(FixedReader("OPEN  now", "hallo wrld", ""))})
    found = scores(suite, pictures(), "ocr", prompts)
    torch.testing.assert_close(found, torch.tensor([1.0, 1 - 2 / 11, 0.0]))
    collected = Collected()
    suite.measure(collected, pictures(), prompts, [0, 1, 2])
    figures = suite.figures({"s": collected})["s"]
    assert figures == pytest.approx({"ocr_accuracy": float(found.mean()), "ocr_exact": 1 / 3})


@pytest.mark.parametrize(
    ("read", "wanted", "expected"),
    [
        ("kitten", "sitting", 1 - 3 / 7),
        ("sale sale sale", "sale", 1 - 10 / 14),
        ("x" * 300 + "end", "end", 1 - 300 / 303),
        ("ＡＢ", "ab", 1.0),
        ("abc", "xyz", 0.0),
    ],
)
def test_similarity_in_closed_form(read, wanted, expected):
    assert similarity(read, wanted) == pytest.approx(expected, abs=1e-9)
    assert similarity(wanted, read) == pytest.approx(expected, abs=1e-9)


def test_a_prompt_without_quoted_text_is_refused_and_an_apostrophe_is_no_quotation_mark():
    assert wanted_text("it's a cat's \"hat\" and „Hut“, «chapeau» and 「帽子」") == "hat Hut chapeau 帽子"
    suite = MetricSuite({"ocr": TextAccuracy(FixedReader())})
    suite.check_prompts(['a sign "x"'], 1)
    for prompt in ("it's a cat's hat", 'an empty "" sign', 'a blank " " sign', 'a lone " mark'):
        with pytest.raises(
            UserError, match=r"metric\.ocr cannot measure images of prompt 1 .*no text in quotation marks"
        ):
            suite.check_prompts([prompt], 1)


@pytest.fixture(scope="module")
def got_ocr(tmp_path_factory):
    """A toy GOT-OCR 2.0 with made-up weights, which writes random letters."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("got_ocr")
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*marks, *letters])}
    plain = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token=marks[0], pad_token=marks[0], additional_special_tokens=marks[1:]
    )
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = {**small, "model_type": "qwen2", "vocab_size": len(vocab), "intermediate_size": 32, "num_key_value_heads": 2}
    vision = {
        **small,
        "image_size": 64,
        "patch_size": 1,
        "output_channels": 8,
        "mlp_dim": 16,
        "global_attn_indexes": [],
    }
    config = GotOcr2Config(
        text_config=text, vision_config=vision, image_token_index=vocab["<imgpad>"], tie_word_embeddings=False
    )
    model = GotOcr2ForConditionalGeneration(config)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.5) if weight.ndim > 1 else None
    nn.init.zeros_(model.lm_head.weight[: len(marks)])
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 0, 0
    model.save_pretrained(folder)
    squash = GotOcr2ImageProcessor(size={"height": 64, "width": 64})
    GotOcr2Processor(squash, tokenizer).save_pretrained(folder)
    squash.save_pretrained(folder)
    return folder


def test_the_reader_reads_what_transformers_generates(got_ocr):
    suite, _ = build_metrics(["ocr"], [f"metric.ocr.reader.pretrained={got_ocr}", "metric.ocr.reader.longest=6"])
    reader, images = suite.metrics["ocr"].reader, pictures(64, 64)[:2]
    processor = GotOcr2Processor.from_pretrained(got_ocr)
    model = GotOcr2ForConditionalGeneration.from_pretrained(got_ocr).eval()
    expected = []
    for image in images:
        inputs = processor(to_pil_image(image), return_tensors="pt")
        written = model.generate(**inputs, do_sample=False, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.decode(written, skip_special_tokens=True).strip())
    assert reader.read(images) == expected
    assert all(expected)
    assert expected[0] != expected[1]


def test_a_folder_without_the_reader_is_said(got_ocr, tmp_path):
    with pytest.raises(UserError, match=r"the GOT-OCR folder .* does not exist; .*metric\.ocr\.reader\.pretrained"):
        GotOcrReader(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no preprocessor_config\.json"):
        GotOcrReader(str(tmp_path))


# ---- files of weights on the hub


def test_a_file_on_the_hub_is_downloaded_alone_and_what_is_missing_there_is_said(tmp_path, monkeypatch):
    asked = []

    def download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        if repository == "owner/offline":
            raise OSError("no network")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (tmp_path / "a.pt").write_bytes(b"")
    assert locate_weights("owner/name/a.pt", "o") == tmp_path / "a.pt"
    assert asked == [("owner/name", ["a.pt"])]
    with pytest.raises(UserError, match=r"owner/name on the Hugging Face hub has no file b\.pt; correct o"):
        locate_weights("owner/name/b.pt", "o")
    with pytest.raises(
        UserError, match=r"cannot be downloaded from the Hugging Face hub \(no network\); without a network"
    ):
        locate_weights("owner/offline/a.pt", "o")
    for wrong in ("owner/name/../a.pt", "owner/name/*.pt", "owner/name/a.pkl", str(tmp_path)):
        with pytest.raises(UserError, match="are not a file; set o to a file, or to OWNER/NAME/FILE"):
            locate_weights(wrong, "o")
