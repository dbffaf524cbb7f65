"""Methods without a teacher: students that teach each other, a network that teaches itself."""
