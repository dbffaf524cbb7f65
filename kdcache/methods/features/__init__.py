"""Methods on features: a file each, with the plain function and the loss made of it."""
