"""The iterations of the structure module in one piece: what lies between the products is a few Triton programs."""
