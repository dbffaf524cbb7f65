"""View plans, the pixels of their views, and batches of views with what teachers gave for them."""
