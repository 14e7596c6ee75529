"""The structure module: its iterations in one piece, and the placement of atoms."""
