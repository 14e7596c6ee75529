"""Score a weights file on the evaluation chains, outside any training run."""

from collections.abc import Callable
from pathlib import Path

import torch

from scalefold.config import Config, RankLayout
from scalefold.data.configured import evaluation_lengths, feature_settings
from scalefold.data.store.store import Store
from scalefold.eval.score import ChainScorer, Evaluation
from scalefold.parallel.ranks import Ranks, choose_device, prepare_process
from scalefold.step.build import choose_operations
from scalefold.step.checkpoint import load_into
from scalefold.step.parameters import FlatLayout


def evaluate_weights(config: Config, weights_file: Path, note: Callable[[str], None]) -> Evaluation:
    """lDDT-Cα of every configured evaluation chain, in this process; ``note`` is told what goes on.

    Raises:
        CheckpointError: the file does not fit the model.
    """
    prepare_process(config)
    ranks = Ranks(RankLayout(1), 0, 0, choose_device(config, 0))
    scorer = ChainScorer(config, ranks, feature_settings(config), choose_operations(config, ranks), None)
    flat = FlatLayout(scorer.model.model)
    weights = torch.zeros(flat.size, device=ranks.device)
    load_into(weights_file, flat, weights)
    scorer.warm_up(note)
    store = Store(config.data.store_dir)
    scorer.open_data(evaluation_lengths(config, store))
    try:
        return scorer.score(flat, weights)
    finally:
        scorer.close()
        store.close()
