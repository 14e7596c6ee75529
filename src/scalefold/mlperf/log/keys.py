"""Log keys of MLPerf HPC v3.0 OpenFold: how often each appears, what it may hold, when it is logged.

Facts from the compliance rules ``hpc_3.0.0`` (``common``, ``closed_common`` and ``closed_openfold``), the HPC
training rules v3.0 and the reference points of the RCP checker. ``Key.expected`` is the single legal value of the
closed division; a run with another value is not the benchmark, and :mod:`scalefold.mlperf.judge.check` says so.
"""

from dataclasses import dataclass
from typing import Any, Literal

TOKEN = ":::MLLOG "
BENCHMARK = "openfold"
USAGE = "hpc"
RULESET = "3.0.0"

TARGET_LDDT = 0.8
VAL_EVERY_ITERS = 40
NUM_STRONG_RUNS = 10
MIN_WEAK_INSTANCES = 10
MAX_GLOBAL_BATCH_SIZE = 256
PARAMETERS_COUNT = 93_229_082
CHECKPOINT_SHA256 = "b518be4677048f2c0f94889c91e2da73655a73b825a8aa7f8b6f5e580d8ffbed"
LOADER_TYPES = ("InitialTrainingDataloaderPT", "InitialTrainingDataloaderPQ")
DIVISIONS = ("closed", "open")
STATUSES = ("cloud", "onprem", "preview", "research")

#: The RCP checker looks for these as substrings of whole lines, so no other line may contain one (trap 14).
#: In the value of a ``tracked_stats`` line: faults were injected into the run.
REHEARSAL = "rehearsal"
SEARCHED_SUBSTRINGS = ("global_batch_size", "submission_benchmark", "eval_accuracy", "eval_error")

Count = Literal["exactly_one", "at_least_one", "optional"]
Phase = Literal["init", "run"]


@dataclass(frozen=True)
class Key:
    """One log key.

    ``count`` is what our lint requires (at least as strict as the official checker); ``phase`` says whether the
    fact belongs before (``init``) or after ``run_start`` (``run``).
    """

    name: str
    count: Count
    phase: Phase
    types: tuple[type, ...] = ()
    expected: Any = None
    choices: tuple[Any, ...] = ()
    minimum: float | None = None


_NUMBER = (int, float)
_STRUCTURE = [
    Key("init_start", "at_least_one", "init"),
    Key("cache_clear", "at_least_one", "init", (bool,), expected=True),
    Key("submission_benchmark", "exactly_one", "init", (str,), expected=BENCHMARK),
    Key("submission_org", "exactly_one", "init", (str,)),
    Key("submission_platform", "exactly_one", "init", (str,)),
    Key("submission_division", "exactly_one", "init", (str,), choices=DIVISIONS),
    Key("submission_status", "exactly_one", "init", (str,), choices=STATUSES),
    Key("seed", "exactly_one", "init", (int, str)),
    Key("number_of_ranks", "exactly_one", "init", (int,), minimum=1),
    Key("number_of_nodes", "exactly_one", "init", (int,), minimum=1),
    Key("accelerators_per_node", "exactly_one", "init", (int,), minimum=0),
    Key("precision", "exactly_one", "init", (str,)),
    Key("staging_start", "optional", "init"),
    Key("staging_stop", "optional", "init"),
    Key("init_stop", "exactly_one", "init"),
    Key("run_start", "exactly_one", "run"),
    Key("train_samples", "exactly_one", "run", (int,), expected=594_595),
    Key("eval_samples", "exactly_one", "run", (int,), expected=180),
    Key("initial_training_dataloader_type", "exactly_one", "run", (str,), choices=LOADER_TYPES),
    Key("epoch_start", "at_least_one", "run"),
    Key("epoch_stop", "at_least_one", "run"),
    Key("eval_start", "at_least_one", "run"),
    Key("eval_accuracy", "at_least_one", "run", _NUMBER),
    Key("eval_stop", "at_least_one", "run"),
    Key("tracked_stats", "optional", "run", (dict,)),
    Key("run_stop", "exactly_one", "run"),
]
_HYPERPARAMETERS = [
    Key("global_batch_size", "exactly_one", "init", (int,), minimum=1),
    Key("gradient_accumulation_steps", "exactly_one", "init", (int,), minimum=1),
    Key("target_avg_lddt_ca_value", "exactly_one", "init", _NUMBER, expected=TARGET_LDDT),
    Key("train_max_pdb_release_date", "exactly_one", "init", (str,), expected="2021-09-16"),
    Key("val_min_cameo_submission_date", "exactly_one", "init", (str,), expected="2021-09-17"),
    Key("val_max_cameo_submission_date", "exactly_one", "init", (str,), expected="2021-12-11"),
    Key("val_max_sequence_length", "exactly_one", "init", (int,), expected=700),
    Key("val_every_iters", "exactly_one", "init", (int,), expected=VAL_EVERY_ITERS),
    Key("train_sequence_crop_size", "exactly_one", "init", (int,), expected=256),
    Key("num_recycling_iters", "exactly_one", "init", (int,), expected=3),
    Key("max_msa_clusters", "exactly_one", "init", (int,), expected=124),
    Key("max_extra_msa", "exactly_one", "init", (int,), expected=1024),
    Key("templates_enabled", "exactly_one", "init", (bool,), expected=True),
    Key("max_templates", "exactly_one", "init", (int,), expected=4),
    Key("fape_loss_weight", "exactly_one", "init", _NUMBER, expected=1.0),
    Key("fape_loss_backbone_weight", "exactly_one", "init", _NUMBER, expected=0.5),
    Key("fape_loss_sidechain_weight", "exactly_one", "init", _NUMBER, expected=0.5),
    Key("supervised_chi_loss_weight", "exactly_one", "init", _NUMBER, expected=1.0),
    Key("distogram_loss_weight", "exactly_one", "init", _NUMBER, expected=0.3),
    Key("masked_msa_loss_weight", "exactly_one", "init", _NUMBER, expected=2.0),
    Key("plddt_loss_weight", "exactly_one", "init", _NUMBER, expected=0.01),
    Key("opt_name", "exactly_one", "init", (str,), expected="Adam"),
    Key("opt_adam_beta_1", "exactly_one", "init", _NUMBER, expected=0.9),
    Key("opt_adam_beta_2", "exactly_one", "init", _NUMBER, expected=0.999),
    Key("opt_adam_epsilon", "exactly_one", "init", _NUMBER, expected=1e-6),
    Key("opt_weight_decay", "exactly_one", "init", _NUMBER, expected=0.0),
    Key("opt_amsgrad", "exactly_one", "init", (bool,), expected=False),
    Key("opt_gradient_clipping", "exactly_one", "init", (bool,), expected=True),
    Key("opt_gradient_clip_norm", "exactly_one", "init", _NUMBER, expected=0.1),
    Key("opt_base_learning_rate", "exactly_one", "init", _NUMBER, minimum=0.0),
    Key("opt_learning_rate_warmup_init", "exactly_one", "init", _NUMBER, minimum=0.0),
    Key("opt_learning_rate_warmup_steps", "exactly_one", "init", (int,), minimum=0),
    Key("init_checkpoint_sha256sum", "exactly_one", "init", (str,), expected=CHECKPOINT_SHA256),
    Key("swa_enabled", "exactly_one", "init", (bool,), expected=True),
    Key("swa_decay_rate", "exactly_one", "init", _NUMBER, expected=0.9),
    Key("model_parameters_count", "exactly_one", "init", (int,), expected=PARAMETERS_COUNT),
]

#: Every key by name, in the order in which accepted logs hold them.
KEYS: dict[str, Key] = {key.name: key for key in [*_STRUCTURE, *_HYPERPARAMETERS]}

#: Keys with one legal value in the closed division: what makes a run the benchmark.
EXPECTED: dict[str, Any] = {key.name: key.expected for key in KEYS.values() if key.expected is not None}
