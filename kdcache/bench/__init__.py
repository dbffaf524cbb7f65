"""The README's claims about speed and size, measured as ratios on the machine at hand."""
