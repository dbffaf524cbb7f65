"""Datasets: images, labels and stable keys, from files, archives, tables and other libraries."""
