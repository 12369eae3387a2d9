"""The scripts of docs/other-scorers.md: what they write from a manifest is what `evaluate --scores` reads."""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from cdm_lightning.evaluation.given_scores import Images, read_scores
from cdm_lightning.evaluation.store import ImageFiles, file_name

DOCS = Path(__file__).parents[1] / "docs"
NAMES, PROMPTS = ["t 1 step", "t 2 steps"], ["a cat", "two “dogs”\u2028and a bird", "a red cup"]
IMAGES = Images(NAMES, PROMPTS, seed=0)


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / "examples" / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def save(folder: Path, seed: int = 0) -> Path:
    """The images of two samplers as --save-images writes them; the pixels of an image are its number."""
    files = ImageFiles(folder, PROMPTS, seed)
    for place, name in enumerate(NAMES):
        for index in range(3):
            files.add(name, torch.full((1, 3, 4, 4), (100 * seed + 10 * place + index) / 255), [index])
        files.finish(name, f"mark {place}")
    return folder


def pixel(path: str | Path) -> int:
    from PIL import Image

    with Image.open(path) as image:
        return image.getpixel((0, 0))[0]


def test_scores_of_a_scorer_are_read_by_evaluate_and_a_stopped_script_goes_on(tmp_path, monkeypatch):
    script, images, output = example("score_images"), save(tmp_path / "images"), tmp_path / "mine.jsonl"
    asked = []

    def scorer(prompts, paths):
        asked.extend(paths)
        if len(asked) == scorer.stop:
            raise KeyboardInterrupt
        assert [PROMPTS.index(prompt) for prompt in prompts] == [pixel(path) % 10 for path in paths]
        return [pixel(path) / 2 for path in paths]

    monkeypatch.setitem(script.SCORERS, "hpsv3", lambda: scorer)
    scorer.stop = 6
    with pytest.raises(KeyboardInterrupt):
        script.main(["hpsv3", str(images), str(output), "--batch", "2"])
    output.write_text(output.read_text() + '{"model": "t 2 st')  # cut by a kill
    scorer.stop, asked[:] = None, []
    script.main(["hpsv3", str(images), str(output), "--batch", "2"])
    assert len(asked) == 2
    found = read_scores([output], IMAGES, ["colour"])
    assert found.values == {"hpsv3": {NAMES[0]: [0.0, 0.5, 1.0], NAMES[1]: [5.0, 5.5, 6.0]}}
    assert {name: mark for name, (mark, _) in found.marks.items()} == {NAMES[0]: "mark 0", NAMES[1]: "mark 1"}
    script.main(["hpsv3", str(images), str(output)])
    assert len(asked) == 2  # complete: the scorer is not even loaded

    ImageFiles(images, PROMPTS, 0).finish(NAMES[1], "other weights")
    script.main(["hpsv3", str(images), str(output)])
    assert len(asked) == 5  # images that were made anew are scored anew
    one = tmp_path / "one.jsonl"
    script.main(["hpsv3", str(images / file_name(NAMES[0])), str(one)])
    assert len(one.read_text().split("\n")) == 4
    with pytest.raises(SystemExit, match=r"has no manifest\.jsonl"):
        script.main(["hpsv3", str(tmp_path), str(one)])


def test_the_scorers_are_called_as_their_packages_define_it(tmp_path, monkeypatch):
    script, paths = example("score_images"), ["a.png", "b.png"]

    class HPSv3RewardInferencer:  # as in hpsv3 1.0.0
        def __init__(self, config_path=None, checkpoint_path=None, device="cuda"): ...

        def reward(self, image_paths, prompts):
            assert (image_paths, prompts) == (paths, PROMPTS[:2])
            return torch.tensor([[1.5, 9.0], [2.5, 9.0]])  # mean and spread

    class Loaded(torch.nn.Module):  # as in image-reward 1.5
        def score(self, prompt, image):
            assert isinstance(image, str)
            return {"a.png": 0.5, "b.png": -1.0}[image]

    monkeypatch.setitem(sys.modules, "hpsv3", SimpleNamespace(HPSv3RewardInferencer=HPSv3RewardInferencer))
    loaded = {"ImageReward-v1.0": Loaded()}
    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=loaded.__getitem__))
    assert script.hpsv3()(PROMPTS[:2], paths) == [1.5, 2.5]
    assert script.imagereward()(PROMPTS[:2], paths) == [0.5, -1.0]


def test_images_of_several_seeds_are_arranged_as_geneval_reads_them_and_its_results_come_back(tmp_path):
    script, name = example("geneval_folders"), file_name(NAMES[1])
    folders = [save(tmp_path / f"out{seed}", seed) / name for seed in (0, 1)]
    metadata = tmp_path / "evaluation_metadata.jsonl"
    lines = [{"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": text} for text in PROMPTS]
    metadata.write_text("".join(json.dumps(line) + "\n" for line in lines))
    place = tmp_path / "geneval"
    script.main(["write", str(metadata), str(place), *map(str, folders)])

    results = []  # read as GenEval's evaluate_images.py reads them
    for folder in sorted(place.iterdir()):
        assert folder.name.isdigit()
        entry = json.loads((folder / "metadata.jsonl").read_text())
        assert entry == lines[int(folder.name)]
        for sample in sorted((folder / "samples").iterdir()):
            assert re.match(r"\d+\.png", sample.name)
            assert pixel(sample) == 100 * int(sample.stem) + 10 + int(folder.name)
            results.append({"filename": str(sample), "correct": pixel(sample) in (10, 11, 111)})
    assert len(results) == 6
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in results))
    output = tmp_path / "geneval.jsonl"
    script.main(["scores", str(tmp_path / "results.jsonl"), str(folders[0]), str(output)])
    found = read_scores([output], Images([NAMES[1]], PROMPTS, 0), [])
    assert found.values == {"geneval": {NAMES[1]: [0.5, 1.0, 0.0]}}

    with pytest.raises(SystemExit, match="exists; pass a new folder"):
        script.main(["write", str(metadata), str(place), *map(str, folders)])
    metadata.write_text(json.dumps(lines[1]) + "\n")
    with pytest.raises(SystemExit, match="has no image for line 1"):
        script.main(["write", str(metadata), str(tmp_path / "new"), str(folders[0])])
    assert not (tmp_path / "new").exists()


def test_the_commands_of_the_page_are_understood():
    page = (DOCS / "other-scorers.md").read_text(encoding="utf-8")
    seen = set()
    for name, words in re.findall(r"^\S*python (score_images|geneval_folders)\.py (.+)$", page, re.MULTILINE):
        given = vars(example(name).parser().parse_args(shlex.split(words)))
        seen.add((name, given.get("scorer") or given["command"]))
    assert seen == {
        ("score_images", "hpsv3"),
        ("score_images", "imagereward"),
        ("geneval_folders", "write"),
        ("geneval_folders", "scores"),
    }
