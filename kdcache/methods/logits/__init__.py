"""Methods on logits: a file each, with the plain function and the loss made of it."""
