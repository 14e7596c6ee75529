"""The life of a rank that only evaluates: it holds no optimizer, only the weights that arrive."""

import torch

from scalefold.data.configured import evaluation_lengths, feature_settings
from scalefold.data.store.store import Store
from scalefold.eval.elsewhere import accept_connection, serve_evaluations
from scalefold.eval.score import ChainScorer
from scalefold.parallel.ending import Ending
from scalefold.parallel.ranks import Ranks
from scalefold.phases import Schedule
from scalefold.rehearse.rehearsal import Rehearsal
from scalefold.run.begin import begin, begin_counting, continue_counting, open_node_log
from scalefold.run.header import log_header
from scalefold.run.resume import RunOptions
from scalefold.step.build import choose_operations, flat_layout
from scalefold.stop_signals import leave_stopping_to_others


def evaluate_elsewhere(
    schedule: Schedule, options: RunOptions, ranks: Ranks, ending: Ending, rehearsal: Rehearsal
) -> None:
    """An evaluation rank's whole life, in step with the barriers of the training ranks; ``ending`` lets go of it."""
    leave_stopping_to_others()
    beginning = begin(schedule, options, ranks, ending)
    config, events = schedule.config, beginning.events
    settings = feature_settings(config)
    ops = choose_operations(config, ranks)
    scorer = ChainScorer(config, ranks, settings, ops, ranks.eval_group)
    flat = flat_layout(config, scorer.model.model, ranks.layout)
    weights = torch.zeros(flat.size, device=ranks.device)
    ending.add("captured evaluations", scorer.model.close, after_errors=False)
    ending.add("evaluation workers", scorer.close)
    log_header(events, config, ranks, beginning.start.seed, scorer.model.model, None)
    continue_counting(events, schedule)
    with open_node_log(config, ranks, beginning.start.result_file, lambda text: None) as node_log:
        accept_connection(ranks)
        ranks.watch.at("warm-up")
        scorer.spawn()
        scorer.warm_up(lambda text: ranks.watch.at(f"warm-up, {text}"))
        ranks.barrier()
        events.init_stop()
        ranks.barrier()
        events.run_start()
        ranks.barrier()
        store = Store(config.data.store_dir)
        scorer.open_data(evaluation_lengths(config, store))
        store.close()
        note_cycle = begin_counting(node_log)
        serve_evaluations(config, ranks, scorer, flat, weights, events, note_cycle, rehearsal.before_evaluation)
    events.close()  # whoever joins the parts of the log must find all of this one
