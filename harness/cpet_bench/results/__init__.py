"""Results from several people and machines: a module a verb. Importing this loads nothing."""
