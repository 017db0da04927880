# Nothing but Python >= 3.10 and make is needed: every target sets up .venv by itself.
