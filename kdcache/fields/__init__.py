"""Fields of networks: their names, and feature maps as the methods look at them."""
