"""How rows become arrays and arrays rows, and how far the decoded rows are from the live ones."""
