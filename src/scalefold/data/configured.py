"""What a configuration says of data: the features to build, the chains to evaluate."""

from scalefold.config import Config, FeatureConfig
from scalefold.data.features.features import FeatureSettings
from scalefold.data.store import selection
from scalefold.data.store.store import Store


def feature_settings(config: Config) -> FeatureSettings:
    """The feature pipeline's view of the configuration."""
    configured = {name: getattr(config.data, name) for name in FeatureConfig.model_fields}
    return FeatureSettings(**configured, templates_enabled=config.model.templates_enabled)


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
