"""Stage 2: students trained from labels and stores."""
