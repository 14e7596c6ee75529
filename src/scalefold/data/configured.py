"""What a configuration says of data: the features to build, the chains to evaluate."""

from scalefold.config import Config
from scalefold.data.features.features import FeatureSettings
from scalefold.data.store import selection
from scalefold.data.store.store import Store


def feature_settings(config: Config) -> FeatureSettings:
    """The feature pipeline's view of the configuration."""
    d = config.data
    return FeatureSettings(
        train_sequence_crop_size=d.train_sequence_crop_size,
        max_msa_clusters=d.max_msa_clusters,
        max_extra_msa=d.max_extra_msa,
        max_templates=d.max_templates,
        templates_enabled=config.model.templates_enabled,
        num_recycling_iters=d.num_recycling_iters,
        shuffle_top_k_prefiltered=d.shuffle_top_k_prefiltered,
        masked_msa_replace_fraction=d.masked_msa_replace_fraction,
        masked_msa_profile_prob=d.masked_msa_profile_prob,
        masked_msa_same_prob=d.masked_msa_same_prob,
        masked_msa_uniform_prob=d.masked_msa_uniform_prob,
        use_clamped_fape_probability=d.use_clamped_fape_probability,
        eval_length_multiple=d.eval_length_multiple,
    )


def batch_limits_s(config: Config) -> tuple[float, float]:
    """How long the first batch and any other may take: a little less than the watch allows, which knows no loader."""
    return 0.9 * config.parallel.startup_timeout_s, 0.9 * config.parallel.step_timeout_s


def evaluation_lengths(config: Config, store: Store) -> dict[str, int]:
    """Evaluation chains with their lengths: the store's own list if it has one, else the benchmark's CAMEO list."""
    d = config.data
    own = sorted(d.store_dir.glob("evaluation_targets*"))
    rows = selection.evaluation_set(
        store.table,
        selection.read_evaluation_file(own[0] if own else None),
        d.val_min_cameo_submission_date,
        d.val_max_cameo_submission_date,
        d.val_max_sequence_length,
    )
    return {store.name(int(row)): int(store.table.length[row]) for row in rows}
