"""Prompts from Hugging Face data sets: saved folders, folders of data files and streams, without a network."""

import pickle
from pathlib import Path

import pytest

from cdm_lightning.config import build, compose
from cdm_lightning.data.dataset import PromptDataset
from cdm_lightning.errors import UserError

datasets = pytest.importorskip("datasets")
TEXTS = [f"prompt {number}" for number in range(30)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    """Keep the library's copies out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


@pytest.fixture
def saved(tmp_path) -> Path:
    rows = datasets.Dataset.from_dict({"prompt": [*TEXTS, None, " ", TEXTS[0]], "width": list(range(33))})
    datasets.DatasetDict({"train": rows, "test": rows.select(range(3))}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def texts(prompts: PromptDataset) -> list[str]:
    return [prompts[i] for i in range(len(prompts))]


def test_a_saved_data_set_is_mapped(saved):
    prompts = PromptDataset(saved, deduplicate=True)
    assert texts(prompts) == TEXTS
    assert (prompts.counts.blank, prompts.counts.repeated) == (2, 1)
    assert pickle.loads(pickle.dumps(prompts))[7] == TEXTS[7]
    assert texts(PromptDataset(saved, split="test")) == TEXTS[:3]
    assert len(PromptDataset(saved / "train")) == 31  # one split alone
    assert prompts.source.rows.cache_files  # Arrow files on the disk, not memory


def test_streams_are_copied_once(saved, tmp_path):
    cache = tmp_path / "copies"
    prompts = PromptDataset(saved, streaming=True, limit=12, cache_folder=cache)
    assert texts(prompts) == TEXTS[:12]
    saved.rename(tmp_path / "gone")
    assert texts(PromptDataset(saved, streaming=True, limit=12, cache_folder=cache)) == TEXTS[:12]
    assert len(list(cache.iterdir())) == 1


def test_a_folder_of_data_files(saved, tmp_path):
    (tmp_path / "files").mkdir()
    datasets.load_from_disk(str(saved / "train")).to_parquet(tmp_path / "files/train.parquet")
    assert texts(PromptDataset(tmp_path / "files", deduplicate=True)) == TEXTS
    assert texts(PromptDataset(tmp_path / "files", streaming=True, limit=5, cache_folder=tmp_path / "c")) == TEXTS[:5]


def test_bad_data_sets_are_refused_in_one_line(saved, tmp_path):
    cases = [
        (PromptDataset, {"field": "caption"}, f"{saved}: no column 'caption'; set field to one of its"),
        (PromptDataset, {"field": "width"}, "the column 'width' contains int, not strings"),
        (PromptDataset, {"split": "all"}, f"{saved}: no split 'all'; set split to one of these: train, test"),
        (PromptDataset, {"limit": 3}, "limit=3 needs streaming=true"),
        (PromptDataset, {"dataset": tmp_path / "none"}, "none: the data set cannot be loaded"),
    ]
    for made, arguments, message in cases:
        with pytest.raises(UserError) as error:
            made(**{"dataset": saved, **arguments})
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_the_configuration_builds_a_data_set(saved, tmp_path):
    config = compose(["data=dataset", f"data.train.dataset={saved}", f"output_dir={tmp_path}"])
    assert len(build(config, "data").train) == 31
    with pytest.raises(
        UserError, match=r"data.train.dataset is required, but has no value; set data.train.dataset=VALUE"
    ):
        build(compose(["data=dataset", f"output_dir={tmp_path}"]), "data")
