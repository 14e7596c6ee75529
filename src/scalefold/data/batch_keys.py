"""What features and model agree on beyond names and shapes."""

#: differs between recycling slices: has the slice as an additional last dimension
PER_SLICE_KEYS = frozenset(
    {"msa_feat", "true_msa", "bert_mask", "extra_msa", "extra_has_deletion", "extra_deletion_value"}
)
