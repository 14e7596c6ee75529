"""Score a weights file on the evaluation chains, outside any training run."""

from collections.abc import Callable
from pathlib import Path

from scalefold.config import Config
from scalefold.data.configured import evaluation_lengths, feature_settings
from scalefold.data.store.store import Store
from scalefold.eval.score import ChainScorer, Evaluation
from scalefold.model.alphafold import AlphaFold
from scalefold.parallel.ranks import RankLayout, Ranks, choose_device
from scalefold.run.begin import prepare_process
from scalefold.step.build import choose_operations
from scalefold.step.checkpoint import load_into
from scalefold.step.parameters import FlatParameters


def evaluate_weights(config: Config, weights_file: Path, note: Callable[[str], None]) -> Evaluation:
    """lDDT-Cα of every configured evaluation chain, in this process; ``note`` is told what goes on.

    Raises:
        CheckpointError: the file does not fit the model.
    """
    prepare_process(config)
    ranks = Ranks(RankLayout(1), 0, 0, choose_device(config, 0))
    scorer = ChainScorer(config, ranks, feature_settings(config), choose_operations(config, ranks), None)
    flat = FlatParameters(AlphaFold(config.model), ranks.device)
    load_into(weights_file, flat, flat.master)
    scorer.warm_up(note)
    store = Store(config.data.store_dir)
    scorer.open_data(evaluation_lengths(config, store))
    try:
        return scorer.score(flat, flat.master)
    finally:
        scorer.close()
        store.close()
