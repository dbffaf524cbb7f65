"""Stage 1: teachers run once over the views of a dataset, their outputs written to stores."""
