"""ScaleFold: MLPerf HPC OpenFold training, from raw chains to a checked submission."""

__version__ = "0.1.0"
