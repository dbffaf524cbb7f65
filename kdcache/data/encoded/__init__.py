"""Images as encoded bytes (JPEG, PNG): how they are decoded; archives and tables that hold them."""
