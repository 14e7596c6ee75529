"""What lies around the trunk: inputs of the embedders, templates, ambiguous atoms, loss terms; and aside of the
backward's chain."""
