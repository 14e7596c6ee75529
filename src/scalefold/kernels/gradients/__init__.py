"""What the backward passes of row-wise operations share: gradients of a norm's input and of linears' weights."""
