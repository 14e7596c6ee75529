"""What a run states about itself before its clock starts: the MLPerf log's header, the record's, the configuration."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.cuda.nccl

from scalefold import __version__
from scalefold.config import Config, dump_config
from scalefold.mlperf.log.events import Events, Hyperparameters, SubmissionInfo
from scalefold.model.alphafold import AlphaFold
from scalefold.parallel.ranks import Ranks
from scalefold.step.build import Training
from scalefold.telemetry.gpu import driver_version


def log_header(events: Events, config: Config, ranks: Ranks, seed: int, model: AlphaFold, digest: str | None) -> None:
    """Everything the log states before ``init_stop``."""
    s, p = config.submission, config.parallel
    events.cache_clear(os.environ.get("SCALEFOLD_CACHES_DROPPED") == "1")
    events.submission(
        SubmissionInfo(org=s.org or "unknown", platform=s.platform or "unknown", division=s.division, status=s.status)
    )
    events.seed(seed)
    events.scale(
        number_of_ranks=ranks.layout.world_size, number_of_nodes=p.nodes, accelerators_per_node=p.gpus_per_node
    )
    events.hyperparameters(hyperparameters(config, sum(parameter.numel() for parameter in model.parameters())))
    events.checkpoint(digest)
    events.staging()


def hyperparameters(config: Config, model_parameters_count: int) -> Hyperparameters:
    """The closed division's settings with the values that are really used."""
    t, d, weights = config.training, config.data, config.loss
    shared = ("train_max_pdb_release_date", "val_min_cameo_submission_date", "val_max_cameo_submission_date")
    sizes = ("val_max_sequence_length", "train_sequence_crop_size", "num_recycling_iters", "max_msa_clusters")
    return Hyperparameters(
        **{key: getattr(d, key) for key in (*shared, *sizes, "max_extra_msa", "max_templates")},
        global_batch_size=t.global_batch_size,
        gradient_accumulation_steps=t.gradient_accumulation_steps,
        target_avg_lddt_ca_value=t.target_avg_lddt_ca_value,
        val_every_iters=t.val_every_iters,
        precision=config.execution.precision,
        model_parameters_count=model_parameters_count,
        templates_enabled=config.model.templates_enabled,
        fape_loss_weight=weights.fape_loss_weight,
        fape_loss_backbone_weight=weights.fape_loss_backbone_weight,
        fape_loss_sidechain_weight=weights.fape_loss_sidechain_weight,
        supervised_chi_loss_weight=weights.supervised_chi_loss_weight,
        distogram_loss_weight=weights.distogram_loss_weight,
        masked_msa_loss_weight=weights.masked_msa_loss_weight,
        plddt_loss_weight=weights.plddt_loss_weight,
        opt_name="Adam",
        opt_adam_beta_1=t.opt_adam_beta_1,
        opt_adam_beta_2=t.opt_adam_beta_2,
        opt_adam_epsilon=t.opt_adam_epsilon,
        opt_weight_decay=0.0,
        opt_amsgrad=False,
        opt_gradient_clipping=True,
        opt_gradient_clip_norm=t.opt_gradient_clip_norm,
        opt_base_learning_rate=t.opt_base_learning_rate,
        opt_learning_rate_warmup_init=t.opt_learning_rate_warmup_init,
        opt_learning_rate_warmup_steps=t.opt_learning_rate_warmup_steps,
        swa_enabled=True,
        swa_decay_rate=t.swa_decay_rate,
    )


def run_header(config: Config, ranks: Ranks, seed: int, training: Training) -> dict[str, Any]:
    """Facts for the record: what ran where."""
    device = ranks.device
    return {
        "config_name": config.system,
        "world_size": ranks.layout.world_size,
        "dap_size": ranks.layout.dap_size,
        "num_eval_ranks": ranks.layout.num_eval_ranks,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "host": ranks.host,
        "launcher": ranks.launcher,
        "torch": torch.__version__,
        "kernels": training.optimizer.ops.name,
        "dap_exchange": training.exchange,
        "precision": config.execution.precision,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        "global_batch_size": config.training.global_batch_size,
        "val_every_iters": config.training.val_every_iters,
        "target": config.training.target_avg_lddt_ca_value,
        "environment": software(),
    }


def software() -> dict[str, str]:
    """Versions of everything that a result depends on and no configuration states; what is not there is left out."""
    found = {
        "GPU driver": driver_version(),
        "CUDA": torch.version.cuda,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "scalefold": f"{__version__}{f', commit {commit}' if (commit := source_commit()) else ''}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    return {name: version for name, version in found.items() if version is not None}


def source_commit(file: Path = Path(__file__)) -> str | None:
    """Short commit of the checkout that ``file`` belongs to, ``+`` if something differs from it; None without one."""
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:  # a checkout that only surrounds us
        return None
    return _git(file.parent, "describe", "--always", "--dirty=+", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_resolved(path: Path, config: Config) -> None:
    """Keep the resolved configuration beside the log."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(dump_config(config), encoding="utf-8")
    temporary.replace(path)
