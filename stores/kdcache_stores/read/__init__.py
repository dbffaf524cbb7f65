"""Reading: sealed objects, decoded rows, joined fields, verification and description."""
