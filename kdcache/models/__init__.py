"""Networks by name, their weights, and the fields that can be taken from them."""
