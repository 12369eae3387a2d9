"""Prompts of different lengths on processes that share one network: the number of network calls must not depend on them."""

from processes import train_together

SHORT, LONG = "a ring", " ".join(["a large red circle above a small blue square"] * 4)


def test_sharded_ranks_with_texts_of_different_lengths_make_the_same_calls(tiny_pipeline_folder, tmp_path):
    """A rank with a long text called the network once more for the empty text than the other, which waited for ever."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{SHORT}\n{LONG}\n", encoding="utf-8")
    train_together(
        2,
        [
            "experiment=tiny_sd3_cdm",
            "callbacks=none",
            "strategy=fsdp2",
            "trainer.accelerator=cpu",
            "trainer.devices=2",
            "trainer.limit_val_batches=0",
            "trainer.max_steps=2",
            "data.batch_size=1",
            "schedule.length.high=3",
            "text_cache.remember_up_to=0",
            "backbone.compact_text=5",
            f"backbone.pretrained={tiny_pipeline_folder}",
            f"data.train.path={prompts}",
            f"data.val.path={prompts}",
            f"output_dir={tmp_path / 'run'}",
        ],
    )
    assert list((tmp_path / "run" / "checkpoints").iterdir())
