"""The verbs: each a function in a module of its name, restartable and testable alone. They meet only through files."""
