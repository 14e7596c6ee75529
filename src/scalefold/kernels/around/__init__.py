"""What lies around the trunk: the structure module's iterations in one piece, templates, ambiguous atoms; and aside of
its backward."""
