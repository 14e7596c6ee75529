"""Tiny training runs for tests: overrides of configs/tiny.yaml, in this process or in several."""

from pathlib import Path

from scalefold.config import Config, load_config

TINY = Path(__file__).resolve().parents[1] / "configs" / "tiny.yaml"
SMALLEST = [
    "model.evoformer.num_blocks=1",
    "model.structure.num_blocks=2",
    "model.structure.dropout=0.1",
    "model.template.dropout=0.25",
    *(f"model.{stack}.{kind}_dropout=0.2" for stack in ("extra_msa", "evoformer") for kind in ("msa", "pair")),
    "data.train_sequence_crop_size=16",
    "data.max_msa_clusters=6",
    "data.max_extra_msa=8",
    "data.num_workers=0",
    "training.global_batch_size=2",
    "training.num_train_iters=4",
    "training.val_every_iters=2",
    "training.target_avg_lddt_ca_value=1.0",
    "run.checkpoint_every_iters=0",
]


def tiny_config(store: Path, run_dir: Path, *overrides: str) -> Config:
    """The smallest configuration that still has every part."""
    places = [f"data.store_dir={store}", f"run.run_dir={run_dir}"]
    return load_config(TINY, [*SMALLEST, *places, *overrides]).config
