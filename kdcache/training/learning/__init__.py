"""A network that learns: its step, its losses over ranks and steps, and the step compiled."""
