"""What ranks say of themselves, and the folders of a run in which it lies."""

NODES_FOLDER = "telemetry"
PROFILE_FOLDER = "profile"
