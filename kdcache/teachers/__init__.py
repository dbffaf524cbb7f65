"""Teachers: a frozen network with its preprocessing, from uint8 views to fields."""
